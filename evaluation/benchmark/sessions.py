"""The plan and the online controller beside the best division of memory, on the real engine.

Two workloads of real text. `mixed`: conversations with long beginnings that take turns. `changing`: the same in its first
half; in the second one-off requests with short prompts and long answers, which have no use for kept blocks. Every
division is run, the even one among them, which `remoe plan --sessions` chooses from, then the controller, starting once with
what the plan chose and once with the even one; all in every repeat, every second one backwards, and figures are medians over
repeats.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, NamedTuple

import transformers
from rich.console import Console
from rich.table import Table

from configs.checks import at_least, chosen
from configs.files import prepare, write_json
from data.pieces import document_beginnings
from evaluation.benchmark.tables import table
from evaluation.engine.cache.policies import DEFAULT
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from evaluation.engine.sessions.controller import MemoryController
from evaluation.engine.sessions.conversations import BLOCK_TOKENS, Conversations
from evaluation.engine.sessions.workload import SHARES, ChatRequest, run_once, serve_all, splits
from evaluation.report.numbers import bytes_text
from evaluation.turns import in_turn
from training.model.loading import load_tokenizer, local_folder

EVEN = 0.5
FROM_PLAN, FROM_EVEN = "controller, from the plan's choice", "controller, from even"
CONTROLLED = (FROM_PLAN, FROM_EVEN)
WORKLOADS = ("mixed", "changing")


@dataclass(frozen=True, kw_only=True)
class SessionsBenchmark:
    """Measure how near the plan and the online controller come to the best division of memory, on the real engine.

    example:
      remoe make-model --size 600MiB --output runs/models/small
      remoe bench sessions --model runs/models/small --memory-budget 300MiB --output runs/sessions.json
    """

    model: str  # folder with safetensors weights, or hub name
    memory_budget: str  # of every run
    conversations: int = 12  # how many take turns
    turns: int = 3  # of each conversation
    prefix_tokens: int = 600  # of a first prompt
    question_tokens: int = 40  # of a later turn
    max_new_tokens: int = 24  # of an answer
    block_tokens: int = BLOCK_TOKENS  # of what is kept together
    workloads: str = ",".join(WORKLOADS)  # one or both, with a comma between
    divisions: str = ",".join(map(str, SHARES))  # shares of kept blocks to run; the even one and the plan's always are
    repeats: int = 3  # of everything
    output: str | None = None  # JSON file to write everything that was measured to

    def __post_init__(self) -> None:
        at_least(self, repeats=1, turns=1)
        _ = self.workload_names, self.shares

    @property
    def workload_names(self) -> list[str]:
        return chosen(self.workloads, WORKLOADS, flag="--workloads")

    @property
    def shares(self) -> list[float]:
        return chosen(self.divisions, SHARES, flag="--divisions")


class _Run(NamedTuple):
    seconds: float
    found_tokens: int
    answers: list[list[int]]
    capacities: list[int]  # after every request, where a controller moves them
    deciding_seconds: float  # of `seconds`, what a controller took


def benchmark(options: SessionsBenchmark) -> None:
    """Make the workloads, run everything, print and write."""
    output = prepare(options.output) if options.output else None
    transformers.utils.logging.disable_progress_bar()
    model_dir = local_folder(options.model)
    result: dict[str, Any] = {"config": asdict(options), "workloads": {}}
    for name in options.workload_names:
        requests = _requests(model_dir, options, changing=name == "changing")
        result["workloads"][name] = found = _measure(model_dir, requests, options)
        Console().print(_table(name, found))
    if output:
        write_json(output, result)


def _requests(model_dir: str, options: SessionsBenchmark, *, changing: bool) -> list[ChatRequest]:
    """Conversations whose turns go on in the text they began with."""
    tokenizer, question = load_tokenizer(model_dir), options.question_tokens
    lengths = [options.prefix_tokens + turn * question for turn in range(options.turns)]
    texts = document_beginnings(
        tokenizer, "test", tokens=lengths[-1], count=options.conversations, domains=("prose", "code")
    )
    requests = [ChatRequest(text[:length], options.max_new_tokens) for length in lengths for text in texts]
    if not changing:
        return requests
    half = requests[: len(requests) // 2]
    singles = document_beginnings(tokenizer, "validation", tokens=question, count=len(requests) // 2)
    return half + [ChatRequest(text, 4 * options.max_new_tokens) for text in singles]


def _measure(model_dir: str, requests: Sequence[ChatRequest], options: SessionsBenchmark) -> dict[str, Any]:
    """Seconds of every division, of the controller, and what the plan would choose; answers must all be the same."""
    engine_options = EngineOptions(
        memory_budget=options.memory_budget,
        context_tokens=max(len(request.token_ids) + request.max_new_tokens for request in requests),
        prompt_tokens=options.block_tokens,
    )
    with load(model_dir, engine_options) as (model, engine):
        workload = run_once(model, engine, requests, block_tokens=options.block_tokens)
        planned = splits(workload, engine, policy=DEFAULT)
        assert engine.division is not None
        shared_bytes = engine.division.shared_bytes
    best_plan = min(planned, key=lambda split: split.expected_seconds)
    chosen_share = min(SHARES, key=lambda share: abs(int(share * shared_bytes) - best_plan.prefix_cache_bytes))
    divided = {str(share): share for share in sorted({*options.shares, chosen_share, EVEN})}
    starts = {**divided, FROM_PLAN: chosen_share, FROM_EVEN: EVEN}
    runs: dict[str, list[_Run]] = {name: [] for name in starts}
    for repeat in range(options.repeats):
        for name in in_turn(list(starts), repeat):
            with load(model_dir, engine_options) as (model, engine):
                kept = engine.keep_prefixes(int(shared_bytes * starts[name]))
                chat = Conversations(model, kept, block_tokens=options.block_tokens)
                one = _timed(chat, requests, MemoryController(engine, chat) if name in CONTROLLED else None)
            runs[name].append(one)
            print(f"{name}: {one.seconds:.1f} s, {one.found_tokens} prompt tokens found", file=sys.stderr)
    about = {"requests": len(requests), "shared_bytes": shared_bytes, "planned": [vars(split) for split in planned]}
    return {**about, "plan_chooses": chosen_share, **_compared(runs, chosen=str(chosen_share))}


def _compared(runs: Mapping[str, Sequence[_Run]], *, chosen: str) -> dict[str, Any]:
    """Medians, and what the plan's choice, the even division and the controller take of the best division's time."""
    medians = {name: median(one.seconds for one in repeated) for name, repeated in runs.items()}
    best = min(seconds for name, seconds in medians.items() if name not in CONTROLLED)
    answers = [one.answers for repeated in runs.values() for one in repeated]
    return {
        "seconds": {name: [one.seconds for one in repeated] for name, repeated in runs.items()},
        "median_seconds": medians,
        "controller_capacities": {name: [one.capacities for one in runs[name]] for name in CONTROLLED},
        "deciding_seconds": median(one.deciding_seconds for one in runs[FROM_PLAN]),
        "answers_equal": all(said == answers[0] for said in answers),
        "plan_over_best": medians[chosen] / best,
        "even_over_best": medians[str(EVEN)] / best,
        "controller_over_best": medians[FROM_PLAN] / best,
        "controller_over_plan": medians[FROM_PLAN] / medians[chosen],
    }


def _timed(chat: Conversations, requests: Sequence[ChatRequest], controller: MemoryController | None) -> _Run:
    """One division from a cold start; the controller may change it after every request."""
    serve_all(chat, [ChatRequest(requests[0].token_ids[:1], 2)])  # warms up; fills no block
    answers, capacities, deciding_seconds = [], [], 0.0
    started = time.perf_counter()
    for request in requests:
        answers += serve_all(chat, [request])
        if controller is not None:
            asked = time.perf_counter()
            controller.request_done()
            deciding_seconds += time.perf_counter() - asked
            capacities.append(chat.kept.capacity_bytes)
    return _Run(time.perf_counter() - started, chat.found_tokens, answers, capacities, deciding_seconds)


def _table(name: str, found: dict[str, Any]) -> Table:
    seconds, rows = found["median_seconds"], []
    for share, split in zip(SHARES, found["planned"], strict=True):
        mark = " <- plan" if share == found["plan_chooses"] else " (even)" if share == EVEN else ""
        kept = f"{share:.3g} = {bytes_text(int(share * found['shared_bytes']))}{mark}"
        measured = f"{seconds[str(share)]:.1f} s" if str(share) in seconds else "-"
        rows.append((kept, f"{split['expected_seconds']:.1f} s", measured))
    rows += [(controller, "-", f"{seconds[controller]:.1f} s") for controller in CONTROLLED]
    caption = (
        f"of the best division: plan {found['plan_over_best']:.2f}, even {found['even_over_best']:.2f}, controller "
        f"{found['controller_over_best']:.2f} (deciding took {found['deciding_seconds']:.2f} s); "
        f"answers {'equal' if found['answers_equal'] else 'DIFFER'}"
    )
    title = f"{name}: {found['requests']} requests"
    return table(title, "kept keys and values|expected|measured", rows, caption=caption)
