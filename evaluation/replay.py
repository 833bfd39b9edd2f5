"""`remoe replay`: replay a routing trace through policies and cache sizes; the rules are the engine's."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from configs.command import run
from configs.load import UserError
from evaluation.engine.accounting import Counts
from evaluation.engine.cache import SCOPES
from evaluation.engine.output import prepare, write_json
from evaluation.engine.replay import POLICIES, ReplayResult, check_choice, replay, requests_of
from evaluation.engine.route_trace import RouteTrace

EXAMPLE = """example:
  remoe replay trace.safetensors --policy lru,lfu,fifo,belady --cache-scope per_layer --slots 4,6,8,12 \\
      --output replay.json
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, replay every policy at every size, write the JSON, print a table."""
    arguments = _parser().parse_args(argv)
    output = prepare(arguments.output) if arguments.output else None
    trace = RouteTrace.read(arguments.trace)
    results = _replay_all(trace, _names(arguments.policy), scope=arguments.cache_scope, sizes=_sizes(arguments.slots))
    rows = results_json(trace, results)
    if output:
        write_json(output, {"trace": str(arguments.trace), "results": rows})
    _print_table(rows)


def results_json(trace: RouteTrace, results: Sequence[ReplayResult]) -> list[dict[str, Any]]:
    """One JSON object per result; regret against Belady where Belady ran at the same size and scope."""
    optimum = {(r.cache_scope, r.slots): r.misses for r in results if r.policy == "belady"}
    return [_result_json(trace, result, optimum.get((result.cache_scope, result.slots))) for result in results]


def _result_json(trace: RouteTrace, result: ReplayResult, optimum_misses: int | None) -> dict[str, Any]:
    return {
        "policy": result.policy,
        "cache_scope": result.cache_scope,
        "slots": result.slots,
        **_counts_json(result.total),
        "prefill": _counts_json(result.prefill),
        "decode": _counts_json(result.decode),
        "per_layer": [
            {"layer": layer, **_counts_json(counts)}
            for layer, counts in zip(trace.layer_ids, result.by_layer, strict=True)
        ],
        "bytes_read_per_token": result.bytes_read_per_token,
        "policy_regret": result.misses / optimum_misses if optimum_misses else None,
    }


def _counts_json(counts: Counts) -> dict[str, Any]:
    return {
        "accesses": counts.accesses,
        "misses": counts.misses,
        "hit_rate": counts.hit_rate,
        "first_touches": counts.first_touches,
        "misses_without_first_touches": counts.misses - counts.first_touches,
    }


def _replay_all(trace: RouteTrace, policies: Sequence[str], *, scope: str, sizes: Sequence[int]) -> list[ReplayResult]:
    for policy in policies:
        for slots in sizes:
            check_choice(trace, policy=policy, cache_scope=scope, slots=slots)
    requests = requests_of(trace)
    results = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("replaying", total=len(policies) * len(sizes))
        for policy in policies:
            for slots in sizes:
                results.append(replay(trace, policy=policy, cache_scope=scope, slots=slots, requests=requests))
                progress.advance(task)
    return results


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(number) for number in _names(text)]
    except ValueError as error:
        raise UserError(f"--slots {text!r} is not a list of whole numbers; write for example 4,6,8,12") from error
    if not sizes:
        raise UserError(f"--slots {text!r} names no size; write for example 4,6,8,12")
    return sizes


def _print_table(results: Sequence[dict[str, Any]]) -> None:
    table = Table(title="expert cache replay")
    for heading in ("policy", "scope", "slots", "accesses", "misses", "of these first", "hit rate", "regret"):
        table.add_column(heading, justify="left" if heading in ("policy", "scope") else "right")
    for result in results:
        regret = result["policy_regret"]
        table.add_row(
            result["policy"],
            result["cache_scope"],
            str(result["slots"]),
            f"{result['accesses']:,}",
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
    parser.add_argument("trace", help="routing trace (safetensors), as `remoe trace` or `--route-trace` writes it")
    parser.add_argument("--policy", default="lru,lfu,fifo,belady", help=f"comma-separated, of {', '.join(POLICIES)}")
    parser.add_argument("--cache-scope", default="per_layer", help=f"one of {', '.join(SCOPES)} (default per_layer)")
    parser.add_argument(
        "--slots", required=True, help="comma-separated sizes: slots of each layer (per_layer) or of the pool (global)"
    )
    parser.add_argument("--output", metavar="JSON", help="where to write the counts; only the table if left out")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
