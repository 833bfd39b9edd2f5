"""`remoe bench-train`: our trainer beside transformers' own, on the same rows, training the same routers.

Every side runs in processes of its own, all loaded at once, and they take turns step by step, as the speed of a shared
machine changes from one second to the next. The opponent computes the task loss alone, with each
stock experts_implementation that is named; ours computes the config's objective with every ramp at its end.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from configs.command import run
from configs.load import UserError, dump, load, write_whole
from evaluation.benchmark.sides.training_side import OURS, READY, Measured, Order
from training.arguments import TrainArguments

EXAMPLE = """example:
  remoe make-model --output runs/models/train100m --layers 8 --hidden 256 --intermediate 256 --dtype float32 --check-tokens 0
  remoe bench-train configs/train/bench.yaml --output runs/bench_train.json

All sides are loaded at once and take turns step by step; the speed ratio is the median over steps of the same turn.
Memory is what a process held at its peak above what it held before the first step: on CPU resident memory, on an
accelerator what torch allocated. The bound is twice the forward pass's matrix products (forward, and gradients of
inputs) at the rate of large matrix products, measured in each process.
"""
PROJECT = Path(__file__).parents[1]
STOCK = ("grouped_mm", "batched_mm", "eager")

Runs = Mapping[str, Sequence[Measured]]


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, let the sides take turns, compare, write and print."""
    arguments = _parser().parse_intermixed_args(argv)
    stock = [name.strip() for name in arguments.stock.split(",") if name.strip()]
    _check(stock, arguments)
    config = load(TrainArguments, arguments.config, [*arguments.overrides, f"max_steps={arguments.steps + 1}"])
    config = replace(
        config, report_to="none", resume_from_checkpoint=None, reuse_warmup_steps=0, consistency_warmup_steps=0
    )
    runs = take_turns([OURS, *stock], config, repeats=arguments.repeats, threads=arguments.threads)
    result = compare(runs)
    if arguments.output:
        result["config"], result["threads"] = asdict(config), arguments.threads
        write_whole(Path(arguments.output), json.dumps(result, indent=2) + "\n")
    Console(width=max(110, Console().width)).print(table(result))


def _check(stock: Sequence[str], arguments: argparse.Namespace) -> None:
    unknown = sorted(set(stock) - set(STOCK))
    if unknown or not stock:
        raise UserError(f"--stock {arguments.stock!r}: write one or more of {', '.join(STOCK)}, with commas between")
    for flag in ("steps", "repeats", "threads"):
        if getattr(arguments, flag) < 1:
            raise UserError(f"--{flag} is {getattr(arguments, flag)}; write at least 1")


def take_turns(
    sides: Sequence[str], config: TrainArguments, *, repeats: int, threads: int
) -> dict[str, list[Measured]]:
    """New processes in every repeat, loaded one after the other; in every round of steps another side begins.

    Raises:
        UserError: a process failed; with what it said last.
    """
    runs: dict[str, list[Measured]] = {side: [] for side in sides}
    with (
        tempfile.TemporaryDirectory() as name,
        tqdm(total=repeats * len(sides) * config.max_steps, unit="step") as progress,
    ):
        for repeat in range(repeats):
            folder = Path(name) / str(repeat)
            folder.mkdir()
            with ExitStack() as stack:
                started = [stack.enter_context(_Side(side, config, folder, threads)) for side in sides]
                for step in range(config.max_steps):
                    for i in range(len(started)):
                        started[(step + i) % len(started)].take_step()
                        progress.update()
                for side in started:
                    runs[side.name].append(side.measured())
    return runs


class _Side:
    """A process that has loaded its model and waits for its turns; it takes as many steps as the config has."""

    def __init__(self, name: str, config: TrainArguments, folder: Path, threads: int) -> None:
        self.name, self._errors, self._last = name, folder / f"{name}.err", ""
        self._left = config.max_steps
        path = folder / f"{name}.yaml"
        dump(replace(config, output_dir=str(folder / name), run_name=name), path)
        order = json.dumps(asdict(Order(name, str(path), threads)))
        with self._errors.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "evaluation.benchmark.sides.training_side", order],
                cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip
        self._wait()

    def __enter__(self) -> "_Side":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def take_step(self) -> None:
        """Returns when the step is done; after the last one, when the process has ended."""
        assert self._process.stdin is not None
        self._left -= 1
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self._wait()

    def measured(self) -> Measured:
        """What the process said at its end."""
        return Measured(**json.loads(self._last))

    def _wait(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() == READY:
                return
            self._last = line
        code = self._process.wait()
        if code or self._left:
            self._process.communicate()
            said = self._errors.read_text(encoding="utf-8").strip().splitlines()
            last = said[-1] if said else "nothing on standard error"
            raise UserError(f"side {self.name} ended with exit code {code}: {last.removeprefix('error: ')}")


def compare(runs: Runs) -> dict[str, Any]:
    """Each side's figures, and ours beside the stock side that is fastest.

    `speed_ratio` is tokens per second of ours / of the fastest stock side: the median over a repeat's steps, one value
    for each repeat and their median; `memory_ratio` peak memory above the model likewise.
    """
    ours, others = runs[OURS], {side: runs[side] for side in runs if side != OURS}
    fastest = min(others, key=lambda side: median(_step_seconds(one) for one in others[side]))
    pairs = list(zip(ours, others[fastest], strict=True))
    speed = [
        median(b / a for a, b in zip(mine.step_seconds[1:], theirs.step_seconds[1:], strict=True))
        for mine, theirs in pairs
    ]
    memory = [mine.peak_bytes / theirs.peak_bytes for mine, theirs in pairs]
    return {
        "sides": {side: _summary(measured) for side, measured in runs.items()},
        "fastest_stock": fastest,
        "speed_ratio": {"median": median(speed), "each": speed},
        "memory_ratio": {"median": median(memory), "each": memory},
        "runs": {side: [asdict(one) for one in measured] for side, measured in runs.items()},
    }


def _step_seconds(measured: Measured) -> float:
    return median(measured.step_seconds[1:])  # the first one warms up


def _summary(measured: Sequence[Measured]) -> dict[str, float]:
    seconds = [_step_seconds(one) for one in measured]
    return {
        "step_seconds": median(seconds),
        "step_seconds_min": min(seconds),
        "step_seconds_max": max(seconds),
        "tokens_per_second": measured[0].tokens_per_step / median(seconds),
        "peak_bytes": median(one.peak_bytes for one in measured),
        "model_bytes": median(one.model_bytes for one in measured),
        "loss_at_step_1": measured[0].losses[0],
        "bound_share": median(
            2 * one.forward_flop_per_step / one.matrix_flop_per_second / _step_seconds(one) for one in measured
        ),
    }


def table(result: Mapping[str, Any]) -> Table:
    """The figures for a terminal."""
    fastest = result["fastest_stock"]
    made = Table(
        title="Training routers: ours beside transformers' Trainer",
        caption=f"ours / {fastest}: {_ratio(result['speed_ratio'])} the tokens per second, "
        f"{_ratio(result['memory_ratio'])} the memory above the model",
        caption_justify="left",
    )
    made.add_column("side")
    for column in ("s per step", "tokens/s", "above the model", "task loss, step 1", "of the bound"):
        made.add_column(column, justify="right")
    for side, row in result["sides"].items():
        name = side if side == OURS else f"Trainer, {side}"
        made.add_row(
            name, f"{row['step_seconds']:.3f} ({row['step_seconds_min']:.3f} to {row['step_seconds_max']:.3f})",
            f"{row['tokens_per_second']:,.0f}", f"{row['peak_bytes'] / 2**20:,.0f} MiB", f"{row['loss_at_step_1']:.5f}",
            f"{100 * row['bound_share']:.0f} %",
        )  # fmt: skip
    return made


def _ratio(ratio: Mapping[str, Any]) -> str:
    return f"{ratio['median']:.2f} x ({min(ratio['each']):.2f} to {max(ratio['each']):.2f})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="remoe bench-train",
        description="Tokens per second and memory of router fine-tuning, beside transformers' Trainer.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="a YAML as for remoe train; configs/train/bench.yaml is made for this")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the config")
    parser.add_argument(
        "--stock", default="grouped_mm,eager", metavar="NAMES",
        help=f"the opponent's experts implementations, of {', '.join(STOCK)} (default grouped_mm,eager); the fastest counts",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=int, default=6, help="timed steps of a process, after one to warm up (default 6)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="processes of every side (default 3)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of every side (default: all cores)"
    )
    parser.add_argument("--output", metavar="JSON", help="where to write everything that was measured")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
