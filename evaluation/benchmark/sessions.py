"""How near the plan and the online controller come to the best division of memory, on the real engine.

Two workloads of real text. `mixed`: conversations with long beginnings that take turns. `changing`: the same in its first
half; in the second one-off requests with short prompts and long answers, which have no use for kept blocks. Every
division is run, the even one among them, which `remoe plan --sessions` chooses from, then the controller, starting once with
what the plan chose and once with the even one; all in every repeat, every second one backwards, and figures are medians over
repeats.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

import transformers
from rich.console import Console
from rich.table import Table

from configs.command import run
from configs.files import prepare, write_json
from configs.load import UserError
from data.pieces import document_beginnings
from evaluation.engine import load
from evaluation.engine.cache.policies import DEFAULT
from evaluation.engine.sessions.controller import MemoryController
from evaluation.engine.sessions.conversations import BLOCK_TOKENS, Conversations
from evaluation.engine.sessions.workload import SHARES, ChatRequest, run_once, serve_all, splits
from evaluation.report.numbers import bytes_text
from training.model.loading import load_tokenizer, local_folder

EXAMPLE = """example:
  remoe make-model --size 600MiB --output runs/models/small
  python -m evaluation.benchmark.sessions --model runs/models/small --memory-budget 300MiB --output runs/sessions.json
"""
EVEN = 0.5
FROM_PLAN, FROM_EVEN = "controller, from the plan's choice", "controller, from even"
WORKLOADS = ("mixed", "changing")


class _Run(NamedTuple):
    seconds: float
    found_tokens: int
    answers: list[list[int]]
    capacities: list[int]  # after every request, where a controller moves them
    deciding_seconds: float  # of `seconds`, what a controller took


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, make the workloads, run everything, print and write."""
    arguments = _parser().parse_args(argv)
    output = prepare(arguments.output) if arguments.output else None
    if arguments.repeats < 1:
        raise UserError(f"--repeats is {arguments.repeats}; write at least 1")
    _divisions(arguments.divisions)
    workloads = [name.strip() for name in arguments.workloads.split(",")]
    if unknown := [name for name in workloads if name not in WORKLOADS]:
        raise UserError(
            f"--workloads {unknown[0]!r} is not known; write {' or '.join(WORKLOADS)}, or both with a comma"
        )
    transformers.utils.logging.disable_progress_bar()
    model_dir = local_folder(arguments.model)
    result: dict[str, Any] = {"config": vars(arguments), "workloads": {}}
    for name in workloads:
        requests = _requests(model_dir, arguments, changing=name == "changing")
        result["workloads"][name] = found = _measure(model_dir, requests, arguments)
        Console().print(_table(name, found))
    if output:
        write_json(output, result)


def _requests(model_dir: str, arguments: argparse.Namespace, *, changing: bool) -> list[ChatRequest]:
    """Conversations whose turns go on in the text they began with."""
    turns, question = arguments.turns, arguments.question_tokens
    tokens = arguments.prefix_tokens + (turns - 1) * question
    tokenizer = load_tokenizer(model_dir)
    texts = document_beginnings(
        tokenizer, "test", tokens=tokens, count=arguments.conversations, domains=("prose", "code")
    )
    requests = [
        ChatRequest(text[: arguments.prefix_tokens + turn * question], arguments.max_new_tokens)
        for turn in range(turns)
        for text in texts
    ]
    if not changing:
        return requests
    half = requests[: len(requests) // 2]
    singles = document_beginnings(tokenizer, "validation", tokens=question, count=len(requests) // 2)
    return half + [ChatRequest(text, 4 * arguments.max_new_tokens) for text in singles]


def _measure(model_dir: str, requests: Sequence[ChatRequest], arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every division, of the controller, and what the plan would choose; answers must all be the same."""
    context = max(len(request.token_ids) + request.max_new_tokens for request in requests)
    options = {
        "memory_budget": arguments.memory_budget,
        "context_tokens": context,
        "prompt_tokens": arguments.block_tokens,
    }
    with load(model_dir, **options) as (model, engine):
        workload = run_once(model, engine, requests, block_tokens=arguments.block_tokens)
        planned = splits(workload, engine, policy=DEFAULT)
        assert engine.division is not None
        shared_bytes = engine.division.shared_bytes
    best_plan = min(planned, key=lambda split: split.expected_seconds)
    chosen = min(SHARES, key=lambda share: abs(int(share * shared_bytes) - best_plan.prefix_cache_bytes))
    shares = sorted({*_divisions(arguments.divisions), chosen, EVEN})
    starts = {**{str(share): share for share in shares}, FROM_PLAN: chosen, FROM_EVEN: EVEN}
    runs: dict[str, list[_Run]] = {name: [] for name in starts}
    for repeat in range(arguments.repeats):
        for name in reversed(runs) if repeat % 2 else runs:  # a machine that grows slower favours none
            kept_bytes = int(shared_bytes * starts[name])
            one = _timed(model_dir, requests, options, kept_bytes=kept_bytes, controlled=name in (FROM_PLAN, FROM_EVEN))
            runs[name].append(one)
            print(f"{name}: {one.seconds:.1f} s, {one.found_tokens} prompt tokens found", file=sys.stderr)
    medians = {name: median(one.seconds for one in repeated) for name, repeated in runs.items()}
    answers = [one.answers for repeated in runs.values() for one in repeated]
    best = min(medians[str(share)] for share in shares)
    return {
        "requests": len(requests), "shared_bytes": shared_bytes,
        "seconds": {name: [one.seconds for one in repeated] for name, repeated in runs.items()},
        "median_seconds": medians, "planned": [vars(split) for split in planned], "plan_chooses": chosen,
        "controller_capacities": {name: [one.capacities for one in runs[name]] for name in (FROM_PLAN, FROM_EVEN)},
        "deciding_seconds": median(one.deciding_seconds for one in runs[FROM_PLAN]),
        "answers_equal": all(said == answers[0] for said in answers),
        "plan_over_best": medians[str(chosen)] / best, "even_over_best": medians[str(EVEN)] / best,
        "controller_over_best": medians[FROM_PLAN] / best,
        "controller_over_plan": medians[FROM_PLAN] / medians[str(chosen)],
    }  # fmt: skip


def _divisions(names: str) -> list[float]:
    """Of `SHARES`, those that are named."""
    shares = []
    for name in names.split(","):
        try:
            shares.append(SHARES[SHARES.index(float(name))])
        except ValueError:
            known = ",".join(map(str, SHARES))
            raise UserError(f"--divisions {name.strip()!r} is not known; write some of {known}") from None
    return shares


def _timed(
    model_dir: str, requests: Sequence[ChatRequest], options: dict[str, Any], *, kept_bytes: int, controlled: bool
) -> _Run:
    """One division, which the controller may change if `controlled`, from a cold start."""
    with load(model_dir, **options) as (model, engine):
        kept = engine.keep_prefixes(kept_bytes)
        chat = Conversations(model, kept, block_tokens=options["prompt_tokens"])
        controller = MemoryController(engine, chat) if controlled else None
        serve_all(chat, [ChatRequest(requests[0].token_ids[:1], 2)])  # warms up; fills no block
        answers, capacities, deciding_seconds = [], [], 0.0
        started = time.perf_counter()
        for request in requests:
            answers += serve_all(chat, [request])
            if controller is not None:
                asked = time.perf_counter()
                controller.request_done()
                deciding_seconds += time.perf_counter() - asked
                capacities.append(kept.capacity_bytes)
        return _Run(time.perf_counter() - started, chat.found_tokens, answers, capacities, deciding_seconds)


def _table(name: str, found: dict[str, Any]) -> Table:
    table = Table("kept keys and values", "expected", "measured", title=f"{name}: {found['requests']} requests")
    for share, split in zip(SHARES, found["planned"], strict=True):
        mark = " <- plan" if share == found["plan_chooses"] else " (even)" if share == EVEN else ""
        table.add_row(
            f"{share:.3g} = {bytes_text(int(share * found['shared_bytes']))}{mark}", f"{split['expected_seconds']:.1f} s",
            f"{found['median_seconds'][str(share)]:.1f} s" if str(share) in found["median_seconds"] else "-",
        )  # fmt: skip
    for controller in (FROM_PLAN, FROM_EVEN):
        table.add_row(controller, "-", f"{found['median_seconds'][controller]:.1f} s")
    table.caption = (
        f"of the best division: plan {found['plan_over_best']:.2f}, even {found['even_over_best']:.2f}, controller "
        f"{found['controller_over_best']:.2f} (deciding took {found['deciding_seconds']:.2f} s); "
        f"answers {'equal' if found['answers_equal'] else 'DIFFER'}"
    )
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.benchmark.sessions", description=__doc__, epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", required=True, help="folder with safetensors weights, or hub name")
    parser.add_argument("--memory-budget", required=True, metavar="SIZE", help="of every run")
    parser.add_argument("--conversations", type=int, default=12, metavar="N", help="default 12")
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="of each conversation (default 3)")
    parser.add_argument("--prefix-tokens", type=int, default=600, metavar="N", help="of a first prompt (default 600)")
    parser.add_argument("--question-tokens", type=int, default=40, metavar="N", help="of a later turn (default 40)")
    parser.add_argument("--max-new-tokens", type=int, default=24, metavar="N", help="of an answer (default 24)")
    parser.add_argument("--block-tokens", type=int, default=BLOCK_TOKENS, metavar="N", help=f"default {BLOCK_TOKENS}")
    parser.add_argument(
        "--workloads", default=",".join(WORKLOADS), metavar="NAMES", help=f"default {','.join(WORKLOADS)}"
    )
    parser.add_argument(
        "--divisions", default=",".join(map(str, SHARES)), metavar="SHARES",
        help="shares of kept blocks to run; the even one and the plan's choice always are (default: all)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="of everything (default 3)")
    parser.add_argument("--output", metavar="JSON", help="where to write everything that was measured")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
