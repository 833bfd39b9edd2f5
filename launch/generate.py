"""`remoe generate`: greedy text from a checkpoint whose experts stay on disk, with everything measured."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from configs.checks import at_least
from configs.command import parse
from configs.files import prepare, write_json
from configs.load import UserError
from data.sources import read_text
from evaluation.engine.cache.trace_formats import check_extension, write_trace
from evaluation.engine.engine import Engine
from evaluation.engine.greedy import DecodeResult, decode
from evaluation.engine.loading import load
from evaluation.engine.memory.process import peak_rss_bytes
from evaluation.report.numbers import MILLISECONDS, PERCENT, PLAIN, bytes_text
from launch.engine_flags import EngineFlags, router_weights
from training.model.lazy_weights import read_config
from training.model.loading import load_tokenizer, local_folder

logger = logging.getLogger(__name__)
COUNTED = (
    "accesses", "hits", "misses", "first_touches", "hit_rate", "bytes_read", "bytes_read_per_token", "stall_seconds",
    "reading_seconds", "prefetched", "prefetch_used", "ahead_calls",
)  # fmt: skip


@dataclass(frozen=True)
class Generate:
    """Greedy text from a mixture-of-experts checkpoint whose experts stay on disk.

    The tokens are those of plain transformers, within the memory that you give.

    examples:
      remoe generate --model data/embedded/model --expert-cache 2MiB --prompt "The sea was"
      remoe generate --model DIR --memory-budget 8GiB --prompt-file prompt.txt --max-new-tokens 200 --output generated.json
    """

    model: str  # folder with safetensors weights, or hub name
    engine: EngineFlags
    prompt: str | None = None  # the prompt itself
    prompt_file: str | None = None  # or a UTF-8 text file that holds it; -: what comes through a pipe
    max_new_tokens: int = 64  # stop after that many tokens
    router_delta: str | None = None  # folder with tuned routers for exactly this model
    output: str | None = None  # JSON file for tokens and measurements
    route_trace: str | None = None  # file for the routing of this run (.safetensors, .npz or .csv), for `remoe replay`
    seed: int = 0  # of torch; greedy decoding itself draws nothing

    def __post_init__(self) -> None:
        at_least(self, max_new_tokens=1)
        if not -(2**63) <= self.seed < 2**64:
            raise UserError(f"--seed is {self.seed}; write a number of at most 64 bits")


def main(argv: Sequence[str] | None = None) -> None:
    """Load, decode one prompt, write the JSON and the trace, print the text and a table."""
    command = parse(Generate, argv, prog="remoe generate")
    output = prepare(command.output) if command.output else None
    trace_path = prepare(command.route_trace) if command.route_trace else None
    if trace_path:
        check_extension(trace_path)
    prompt = _prompt(command)
    model_dir = local_folder(command.model)
    torch.manual_seed(command.seed)
    transformers.utils.logging.disable_progress_bar()
    config = read_config(model_dir)  # a folder without a model is named before its tokenizer is missed
    tokenizer = load_tokenizer(model_dir)
    prompt_ids = tokenizer(prompt)["input_ids"]
    if not prompt_ids:
        raise UserError(f"the tokenizer of {command.model} makes no tokens of the prompt; is tokenizer.json there?")
    context_tokens = len(prompt_ids) + command.max_new_tokens
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and context_tokens > positions:
        logger.warning(
            "prompt and answer have %s tokens, the model %s positions: it was not made for more",
            context_tokens,
            positions,
        )
    options = replace(command.engine, context_tokens=context_tokens, record_trace=trace_path is not None)
    with load(model_dir, options, router_delta=router_weights(model_dir, command.router_delta)) as (model, engine):
        numbers = {"prompt_ids": prompt_ids, "max_new_tokens": command.max_new_tokens}
        result = decode(model, engine, **numbers, tokenizer=tokenizer)
        text = tokenizer.decode(result.token_ids, skip_special_tokens=True)
        report = {**result_json(result, engine), "text": text, "config": _resolved(command, engine, model)}
        if trace_path:
            write_trace(engine.trace(), trace_path)
    if output:
        write_json(output, report)
    _print(report)


def result_json(result: DecodeResult, engine: Engine) -> dict[str, Any]:
    """What one decode did, under the names of the report; None is what was not measured."""
    timing = result.timing
    return {
        "token_ids": result.token_ids,
        "outputs_are_exact": engine.is_exact,
        "outputs_changed_by": engine.options.changes,
        "swapped": result.stats.swapped,
        "lost_weight": result.stats.lost_weight,
        **{name: getattr(result.stats, name) for name in COUNTED},
        "token_demand_bytes": engine.token_demand_bytes,
        "mean_ttft_ms": timing.ttft_ms,
        "mean_tpot_ms": timing.tpot_ms,
        "itl_ms": timing.itl_ms,
        "output_throughput": timing.output_throughput,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _resolved(command: Generate, engine: Engine, model: Any) -> dict[str, Any]:
    """Every flag as given, and what became of it."""
    return {
        **{key: value for key, value in asdict(command).items() if key != "engine"},
        **asdict(command.engine),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "expert_cache_bytes": engine.pool_bytes,
        "division": None if engine.division is None else asdict(engine.division),
        "slots": engine.cache.total_slots,
        "experts_ahead": engine.experts_ahead,
        **asdict(engine.demand),
        "expert_bytes": engine.expert_bytes,
        "model_type": model.config.model_type,
        "attn_implementation": model.config._attn_implementation,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _prompt(command: Generate) -> str:
    if (command.prompt is None) == (command.prompt_file is None):
        raise UserError("write exactly one of --prompt (the text itself) and --prompt-file (a file that holds it)")
    prompt = command.prompt if command.prompt_file is None else read_text(command.prompt_file)
    assert prompt is not None, "one of the two was given"
    if not prompt.strip():
        raise UserError("the prompt is empty; write some text after --prompt")
    if not prompt.isprintable() and any(0xD800 <= ord(character) <= 0xDFFF for character in prompt):
        raise UserError("the prompt is not UTF-8 text; write it in UTF-8 or put it into a file saved as UTF-8")
    return prompt


def _print(report: dict[str, Any]) -> None:
    console = Console()
    console.print(report["text"], markup=False, highlight=False)
    if not report["outputs_are_exact"]:
        said = f"with {report['outputs_changed_by']}: not the text of the model as it was trained"
        console.print(said, style="bold", markup=False)
    table = Table(show_header=False)
    hit_rate = report["hit_rate"]
    for name, value in {
        "hit rate, prefill": PERCENT.text(hit_rate["prefill"]),
        "hit rate, decode": PERCENT.text(hit_rate["decode"]),
        "bytes read per token": bytes_text(report["bytes_read_per_token"]),
        "demand of one token": bytes_text(report["token_demand_bytes"]),
        "TTFT": MILLISECONDS.text(report["mean_ttft_ms"]),
        "TPOT": MILLISECONDS.text(report["mean_tpot_ms"]),
        "output throughput": f"{PLAIN.text(report['output_throughput'])} tokens/s",
        "read ahead": _read_ahead(report),
        "peak RSS": bytes_text(report["peak_rss_bytes"]),
    }.items():
        table.add_row(name, value)
    console.print(table)


def _read_ahead(report: dict[str, Any]) -> str:
    """How many experts of a layer, and for how many tokens."""
    tokens, ahead = max(0, len(report["token_ids"]) - 1), report["config"]["experts_ahead"]
    return f"{ahead} a layer, for {report['ahead_calls']} of {tokens} tokens" if ahead else "nothing"
