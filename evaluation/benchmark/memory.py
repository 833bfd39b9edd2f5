"""Memory budgets that are kept or not: random budgets, contexts and batches, each in a memory group hardly larger.

Every trial is a process that loads the model under a random budget and serves one random request. Its group may hold what
the process held before it loaded anything, and the budget with three percent on top, page cache included; the kernel
kills what needs more. The figure is the peak of private memory (RssAnon), sampled from outside, less what was held
before, as a share of the budget.
"""

import json
import math
import random
import subprocess
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import psutil
from rich.console import Console
from tqdm import tqdm

from configs.checks import at_least
from configs.files import prepare, write_json
from configs.load import UserError
from evaluation.benchmark.memory_group import NO_CONTROLLER, Hierarchy, MemoryGroup, find_hierarchy
from evaluation.benchmark.processes import Child
from evaluation.benchmark.sides.memory_trial import Trial
from evaluation.benchmark.tables import table
from evaluation.engine.store.experts import ExpertStore
from evaluation.report.numbers import bytes_text
from training.model.loading import local_folder

MODULE = "evaluation.benchmark.sides.memory_trial"
TOLERANCE = 0.03
SHARES = (0.15, 0.7)  # of the whole model: budgets are drawn between
SAMPLE_SECONDS = 0.005
NEW_TOKENS = 4
MOST_BATCH = 6
LEAST_CONTEXT = 16
MOST_REFUSALS = 10  # before anything was served


@dataclass(frozen=True, kw_only=True)
class MemoryBenchmark:
    """Measure whether memory budgets are kept, with random budgets, contexts and batches.

    example:
      remoe make-model --output runs/models/mid
      remoe bench memory --model runs/models/mid --trials 50 --output runs/memory.json
    """

    model: str  # folder with safetensors weights, or hub name
    trials: int = 50  # requests to serve
    most_tokens: int = 2048  # batch x context
    seed: int = 0  # decides what is drawn
    threads: int = 1  # of every process
    output: str | None = None  # JSON file to write every trial to

    def __post_init__(self) -> None:
        at_least(self, trials=1, threads=1, most_tokens=MOST_BATCH * LEAST_CONTEXT)


@dataclass(frozen=True)
class Outcome:
    """One trial. `outcome` is served, refused (before anything was computed), killed or failed."""

    budget_bytes: int
    context_tokens: int
    batch: int
    outcome: str
    before_bytes: int
    peak_bytes: int
    slots: int | None = None
    why: str | None = None

    @property
    def share(self) -> float:
        """The part of the budget that was held at the peak."""
        return (self.peak_bytes - self.before_bytes) / self.budget_bytes

    @property
    def kept(self) -> bool:
        """Nothing was killed and nothing failed, and the peak was within the tolerance."""
        return self.outcome in ("served", "refused") and self.share <= 1 + TOLERANCE


def benchmark(options: MemoryBenchmark) -> None:
    """Draw trials, run them, print and write; a `UserError` if a budget was not kept or no group can be made."""
    output = prepare(options.output) if options.output else None
    hierarchy = find_hierarchy()
    if hierarchy is None:
        raise UserError(f"this {NO_CONTROLLER}")
    outcomes = _trials(options, hierarchy)
    served = [one for one in outcomes if one.outcome == "served"]
    result = {
        "config": asdict(options),
        "served": len(served),
        "refused": sum(one.outcome == "refused" for one in outcomes),
        "most_share": max((one.share for one in served), default=None),
        "trials": [{**asdict(one), "share": one.share} for one in outcomes],
    }
    if output:
        write_json(output, result)
    rows = [
        (
            bytes_text(one.budget_bytes), f"{one.batch} x {one.context_tokens}", str(one.slots or "-"),
            f"{one.share:.1%}" if one.outcome != "refused" else "-", one.outcome,
        )
        for one in sorted(outcomes, key=lambda one: -one.share)
    ]  # fmt: skip
    Console().print(table("memory budgets", "budget|batch x context|slots|peak / budget|outcome", rows))
    broken = [one for one in outcomes if not one.kept]
    if broken:
        raise UserError(f"{len(broken)} of {len(outcomes)} budgets were not kept, for example {broken[0]}")


def _trials(options: MemoryBenchmark, hierarchy: Hierarchy) -> list[Outcome]:
    """Run trials until as many requests as asked for were served; a budget refused as too small does not count."""
    model_dir = local_folder(options.model)
    store = ExpertStore(model_dir)
    model_bytes = store.resident_bytes + store.all_experts_bytes
    draw = random.Random(options.seed)
    outcomes: list[Outcome] = []
    with tqdm(total=options.trials, unit="trial") as progress:
        while progress.n < options.trials:
            batch, budget = draw.randint(1, MOST_BATCH), int(model_bytes * draw.uniform(*SHARES))
            # every order of magnitude of a context is equally likely
            context = int(math.exp(draw.uniform(math.log(LEAST_CONTEXT), math.log(options.most_tokens // batch))))
            trial = Trial(model_dir, budget, batch, context, NEW_TOKENS, seed=len(outcomes), threads=options.threads)
            outcomes.append(one_trial(trial, hierarchy))
            if len(outcomes) >= MOST_REFUSALS and not progress.n and outcomes[-1].outcome == "refused":
                raise UserError(
                    f"{len(outcomes)} budgets in a row were refused, so this model is too small: {outcomes[-1].why}"
                )
            progress.update(outcomes[-1].outcome != "refused")
            progress.set_postfix(most=f"{max(one.share for one in outcomes):.1%}")
    return outcomes


def one_trial(trial: Trial, hierarchy: Hierarchy) -> Outcome:
    """Run one trial in a group of its own; never raises for what happens inside."""
    with MemoryGroup(hierarchy, None) as group, Child(MODULE, json.dumps(asdict(trial)), group=group) as child:
        before_bytes = peak_bytes = 0
        if first := child.line():
            before_bytes = json.loads(first)["private_bytes"]
            watched = psutil.Process(child.process.pid)
            libraries_bytes = watched.memory_info().shared
            group.limit(libraries_bytes + before_bytes + int((1 + TOLERANCE) * trial.memory_budget))
            child.nudge()
            peak_bytes = _watch(child.process, watched)
        last = child.line()
        child.wait()
        ended = {"outcome": "killed" if group.was_killed else "failed", "why": child.last_words}
        said: dict[str, Any] = json.loads(last) if last else ended
    return Outcome(
        trial.memory_budget, trial.context_tokens, trial.batch, before_bytes=before_bytes, peak_bytes=peak_bytes, **said
    )


def _watch(process: "subprocess.Popen[str]", watched: psutil.Process) -> int:
    """The most private memory until the process ends."""
    peak_bytes = 0
    with suppress(psutil.NoSuchProcess):
        while process.poll() is None:
            info = watched.memory_info()
            peak_bytes = max(peak_bytes, info.rss - info.shared)
            time.sleep(SAMPLE_SECONDS)
    return peak_bytes
