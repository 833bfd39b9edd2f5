"""`remoe generate`: greedy text from a checkpoint whose experts stay on disk, with everything measured."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from configs.command import run
from configs.files import prepare, write_json
from configs.load import UserError
from evaluation.engine.cache.trace_formats import check_extension, write_trace
from evaluation.engine.engine import Engine
from evaluation.engine.greedy import DecodeResult, decode
from evaluation.engine.loading import load
from evaluation.engine.memory.process import peak_rss_bytes
from evaluation.report.wording import MILLISECONDS, PERCENT, PLAIN, bytes_text
from launch.engine_flags import add_engine_flags, engine_options, router_weights
from training.model.lazy_weights import read_config
from training.model.loading import load_tokenizer, local_folder

EXAMPLE = """example:
  remoe generate --model data/embedded/model --expert-cache 2MiB --prompt "The sea was" --max-new-tokens 64 \\
      --output generated.json
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, load, decode one prompt, write the JSON and the trace, print the text and a table."""
    arguments = _parser().parse_args(argv)
    output = prepare(arguments.output) if arguments.output else None
    trace_path = prepare(arguments.route_trace) if arguments.route_trace else None
    if trace_path:
        check_extension(trace_path)
    prompt = _prompt(arguments)
    model_dir = local_folder(arguments.model)
    torch.manual_seed(arguments.seed)
    transformers.utils.logging.disable_progress_bar()
    read_config(model_dir)  # a folder without a model is named before its tokenizer is missed
    tokenizer = load_tokenizer(model_dir)
    prompt_ids = tokenizer(prompt)["input_ids"]
    if not prompt_ids:
        raise UserError(f"the tokenizer of {arguments.model} makes no tokens of the prompt; is tokenizer.json there?")
    options = engine_options(
        arguments,
        context_tokens=len(prompt_ids) + max(1, arguments.max_new_tokens),
        record_trace=trace_path is not None,
        cache_prior=arguments.cache_prior,
        cache_prior_keep=arguments.cache_prior_keep,
    )
    with load(model_dir, options, router_delta=router_weights(arguments, model_dir)) as (model, engine):
        result = decode(model, engine, prompt_ids=prompt_ids, max_new_tokens=arguments.max_new_tokens)
        text = tokenizer.decode(result.token_ids, skip_special_tokens=True)
        report = {**result_json(result, engine), "text": text, "config": _resolved(arguments, engine, model)}
        if trace_path:
            write_trace(engine.trace(), trace_path)
    if output:
        write_json(output, report)
    _print(report)


def result_json(result: DecodeResult, engine: Engine) -> dict[str, Any]:
    """What one decode did, under the names of the report; None is what was not measured."""
    stats, timing = result.stats, result.timing
    return {
        "token_ids": result.token_ids,
        "outputs_are_exact": engine.is_exact,
        "accesses": stats.accesses,
        "hits": stats.hits,
        "misses": stats.misses,
        "first_touches": stats.first_touches,
        "hit_rate": stats.hit_rate,
        "bytes_read": stats.bytes_read,
        "bytes_read_per_token": stats.bytes_read_per_token,
        "token_demand_bytes": engine.token_demand_bytes,
        "stall_seconds": stats.stall_seconds,
        "reading_seconds": stats.reading_seconds,
        "mean_ttft_ms": timing.ttft_ms,
        "mean_tpot_ms": timing.tpot_ms,
        "itl_ms": timing.itl_ms,
        "output_throughput": timing.output_throughput,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _resolved(arguments: argparse.Namespace, engine: Engine, model: Any) -> dict[str, Any]:
    """Every flag as given, and what became of it."""
    return {
        **vars(arguments),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "expert_cache_bytes": engine.pool_bytes,
        "division": None if engine.division is None else asdict(engine.division),
        "slots": engine.cache.total_slots,
        **asdict(engine.demand),
        "expert_bytes": engine.expert_bytes,
        "model_type": model.config.model_type,
        "attn_implementation": model.config._attn_implementation,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _prompt(arguments: argparse.Namespace) -> str:
    prompt = arguments.prompt if arguments.prompt_file is None else _read_prompt(Path(arguments.prompt_file))
    if not prompt.strip():
        raise UserError("the prompt is empty; write some text after --prompt or into the prompt file")
    if not prompt.isprintable() and any(0xD800 <= ord(character) <= 0xDFFF for character in prompt):
        raise UserError("the prompt is not UTF-8 text; write it in UTF-8 or put it into a file saved as UTF-8")
    return prompt


def _read_prompt(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"prompt file {path} does not exist; name a text file, or give the text with --prompt")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error


def _print(report: dict[str, Any]) -> None:
    console = Console()
    console.print(report["text"], markup=False, highlight=False)
    if not report["outputs_are_exact"]:
        console.print("routed with a cache prior: not the text of the model as it was trained", style="bold")
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
        "peak RSS": bytes_text(report["peak_rss_bytes"]),
    }.items():
        table.add_row(name, value)
    console.print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="remoe generate",
        description="Greedy text from a mixture-of-experts checkpoint whose experts stay on disk: the tokens of plain "
        "transformers, within the expert memory you give it.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_engine_flags(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt itself")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a UTF-8 text file that holds the prompt")
    parser.add_argument("--max-new-tokens", type=int, required=True, metavar="N", help="stop after N tokens")
    parser.add_argument("--output", metavar="JSON", help="where to write tokens and measurements")
    parser.add_argument(
        "--cache-prior",
        type=float,
        metavar="LAMBDA",
        help="CHANGES THE TEXT: while decoding, routers prefer experts that are in the cache, by LAMBDA times the spread "
        "of their logits; 0.1 is mild (arXiv 2412.00099)",
    )
    parser.add_argument(
        "--cache-prior-keep",
        type=int,
        default=1,
        metavar="J",
        help="the router's own J best experts are preferred as much (default 1)",
    )
    parser.add_argument(
        "--route-trace",
        metavar="PATH",
        help="write the routing of this run, for `remoe replay`, as .safetensors, .npz or .csv",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of torch; greedy decoding itself draws nothing")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
