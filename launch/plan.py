"""`remoe plan`: what a memory budget is divided into for a model, and what it buys; tried on the real engine.

Sizes are worked out; the time of computing and of a prompt is measured by decoding a few tokens; misses at other sizes
come from a routing trace, if one is given.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from rich.console import Console
from rich.table import Table

from configs.command import parse
from configs.files import prepare, write_json
from data.pieces import document_beginnings
from evaluation.engine.cache.trace_formats import read_trace
from evaluation.engine.options import CONTEXT_TOKENS
from evaluation.engine.sessions.conversations import BLOCK_TOKENS
from evaluation.engine.sessions.plan import PROMPT_TOKENS, plan, slot_kinds
from evaluation.engine.sessions.workload import read_requests
from evaluation.report.numbers import bytes_text
from training.model.loading import load_tokenizer, local_folder


@dataclass(frozen=True)
class PlanBudget:
    """Divide a memory budget for a model: what is fixed, what experts get, and what that means for speed.

    examples:
      remoe plan --model data/embedded/model --memory-budget 64MiB --context-tokens 256
      remoe trace --model data/embedded/model --text-file README.md --output runs/readme.safetensors
      remoe plan --model data/embedded/model --memory-budget 64MiB --context-tokens 256 --trace runs/readme.safetensors
      remoe plan --model DIR --memory-budget 900MiB --sessions chats.jsonl    # lines: {"prompt": "...", "max_tokens": 32}
    """

    model: str  # folder with safetensors weights, or hub name
    memory_budget: str  # 512MiB, 8GiB, 25% of the machine, or `smallest + 10%`
    context_tokens: int = CONTEXT_TOKENS  # tokens of prompt and answer to keep room for
    trace: str | None = None  # a routing trace of this model: adds what other cache sizes would cost
    # JSONL of conversations in order of arrival, run once: adds what they would take at every division of memory between
    # experts and kept keys and values
    sessions: str | None = None
    block_tokens: int = BLOCK_TOKENS  # tokens of a kept block
    dtype: str = "auto"  # auto (as stored), bfloat16, float16 or float32
    output: str | None = None  # JSON file for all numbers


def main(argv: Sequence[str] | None = None) -> None:
    """Plan, print, and write the JSON if asked."""
    command = parse(PlanBudget, argv, prog="remoe plan")
    output = prepare(command.output) if command.output else None
    trace = read_trace(command.trace) if command.trace else None
    transformers.utils.logging.disable_progress_bar()
    model_dir = local_folder(command.model)
    tokenizer = load_tokenizer(model_dir)
    (prompt_ids,) = document_beginnings(tokenizer, "validation", tokens=PROMPT_TOKENS, count=1)
    found = plan(
        model_dir,
        prompt_ids=prompt_ids,
        memory_budget=command.memory_budget,
        context_tokens=command.context_tokens,
        trace=trace,
        dtype=command.dtype,
        requests=read_requests(command.sessions, tokenizer) if command.sessions else [],
        block_tokens=command.block_tokens,
    )
    kinds = slot_kinds(
        found, prompt_ids=prompt_ids, memory_budget=command.memory_budget, context_tokens=command.context_tokens,
        dtype=command.dtype,
    )  # fmt: skip
    found["slot_kinds"] = kinds
    if output:
        write_json(output, found)
    show(found, Console())


def show(found: dict[str, Any], console: Console) -> None:
    """The division, the cliff, the measured times, and the sizes around."""
    division, demand, measured = found["division"], found["demand"], found["measured"]
    table = Table("part", "memory", "why", title=f"{bytes_text(division['budget_bytes'])} for {found['model']}")
    context, all_experts = f"{division['context_tokens']} tokens", demand["layers"] * demand["num_experts"]
    for name, key, why in (
        ("resident weights", "resident_bytes", "attention, embeddings, routers, shared experts; worked out"),
        ("read buffers", "buffer_bytes", "of the reading threads, and for experts that do not stay"),
        ("KV cache", "kv_bytes", f"its floor: {context}"),
        ("activations", "activation_bytes", f"a prompt of {context}"),
        ("expert cache", "expert_cache_bytes", f"{division['slots']} of {all_experts} experts; what is left"),
    ):
        table.add_row(name, bytes_text(division[key]), why)
    console.print(table)
    cliff = " - this budget is below it" if division["expert_cache_bytes"] < demand["token_demand_bytes"] else ""
    console.print(
        f"one token uses {demand['layers']} x {demand['top_k']} experts, {bytes_text(demand['token_demand_bytes'])}: "
        f"below that a global LRU hits little while decoding{cliff}"
    )
    console.print(
        f"measured: TTFT {measured['ttft_ms']:.0f} ms for {measured['prompt_tokens']} tokens, TPOT {measured['tpot_ms']:.1f} "
        f"ms, of which {measured['stall_ms']:.1f} ms waiting for reads; the device reads "
        f"{bytes_text(found['read_bandwidth']['bytes_per_second'])}/s"
    )
    if found.get("slot_kinds"):
        console.print(_kinds_table(found))
    if found["sizes"]:
        console.print(_sizes_table(found))
    if found["splits"]:
        console.print(_splits_table(found))


def _kinds_table(found: dict[str, Any]) -> Table:
    """Of quantised experts."""
    table = Table("--slots", "an expert", "experts held", "TPOT", "of which reading", title="what slots hold")
    for kind in found["slot_kinds"]:
        name = kind["slot_kind"] + (" <- auto" if kind["slot_kind"] == found["slot_kind"] else "")
        if "too_small" in kind:
            table.add_row(name, "too small a budget")
            continue
        held = f"{kind['slots']} of {kind['experts']}"
        times = [f"{kind[key]:.1f} ms" for key in ("tpot_ms", "stall_ms")]
        table.add_row(name, bytes_text(kind["slot_bytes"]), held, *times)
    return table


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
