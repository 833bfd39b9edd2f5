"""`remoe replay`: what a routing trace costs under every policy and cache size; the rules are the engine's.

LRU at every size in both scopes, from one pass each; the policies at chosen sizes, each against the optimum (Belady).
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table

from configs.command import run
from configs.files import prepare, write_json
from configs.load import UserError
from evaluation.engine.cache.curve import LruCurve, curve_json, lru_curve
from evaluation.engine.cache.pool import SCOPES
from evaluation.engine.cache.replay import POLICIES, replay_all, results_json
from evaluation.engine.cache.trace import RouteTrace
from evaluation.engine.cache.trace_formats import EXTENSIONS, check_extension, read_trace, write_trace

EXAMPLE = """examples:
  remoe replay trace.safetensors                                        # LRU at every size, in both scopes
  remoe replay trace.safetensors --slots 4,6,8,12 --output replay.json  # and all policies at these sizes of each layer
  remoe replay trace.safetensors --slots 32,64 --cache-scope global --policy lru,decayed
  remoe replay chat.safetensors --slots 8 --policy static,lru --profile yesterday.safetensors
  remoe replay routed_experts.npy --num-experts 64 --expert-bytes 6291456 --slots 8    # an array saved from vLLM
  remoe replay moe_trace.csv --export trace.safetensors                                # rows of llama.cpp's moe-trace
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, read, replay every policy at every size, write the JSON, print tables."""
    arguments = _parser().parse_args(argv)
    output = prepare(arguments.output) if arguments.output else None
    if arguments.export:
        check_extension(prepare(arguments.export))
    trace = read_trace(arguments.trace, num_experts=arguments.num_experts, top_k=arguments.top_k)
    if arguments.expert_bytes is not None:
        trace = replace(trace, expert_bytes=arguments.expert_bytes)
    profile = read_trace(arguments.profile, num_experts=arguments.num_experts) if arguments.profile else None
    policies, scopes, sizes = _choices(arguments)
    if arguments.export:
        write_trace(trace, arguments.export)
    rows = results_json(trace, replay_all(trace, policies, scopes=scopes, sizes=sizes, profile=profile), policies)
    curves = [lru_curve(trace, cache_scope=scope) for scope in SCOPES]
    if output:
        curves_json = {curve.cache_scope: curve_json(trace, curve) for curve in curves}
        write_json(output, {"trace": str(arguments.trace), "results": rows, "lru_curve": curves_json})
    _print_curves(trace, {curve.cache_scope: curve for curve in curves})
    if rows:
        _print_results(rows)


def _choices(arguments: argparse.Namespace) -> tuple[list[str], list[str], list[int]]:
    """Policies, scopes and sizes."""
    policies = [policy for policy in POLICIES if policy != "static" or arguments.profile]
    if arguments.policy is not None:
        policies = _names(arguments.policy)
    if arguments.profile and "static" not in policies:
        raise UserError(f"--profile is for the policy static, and --policy is {arguments.policy}; add static to it")
    if arguments.slots is None and (arguments.policy or arguments.cache_scope or arguments.profile):
        raise UserError(
            "--policy, --cache-scope and --profile are about chosen sizes, and --slots names none; "
            "write for example --slots 4,6,8,12 (LRU at every size needs none of them)"
        )
    return policies, _names(arguments.cache_scope or "per_layer"), _sizes(arguments.slots)


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _sizes(text: str | None) -> list[int]:
    if text is None:
        return []
    try:
        sizes = [int(number) for number in _names(text)]
    except ValueError as error:
        raise UserError(f"--slots {text!r} is not a list of whole numbers; write for example 4,6,8,12") from error
    if not sizes:
        raise UserError(f"--slots {text!r} names no size; write for example 4,6,8,12")
    return sizes


def _print_curves(trace: RouteTrace, curves: dict[str, LruCurve]) -> None:
    """Both scopes at the same total sizes, from one token's experts to all, about three sizes per doubling."""
    accesses, first = (int(counts.sum()) for counts in (curves["global"].accesses, curves["global"].first_touches))
    table = Table(title=f"LRU: {accesses:,} accesses, {first:,} of them first touches", caption="misses count both")
    for heading in (
        "experts held",
        "slots of a layer",
        "misses",
        "hit rate",
        "slots of one pool",
        "misses",
        "hit rate",
    ):
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
        regret = result["policy_regret"]
        table.add_row(
            result["policy"],
            result["cache_scope"],
            f"{result['slots']:,}",
            f"{result['misses']:,}",
            f"{result['first_touches']:,}",
            f"{result['hit_rate']:.3f}",
            "-" if regret is None else f"{regret:.3f}",
        )
    Console().print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="remoe replay",
        description="Count the expert loads of a routing trace under any cache policy and size; needs no weights.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "trace", help=f"routing trace: {', '.join(EXTENSIONS)}; evaluation/engine/README.md says what they hold"
    )
    parser.add_argument(
        "--slots",
        help="comma-separated sizes for --policy: slots of each layer (per_layer) or of the one pool (global)",
    )
    parser.add_argument(
        "--policy", help=f"comma-separated, of {', '.join(POLICIES)} (default: all, static only with --profile)"
    )
    parser.add_argument("--cache-scope", help=f"comma-separated, of {', '.join(SCOPES)} (default: per_layer)")
    parser.add_argument("--profile", metavar="TRACE", help="trace whose most used experts the policy static keeps")
    parser.add_argument("--num-experts", type=int, help="experts of a layer, where the file does not say")
    parser.add_argument("--top-k", type=int, help="experts of a token in a layer, where a CSV leaves it open")
    parser.add_argument("--expert-bytes", type=int, help="bytes of one expert on disk, where the file does not say")
    parser.add_argument("--export", metavar="PATH", help="write the trace again, in the format of this extension")
    parser.add_argument("--output", metavar="JSON", help="where to write all counts; only the tables if left out")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
