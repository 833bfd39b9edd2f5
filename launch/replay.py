"""`remoe replay`: what a routing trace costs under every policy and cache size; the rules are the engine's.

LRU at every size in both scopes, from one pass each; the policies at chosen sizes, each against the optimum (Belady).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from configs.checks import at_least, whole_numbers, words
from configs.command import parse
from configs.files import prepare, write_json
from configs.load import UserError
from evaluation.engine.cache.curve import LruCurve, curve_json, lru_curve
from evaluation.engine.cache.pool import SCOPES
from evaluation.engine.cache.replay import POLICIES, replay_all, results_json
from evaluation.engine.cache.trace import RouteTrace
from evaluation.engine.cache.trace_formats import check_extension, read_trace, write_trace

HEADINGS = ("experts held", "slots of a layer", "misses", "hit rate", "slots of one pool", "misses", "hit rate")


@dataclass(frozen=True)
class Replay:
    """Count the expert loads of a routing trace under any cache policy and size; needs no weights.

    examples:
      remoe replay trace.safetensors                                        # LRU at every size, in both scopes
      remoe replay trace.safetensors --slots 4,6,8,12 --output replay.json  # and all policies at these sizes of each layer
      remoe replay trace.safetensors --slots 32,64 --cache-scope global --policy lru,decayed
      remoe replay chat.safetensors --slots 8 --policy static,lru --profile yesterday.safetensors
      remoe replay routed_experts.npy --num-experts 64 --expert-bytes 6291456 --slots 8    # an array saved from vLLM
      remoe replay moe_trace.csv --export trace.safetensors                                # rows of llama.cpp's moe-trace
    """

    trace: tyro.conf.Positional[str]  # .safetensors, .npz, .npy or .csv, as evaluation/engine/cache/README.md says
    slots: str | None = None  # sizes for --policy, as 4,6,8: slots of each layer (per_layer) or of one pool (global)
    policy: str | None = None  # of lru, lfu, lfru, decayed, fifo, static and belady, as lru,decayed; left out: all
    cache_scope: str | None = None  # per_layer, global, or both as per_layer,global; left out: per_layer
    profile: str | None = None  # trace whose most used experts the policy static keeps
    num_experts: int | None = None  # experts of a layer, where the file does not say
    top_k: int | None = None  # experts of a token in a layer, where a CSV leaves it open
    expert_bytes: int | None = None  # bytes of one expert on disk, where the file does not say
    export: str | None = None  # write the trace again, in the format of this name's ending
    output: str | None = None  # JSON file for all counts; left out: only the tables

    def __post_init__(self) -> None:
        at_least(self, num_experts=1, top_k=1, expert_bytes=1)
        if self.profile and self.policy and "static" not in words(self.policy):
            raise UserError(f"--profile is for the policy static, and --policy is {self.policy}; add static to it")
        if self.slots is None and (self.policy or self.cache_scope or self.profile):
            raise UserError(
                "--policy, --cache-scope and --profile are about chosen sizes, and --slots names none; "
                "write for example --slots 4,6,8,12 (LRU at every size needs none of them)"
            )

    @property
    def policies(self) -> list[str]:
        return words(self.policy or "") or [policy for policy in POLICIES if policy != "static" or self.profile]

    @property
    def sizes(self) -> list[int]:
        return [] if self.slots is None else whole_numbers(self.slots, flag="--slots", example="4,6,8,12")


def main(argv: Sequence[str] | None = None) -> None:
    """Read, replay every policy at every size, write the JSON, print tables."""
    command = parse(Replay, argv, prog="remoe replay")
    scopes, sizes = words(command.cache_scope or "per_layer"), command.sizes
    output = prepare(command.output) if command.output else None
    if command.export:
        check_extension(prepare(command.export))
    trace = read_trace(command.trace, num_experts=command.num_experts, top_k=command.top_k)
    if command.expert_bytes is not None:
        trace = replace(trace, expert_bytes=command.expert_bytes)
    profile = read_trace(command.profile, num_experts=command.num_experts) if command.profile else None
    if command.export:
        write_trace(trace, command.export)
    replays = replay_all(trace, command.policies, scopes=scopes, sizes=sizes, profile=profile)
    rows = results_json(trace, replays, command.policies)
    curves = {scope: lru_curve(trace, cache_scope=scope) for scope in SCOPES}
    if output:
        curves_json = {scope: curve_json(trace, curve) for scope, curve in curves.items()}
        write_json(output, {"trace": str(command.trace), "results": rows, "lru_curve": curves_json})
    _print_curves(trace, curves)
    if rows:
        _print_results(rows)


def _print_curves(trace: RouteTrace, curves: dict[str, LruCurve]) -> None:
    """Both scopes at the same total sizes, from one token's experts to all, about three sizes per doubling."""
    accesses, first = (int(counts.sum()) for counts in (curves["global"].accesses, curves["global"].first_touches))
    table = Table(title=f"LRU: {accesses:,} accesses, {first:,} of them first touches", caption="misses count both")
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    per_layer, one_pool = (curves[scope].misses.sum(axis=(0, 1)) for scope in ("per_layer", "global"))
    for slots in _spread(trace.top_k, trace.num_experts):
        cells = [f"{slots / trace.num_experts:.0%}"]
        for size, misses in ((slots, per_layer[slots]), (slots * trace.layers, one_pool[slots * trace.layers])):
            cells += [f"{size:,}", f"{misses:,}", f"{1 - misses / accesses:.3f}"]
        table.add_row(*cells)
    Console().print(table)


def _spread(smallest: int, largest: int) -> list[int]:
    sizes = [smallest]
    while sizes[-1] < largest:
        sizes.append(min(max(sizes[-1] + 1, round(sizes[-1] * 2 ** (1 / 3))), largest))
    return sizes


def _print_results(results: Sequence[dict[str, Any]]) -> None:
    table = Table(title="policies", caption="regret: misses / misses of the optimum (Belady)")
    for heading in ("policy", "scope", "slots", "misses", "of these first", "hit rate", "regret"):
        table.add_column(heading, justify="left" if heading in ("policy", "scope") else "right")
    for result in results:
        counts = [f"{result[name]:,}" for name in ("slots", "misses", "first_touches")]
        regret = "-" if result["policy_regret"] is None else f"{result['policy_regret']:.3f}"
        table.add_row(result["policy"], result["cache_scope"], *counts, f"{result['hit_rate']:.3f}", regret)
    Console().print(table)
