"""`remoe make-model`: a mid-sized checkpoint with routing like that of trained models, to measure paging with.

What the routing is like is measured on the finished checkpoint, by the engine, and written beside it.
"""

import argparse
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from configs.command import run
from configs.files import write_json
from configs.load import UserError
from configs.sizes import parse_size, readable
from data.corpus import DOMAINS, EMBEDDED
from data.pieces import document_beginnings
from evaluation.benchmark.made_model.made_checkpoint import DTYPES, Recipe, weight_bytes, write_checkpoint
from evaluation.benchmark.made_model.synthetic import Shape
from evaluation.engine.cache.counts import DECODE
from evaluation.engine.cache.curve import lru_curve
from evaluation.engine.cache.reuse import routing_summary
from evaluation.engine.cache.trace import RouteTrace
from evaluation.engine.greedy import decode
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from training.model.loading import load_tokenizer

EXAMPLE = """examples:
  remoe make-model --output runs/models/mid
  remoe make-model --output runs/models/small --size 256MiB --layers 6 --hidden 512 --experts 32 --top-k 4 --eor 0.4

One expert has 3 x hidden x intermediate weights; without --intermediate it is chosen so that all weights fill --size.
"""
CONTEXT_TOKENS = 4096
INTERMEDIATE_STEP = 64  # as in every model in the field; matrices are then whole pages, see `remoe pack`
CHECK_CACHE = "30%"  # of the experts, while the finished checkpoint is measured
CHECK_PROMPT_TOKENS = 256
MISS_SHARES = (0.125, 0.25, 0.5, 0.75)  # of a layer's experts, at which LRU misses are told


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, make the checkpoint aside, measure it, rename it, print."""
    arguments = _parser().parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    output = Path(arguments.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output {output} exists already; name a new folder, or remove it first")
    tokenizer = load_tokenizer(str(EMBEDDED / "tokenizer"))
    recipe = _recipe(arguments, len(tokenizer))
    aside = output.with_name(f".{output.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _check_room(aside, weight_bytes(recipe.shape, recipe.dtype))
        made = write_checkpoint(aside, recipe, tokenizer)
        made["measured"] = measure(aside, tokenizer, new_tokens=arguments.check_tokens)
        write_json(aside / "made.json", made)
        (aside / "README.md").write_text(_readme(made), encoding="utf-8")
        aside.replace(output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _print(output, made)


def _recipe(arguments: argparse.Namespace, vocabulary: int) -> Recipe:
    """The recipe that the flags ask for.

    Raises:
        UserError: unknown precision, sizes that do not fit together.
    """
    if arguments.dtype not in DTYPES:
        raise UserError(f"--dtype {arguments.dtype} is not known; write one of {', '.join(DTYPES)}")
    if not 0 < arguments.eor < 1:
        raise UserError(f"--eor {arguments.eor} is no share; write for example 0.35")
    if not 0 <= arguments.seed < 2**31:
        raise UserError(f"--seed {arguments.seed} is out of range; write a number from 0 to {2**31 - 1}")
    try:
        shape = Shape(
            hidden=arguments.hidden, layers=arguments.layers, num_experts=arguments.experts, top_k=arguments.top_k,
            intermediate=arguments.intermediate or INTERMEDIATE_STEP, shared_intermediate=arguments.shared_intermediate,
            vocabulary=vocabulary, context=CONTEXT_TOKENS,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from error
    if arguments.intermediate is None:
        shape = replace(shape, intermediate=_fitting_intermediate(shape, arguments.dtype, arguments.size))
    return Recipe(shape, arguments.eor, arguments.seed, arguments.dtype)


def _fitting_intermediate(shape: Shape, dtype: str, size: str) -> int:
    """The largest multiple of the step with which all weights are at most `size`."""
    room_bytes = parse_size(size, what="--size") - weight_bytes(replace(shape, intermediate=0), dtype)
    step_bytes = weight_bytes(replace(shape, intermediate=INTERMEDIATE_STEP), dtype)
    step_bytes -= weight_bytes(replace(shape, intermediate=0), dtype)
    steps = room_bytes // step_bytes
    if steps < 1:
        raise UserError(
            f"--size {size} is too small for {shape.layers} layers of {shape.num_experts} experts with hidden size "
            f"{shape.hidden}: the smallest is {readable(weight_bytes(shape, dtype))}; write more, or fewer experts"
        )
    return steps * INTERMEDIATE_STEP


def _check_room(folder: Path, wanted_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < wanted_bytes:
        raise UserError(
            f"the model has {readable(wanted_bytes)} and the disk of {folder.parent} only {readable(free_bytes)} free; "
            "free some space or write a smaller --size"
        )


def measure(folder: Path, tokenizer: PreTrainedTokenizerBase, *, new_tokens: int) -> dict[str, Any]:
    """Routing on test text (teacher-forced) and while decoding greedily, by the engine, one prompt of each domain.

    `distinct_tokens` says how many of the greedy tokens differ, `in_text` how many of equally long real text do.
    """
    rows = document_beginnings(tokenizer, "test", tokens=CHECK_PROMPT_TOKENS, count=len(DOMAINS))
    generated: list[list[int]] = []
    with load(folder, EngineOptions(CHECK_CACHE, record_trace=True, warn=False)) as (model, engine):
        for row in tqdm(rows, desc="measure", unit="prompt"):
            generated.append(
                decode(model, engine, prompt_ids=row, max_new_tokens=1 + new_tokens).token_ids[:new_tokens]
            )
        trace = engine.trace()
    return {
        "split": "test",
        "teacher_forced": _routing(_of_phase(trace, decoded=False)),
        "greedy": _routing(_of_phase(trace, decoded=True)) if new_tokens > 1 else None,
        "distinct_tokens": _distinct(generated),
        "distinct_tokens_in_text": _distinct([row[:new_tokens] for row in rows]),
        "most_common_share": _most_common_share(generated) if new_tokens else None,
    }


def _of_phase(trace: RouteTrace, *, decoded: bool) -> RouteTrace:
    """The tokens of one phase, each as a call of its own."""
    kept_T = (trace.phase == DECODE) == decoded
    return replace(
        trace, expert_ids=trace.expert_ids[kept_T], request_id=trace.request_id[kept_T],
        phase=np.full(kept_T.sum(), DECODE), call=np.arange(kept_T.sum()),
    )  # fmt: skip


def _routing(trace: RouteTrace) -> dict[str, Any]:
    """EOR, load, and what an LRU cache of a share of a layer's experts would miss, cold for every prompt."""
    curve = lru_curve(trace, cache_scope="per_layer")
    misses, accesses = curve.misses.sum((0, 1)), int(curve.accesses.sum())
    slots = {share: round(share * trace.num_experts) for share in MISS_SHARES}
    return {
        **routing_summary(trace),
        "lru_miss_rate": {str(share): int(misses[count]) / accesses for share, count in slots.items()},
    }


def _distinct(rows: Sequence[Sequence[int]]) -> float:
    return float(np.mean([len(set(row)) for row in rows]))


def _most_common_share(rows: Sequence[Sequence[int]]) -> float:
    return float(np.mean([Counter(row).most_common(1)[0][1] / len(row) for row in rows]))


def _readme(made: dict[str, Any]) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in _facts(made).items())
    return (
        "# A made model\n\nRandom weights whose routing is like that of trained models; made by `remoe make-model` to "
        "measure expert paging with. It writes noise, not language.\n\n"
        f"| | |\n|---|---|\n{rows}\n\nAll figures are in `made.json`. EOR is the mean share of a token's experts that "
        "the token before it chose too; teacher-forced on test text, and of the model's own greedy text.\n"
    )


def _facts(made: dict[str, Any]) -> dict[str, str]:
    shape, measured = made["shape"], made["measured"]
    forced, greedy = measured["teacher_forced"], measured["greedy"]
    facts = {
        "weights": f"{readable(made['weight_bytes'])}, {made['dtype']}, seed {made['seed']}",
        "layers x experts": f"{shape['layers']} x {shape['num_experts']}, {shape['top_k']} chosen, hidden "
        f"{shape['hidden']}, intermediate {shape['intermediate']}",
        "EOR asked for": f"{made['eor']:.3f}; chance is {forced['chance_reuse_rate']:.3f}",
        "EOR on test text": f"{forced['reuse_rate_mean']:.3f} ({_range(forced['reuse_rate_per_layer'])} by layer)",
        "LRU misses on test text": _misses(forced),
        "load CV on test text": f"{_range(forced['load_cv_per_layer'])} by layer",
    }
    if greedy is not None:
        facts["EOR of greedy decoding"] = (
            f"{greedy['reuse_rate_mean']:.3f} ({_range(greedy['reuse_rate_per_layer'])} by layer)"
        )
        facts["LRU misses of greedy decoding"] = _misses(greedy)
        facts["distinct greedy tokens"] = (
            f"{measured['distinct_tokens']:.0f} of {greedy['n_tokens'] // len(DOMAINS)}; in real text "
            f"{measured['distinct_tokens_in_text']:.0f}; the commonest is {100 * measured['most_common_share']:.1f} %"
        )
    return facts


def _misses(routing: dict[str, Any]) -> str:
    rates = ", ".join(f"{100 * rate:.0f}" for rate in routing["lru_miss_rate"].values())
    return f"{rates} % with {', '.join(f'{100 * share:g}' for share in MISS_SHARES)} % of a layer's experts"


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def _print(output: Path, made: dict[str, Any]) -> None:
    table = Table(title=str(output), show_header=False)
    for name, value in _facts(made).items():
        table.add_row(name, value)
    Console().print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="remoe make-model",
        description="Make a mid-sized mixture-of-experts checkpoint (Qwen2-MoE) with routing like that of trained "
        "models: popular and unpopular experts, and experts chosen again soon, as often as --eor says.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder; it appears when all is done")
    parser.add_argument("--size", default="2.5GiB", help="of all weights (default 2.5GiB); decides --intermediate")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024, help="a multiple of 128 (default 1024)")
    parser.add_argument("--experts", type=int, default=64, help="per layer (default 64)")
    parser.add_argument("--top-k", type=int, default=8, help="experts a token chooses (default 8)")
    parser.add_argument("--intermediate", type=int, metavar="I", help="rows of an expert; instead of --size")
    parser.add_argument("--shared-intermediate", type=int, default=64, metavar="I", help="shared expert (default 64)")
    parser.add_argument(
        "--eor",
        type=float,
        default=0.37,
        help="share of its experts that a token of real text has in common with the one before (default 0.37; in the "
        "model's own greedy text it is a little less)",
    )
    parser.add_argument("--dtype", default="bfloat16", help=f"{', '.join(DTYPES)} (default bfloat16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--check-tokens", type=int, default=128, metavar="N",
        help="greedy tokens of each of four prompts with which the finished model is measured; 0: only test text",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
