"""`remoe plan`: what a memory budget is divided into for a model, and what it buys; tried on the real engine.

Sizes are measured (residents) or worked out (KV cache, activations); the time of computing and of a prompt is measured by
decoding a few tokens; misses at other sizes come from a routing trace, if one is given.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import transformers
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from configs.command import run
from configs.load import UserError
from data.corpus import read_corpus
from evaluation.engine import load
from evaluation.engine.accounting import PHASES
from evaluation.engine.bandwidth import calibrated
from evaluation.engine.conversations import BLOCK_TOKENS
from evaluation.engine.curve import LruCurve, lru_curve
from evaluation.engine.decoding import decode
from evaluation.engine.division import CONTEXT_TOKENS
from evaluation.engine.engine import Engine
from evaluation.engine.output import prepare, write_json
from evaluation.engine.policies import DEFAULT
from evaluation.engine.route_trace import RouteTrace
from evaluation.engine.store import ExpertStore
from evaluation.sessions import ChatRequest, read_requests, run_once, splits
from evaluation.wording import bytes_text
from training.model import load_tokenizer, local_folder

EXAMPLE = """examples:
  remoe plan --model data/embedded/model --memory-budget 64MiB --context-tokens 256
  remoe trace --model data/embedded/model --text-file README.md --output runs/readme.safetensors
  remoe plan --model data/embedded/model --memory-budget 64MiB --context-tokens 256 --trace runs/readme.safetensors
  remoe plan --model DIR --memory-budget 900MiB --sessions chats.jsonl    # lines: {"prompt": "...", "max_tokens": 32}
"""
PROMPT_TOKENS, NEW_TOKENS = 32, 16
"""What is decoded to learn how long computing takes."""
SHARES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Cache sizes that are shown, in parts of the one the budget buys."""


@dataclass
class PlanArguments:
    """Memory budgets that the report divides; none: no plan in it."""

    memory_budgets: list[str] = field(default_factory=list)  # for everything, for example [64MiB]
    context_tokens: int = 256  # tokens of prompt and answer to keep room for


@dataclass(frozen=True)
class Point:
    """One cache size and what it costs per decoded token."""

    slots: int
    expert_cache_bytes: int
    misses_per_token: float
    bytes_read_per_token: float
    expected_tpot_ms: float
    saved_ms_per_mib: float | None  # of the last MiB, against the next smaller size shown


def plan(
    model_dir: str,
    *,
    memory_budget: str,
    context_tokens: int,
    trace: RouteTrace | None = None,
    dtype: str = "auto",
    requests: Sequence[ChatRequest] = (),
    block_tokens: int = BLOCK_TOKENS,
) -> dict[str, Any]:
    """Divide the budget, try it, and predict other sizes.

    Args:
        requests: a workload of conversations; it is run once, and every division that could serve it is predicted.

    Raises:
        UserError: see `load` and `run_once`; a trace of another model.
    """
    with load(
        model_dir, memory_budget=memory_budget, context_tokens=context_tokens, dtype=dtype,
        prompt_tokens=block_tokens if requests else None,
    ) as (model, engine):  # fmt: skip
        if trace is not None and (trace.layers, trace.num_experts) != (engine.demand.layers, engine.demand.num_experts):
            raise UserError(
                f"the trace has {trace.layers} MoE layers of {trace.num_experts} experts, {model_dir} has "
                f"{engine.demand.layers} of {engine.demand.num_experts}; write a trace of this model with `remoe trace`"
            )
        bandwidth = calibrated(ExpertStore(model_dir).shards)
        measured = _try(model, engine, model_dir)
        assert engine.division is not None, "a memory budget was given"
        division = asdict(engine.division) | {"expert_cache_bytes": engine.division.expert_bytes}
        workload = run_once(model, engine, requests, block_tokens=block_tokens) if requests else None
        points = [] if trace is None else _points(trace, engine, measured["compute_ms"], bandwidth.bytes_per_second)
        return {
            "model": model_dir,
            "division": division,
            "demand": {**asdict(engine.demand), "token_demand_bytes": engine.token_demand_bytes},
            "read_bandwidth": asdict(bandwidth),
            "measured": measured,
            "sizes": [asdict(point) for point in points],
            "splits": [] if workload is None else [asdict(s) for s in splits(workload, engine, policy=DEFAULT)],
        }


def _try(model: PreTrainedModel, engine: Engine, model_dir: str) -> dict[str, float | None]:
    """Times of a short request on this very engine, warmed up once."""
    text = next(document.text for document in read_corpus("validation", ["prose"]))
    prompt_ids = load_tokenizer(model_dir)(text, truncation=True, max_length=PROMPT_TOKENS)["input_ids"]
    for _ in range(2):
        result = decode(model, engine, prompt_ids=prompt_ids, max_new_tokens=NEW_TOKENS)
    stall_ms = 1e3 * result.stats.stall_seconds["decode"] / max(1, result.stats.tokens["decode"])
    return {
        "prompt_tokens": len(prompt_ids),
        "ttft_ms": result.timing.ttft_ms,
        "tpot_ms": result.timing.tpot_ms,
        "stall_ms": stall_ms,
        "compute_ms": None if result.timing.tpot_ms is None else result.timing.tpot_ms - stall_ms,
    }


def _points(trace: RouteTrace, engine: Engine, compute_ms: float | None, bytes_per_second: float) -> list[Point]:
    """A global LRU at several sizes; what is read overlaps no computing in this estimate."""
    misses = _decode_misses(lru_curve(trace, cache_scope="global"))
    tokens = max(1, int((trace.phase == PHASES.index("decode")).sum()))
    points: list[Point] = []
    slots_bought = engine.cache.total_slots
    for slots in sorted(
        {min(engine.demand.all_experts, max(engine.demand.top_k, int(s * slots_bought))) for s in SHARES}
    ):
        per_token = float(misses[min(slots, len(misses) - 1)]) / tokens
        read_bytes = per_token * engine.expert_bytes
        tpot_ms = (compute_ms or 0.0) + 1e3 * read_bytes / bytes_per_second
        cache_bytes = slots * engine.demand.slot_bytes
        saved = None
        if points:
            saved = (points[-1].expected_tpot_ms - tpot_ms) / ((cache_bytes - points[-1].expert_cache_bytes) / 2**20)
        points.append(Point(slots, cache_bytes, per_token, read_bytes, tpot_ms, saved))
    return points


def _decode_misses(curve: LruCurve) -> np.ndarray:
    """Misses of decoding by number of slots."""
    misses: np.ndarray = curve.misses[PHASES.index("decode"), 0]
    return misses


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, plan, print, and write the JSON if asked."""
    arguments = _parser().parse_args(argv)
    output = prepare(arguments.output) if arguments.output else None
    trace = RouteTrace.read(arguments.trace) if arguments.trace else None
    transformers.utils.logging.disable_progress_bar()
    model_dir = local_folder(arguments.model)
    requests = read_requests(arguments.sessions, load_tokenizer(model_dir)) if arguments.sessions else []
    found = plan(
        model_dir, memory_budget=arguments.memory_budget, context_tokens=arguments.context_tokens, trace=trace,
        dtype=arguments.dtype, requests=requests, block_tokens=arguments.block_tokens,
    )  # fmt: skip
    if output:
        write_json(output, found)
    show(found, Console())


def show(found: dict[str, Any], console: Console) -> None:
    """The division, the cliff, the measured times, and the sizes around."""
    division, demand, measured = found["division"], found["demand"], found["measured"]
    table = Table("part", "memory", "why", title=f"{bytes_text(division['budget_bytes'])} for {found['model']}")
    context = f"{division['context_tokens']} tokens"
    for name, key, why in (
        ("resident weights", "resident_bytes", "attention, embeddings, routers, shared experts; measured"),
        ("read buffers", "buffer_bytes", "of the reading threads, and for experts that do not stay"),
        ("KV cache", "kv_bytes", f"its floor: {context}"),
        ("activations", "activation_bytes", f"a prompt of {context}"),
        ("expert cache", "expert_cache_bytes", f"{division['slots']} of {_all_experts(demand)} experts; what is left"),
    ):
        table.add_row(name, bytes_text(division[key]), why)
    console.print(table)
    console.print(
        f"one token uses {demand['layers']} x {demand['top_k']} experts, {bytes_text(demand['token_demand_bytes'])}: "
        f"below that a global LRU hits little while decoding{_cliff(division, demand)}"
    )
    console.print(
        f"measured: TTFT {measured['ttft_ms']:.0f} ms for {measured['prompt_tokens']} tokens, TPOT {measured['tpot_ms']:.1f} "
        f"ms, of which {measured['stall_ms']:.1f} ms waiting for reads; the device reads "
        f"{bytes_text(found['read_bandwidth']['bytes_per_second'])}/s"
    )
    if found["sizes"]:
        console.print(_sizes_table(found))
    if found["splits"]:
        console.print(_splits_table(found))


def _sizes_table(found: dict[str, Any]) -> Table:
    table = Table("expert cache", "experts", "misses/token", "read/token", "TPOT, expected", "saved per MiB")
    for point in found["sizes"]:
        saved = point["saved_ms_per_mib"]
        table.add_row(
            bytes_text(point["expert_cache_bytes"]) + (" <-" if point["slots"] == found["division"]["slots"] else ""),
            str(point["slots"]), f"{point['misses_per_token']:.1f}", bytes_text(point["bytes_read_per_token"]),
            f"{point['expected_tpot_ms']:.1f} ms", "-" if saved is None else f"{saved:.3f} ms",
        )  # fmt: skip
    return table


def _splits_table(found: dict[str, Any]) -> Table:
    table = Table(
        "kept keys and values", "experts", "prompt tokens found", "misses", "expected", title="the conversations"
    )
    best = min(found["splits"], key=lambda split: split["expected_seconds"])
    for split in found["splits"]:
        prompt_tokens = split["found_tokens"] + split["computed_tokens"]
        table.add_row(
            bytes_text(split["prefix_cache_bytes"]) + (" <-" if split is best else ""), str(split["slots"]),
            f"{split['found_tokens']:,} of {prompt_tokens:,}", f"{split['misses']:,}", f"{split['expected_seconds']:.1f} s",
        )  # fmt: skip
    table.caption = f"best: --prefix-cache {best['prefix_cache_bytes']}"
    return table


def _all_experts(demand: dict[str, Any]) -> int:
    return int(demand["layers"] * demand["num_experts"])


def _cliff(division: dict[str, Any], demand: dict[str, Any]) -> str:
    if division["expert_cache_bytes"] < demand["token_demand_bytes"]:
        return " - this budget is below it"
    return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="remoe plan",
        description="Divide a memory budget for a model: what is fixed, what experts get, and what that means for speed.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder with safetensors weights, or hub name")
    parser.add_argument("--memory-budget", required=True, metavar="SIZE", help="512MiB, 8GiB, or 25%% of the machine")
    parser.add_argument(
        "--context-tokens",
        type=int,
        default=CONTEXT_TOKENS,
        metavar="N",
        help=f"tokens of prompt and answer to keep room for (default {CONTEXT_TOKENS})",
    )
    parser.add_argument(
        "--trace", metavar="PATH", help="a routing trace of this model: adds what other sizes would cost"
    )
    parser.add_argument(
        "--sessions", metavar="JSONL", help="conversations in order of arrival: adds what they take at every division of "
        "memory between experts and kept keys and values; they are run once"
    )  # fmt: skip
    parser.add_argument(
        "--block-tokens", type=int, default=BLOCK_TOKENS, metavar="N", help=f"of a kept block (default {BLOCK_TOKENS})"
    )
    parser.add_argument("--dtype", default="auto", help="auto (as stored), bfloat16, float16 or float32")
    parser.add_argument("--output", metavar="JSON", help="where to write all numbers")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
