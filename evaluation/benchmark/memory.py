"""Whether a memory budget is kept: random budgets, contexts and batches, each in a memory group hardly larger.

Every trial is a process that loads the model under a random budget and serves one random request. Its group may hold what
the process held before it loaded anything, and the budget with three percent on top, page cache included; the kernel
kills what needs more. What is reported is the peak of private memory (RssAnon), sampled from outside, less what was held
before, as a share of the budget.
"""

import argparse
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import IO, Any

import psutil
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from configs.command import run
from configs.files import prepare, write_json
from configs.load import UserError
from evaluation.benchmark.memory_group import Hierarchy, MemoryGroup, find_hierarchy
from evaluation.benchmark.processes import PROJECT
from evaluation.benchmark.weights import expert_modules
from evaluation.report.numbers import bytes_text
from training.model.loading import local_folder

EXAMPLE = """example:
  remoe make-model --output runs/models/mid
  python -m evaluation.benchmark.memory --model runs/models/mid --trials 50 --output runs/memory.json
"""
MODULE = "evaluation.benchmark.sides.memory_trial"
TOLERANCE = 0.03
SHARES = (0.15, 0.7)  # of the whole model: budgets are drawn between
SAMPLE_SECONDS = 0.005
NEW_TOKENS = 4
MOST_BATCH = 6
LEAST_CONTEXT = 16
MOST_REFUSALS = 10  # before anything was served


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
        """Of the budget that was held at the peak."""
        return (self.peak_bytes - self.before_bytes) / self.budget_bytes


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, draw, run, print and write; ends with an error if a budget was not kept."""
    arguments = _parser().parse_args(argv)
    output = prepare(arguments.output) if arguments.output else None
    if arguments.trials < 1 or arguments.threads < 1:
        raise UserError(f"--trials {arguments.trials} --threads {arguments.threads}: write at least 1 each")
    if arguments.most_tokens < MOST_BATCH * LEAST_CONTEXT:
        raise UserError(
            f"--most-tokens {arguments.most_tokens} is too few; write at least {MOST_BATCH * LEAST_CONTEXT}"
        )
    hierarchy = find_hierarchy()
    if hierarchy is None:
        raise UserError(
            "this needs a memory controller (cgroup v1 or v2) in which this user may make groups, and there is none; run "
            "as root on a machine that has it"
        )
    model_dir = local_folder(arguments.model)
    outcomes = _trials(model_dir, arguments, hierarchy)
    served = [one for one in outcomes if one.outcome == "served"]
    result = {
        "config": vars(arguments), "served": len(served), "refused": sum(one.outcome == "refused" for one in outcomes),
        "most_share": max((one.share for one in served), default=None),
        "trials": [{**asdict(one), "share": one.share} for one in outcomes],
    }  # fmt: skip
    if output:
        write_json(output, result)
    Console().print(_table(outcomes))
    broken = [one for one in outcomes if one.outcome not in ("served", "refused") or one.share > 1 + TOLERANCE]
    if broken:
        raise UserError(f"{len(broken)} of {len(outcomes)} budgets were not kept, for example {broken[0]}")


def _trials(model_dir: str, arguments: argparse.Namespace, hierarchy: Hierarchy) -> list[Outcome]:
    """Until so many requests as asked for were served; a budget that is refused as too small counts for nothing."""
    modules, other_bytes = expert_modules(model_dir)
    model_bytes = other_bytes + sum(modules.values())
    draw = random.Random(arguments.seed)
    outcomes: list[Outcome] = []
    with tqdm(total=arguments.trials, unit="trial") as progress:
        while progress.n < arguments.trials:
            batch = draw.randint(1, MOST_BATCH)
            most = arguments.most_tokens // batch
            trial = {
                "model_dir": model_dir, "batch": batch, "memory_budget": int(model_bytes * draw.uniform(*SHARES)),
                "context_tokens": int(math.exp(draw.uniform(math.log(LEAST_CONTEXT), math.log(most)))),
                "new_tokens": NEW_TOKENS, "seed": len(outcomes), "threads": arguments.threads,
            }  # fmt: skip
            outcomes.append(one_trial(trial, hierarchy))
            if len(outcomes) >= MOST_REFUSALS and not progress.n and outcomes[-1].outcome == "refused":
                raise UserError(
                    f"{len(outcomes)} budgets in a row were refused, so this model is too small: {outcomes[-1].why}"
                )
            progress.update(outcomes[-1].outcome != "refused")
            progress.set_postfix(most=f"{max(one.share for one in outcomes):.1%}")
    return outcomes


def one_trial(trial: dict[str, Any], hierarchy: Hierarchy) -> Outcome:
    """Run one trial in a group of its own; never raises for what happens inside."""
    with ExitStack() as stack:
        group = stack.enter_context(MemoryGroup(hierarchy, None))
        command = group.command([sys.executable, "-m", MODULE, json.dumps(trial)])
        pipe = subprocess.PIPE
        process = stack.enter_context(
            subprocess.Popen(command, cwd=PROJECT, text=True, stdin=pipe, stdout=pipe, stderr=pipe)
        )
        assert process.stdin and process.stdout and process.stderr, "all three are pipes"  # noqa: PT018
        first = process.stdout.readline()
        if not first:
            why = process.stderr.read()[-500:]
            return Outcome(
                trial["memory_budget"],
                trial["context_tokens"],
                trial["batch"],
                "failed",
                before_bytes=0,
                peak_bytes=0,
                why=why,
            )
        held = json.loads(first)["private_bytes"]
        watched = psutil.Process(process.pid)
        libraries_bytes = watched.memory_info().shared
        group.limit(libraries_bytes + held + int((1 + TOLERANCE) * trial["memory_budget"]))
        process.stdin.write("\n")
        process.stdin.flush()
        peak_bytes = _watch(process, watched)
        said = _last_line(process.stdout) or {
            "outcome": "killed" if group.was_killed else "failed", "why": process.stderr.read()[-500:],
        }  # fmt: skip
        return Outcome(
            budget_bytes=trial["memory_budget"], context_tokens=trial["context_tokens"], batch=trial["batch"],
            before_bytes=held, peak_bytes=peak_bytes, **said,
        )  # fmt: skip


def _watch(process: "subprocess.Popen[str]", watched: psutil.Process) -> int:
    """The most private memory until the process ends."""
    peak_bytes = 0
    while process.poll() is None:
        try:
            info = watched.memory_info()
        except psutil.NoSuchProcess:
            break
        peak_bytes = max(peak_bytes, info.rss - info.shared)
        time.sleep(SAMPLE_SECONDS)
    return peak_bytes


def _last_line(stream: IO[str]) -> dict[str, Any] | None:
    lines = stream.read().strip().splitlines()
    return json.loads(lines[-1]) if lines else None


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table("budget", "batch x context", "slots", "peak / budget", "outcome", title="memory budgets")
    for one in sorted(outcomes, key=lambda one: -one.share):
        table.add_row(
            bytes_text(one.budget_bytes), f"{one.batch} x {one.context_tokens}", str(one.slots or "-"),
            f"{one.share:.1%}" if one.outcome != "refused" else "-", one.outcome,
        )  # fmt: skip
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.benchmark.memory", description=__doc__, epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", required=True, help="folder with safetensors weights, or hub name")
    parser.add_argument("--trials", type=int, default=50, metavar="N", help="requests to serve (default 50)")
    parser.add_argument("--most-tokens", type=int, default=2048, metavar="N", help="batch x context (default 2048)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of every process (default 1)")
    parser.add_argument("--output", metavar="JSON", help="where to write every trial")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
