"""Our trainer beside transformers' own, on the same rows, training the same routers.

Every side runs in processes of its own, all loaded at once, and they take turns step by step, as the speed of a shared
machine changes from one second to the next. The opponent computes the task loss alone, with each
stock experts_implementation that is named; ours computes the config's objective with every ramp at its end. Further sides tell
where a difference comes from (ours with the task loss alone, ours with transformers' experts, Trainer with our experts) and
what quantised experts cost and save.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from configs.checks import at_least, chosen
from configs.files import prepare, write_json, write_yaml
from configs.load import UserError, load
from evaluation.benchmark import tables
from evaluation.benchmark.processes import Child
from evaluation.benchmark.sides.training_side import (
    FIGURES,
    OF_OURS,
    OURS,
    OURS_CE_ONLY,
    OURS_STOCK_EXPERTS,
    READY,
    STOCK_OUR_EXPERTS,
    Measured,
)
from training.arguments import TrainArguments
from training.model.quantising import KINDS

MODULE = "evaluation.benchmark.sides.training_side"
STOCK = ("grouped_mm", "batched_mm", "eager")
EXPLAINING = (OURS_CE_ONLY, OURS_STOCK_EXPERTS, STOCK_OUR_EXPERTS)
NAMES = {OURS: OURS, **OF_OURS, STOCK_OUR_EXPERTS: "Trainer, our experts"}
ALONE = ("report_to=none", "resume_from_checkpoint=null")  # of a process that is only measured

Runs = Mapping[str, Sequence[Measured]]


@dataclass(frozen=True, kw_only=True)
class TrainingBenchmark:
    """Measure tokens per second and memory of router fine-tuning, beside transformers' Trainer.

    All sides are loaded at once and take turns step by step; the speed ratio is the median over steps of the same turn.
    Memory is what a process held at its peak above what it held before the first step: on CPU resident memory, on an
    accelerator what torch allocated. The bound is twice the forward pass's matrix products (forward, and gradients of
    inputs) at the rate of large matrix products, measured in each process. On a CUDA device it is also counted how often one of
    our steps waits for it.

    example:
      remoe make-model --output runs/models/train100m --layers 8 --hidden 256 --intermediate 256 --dtype float32 \\
          --check-tokens 0
      remoe bench training configs/train/bench.yaml --output runs/bench_train.json
      remoe bench training configs/train/bench.yaml --device cuda --sides all --profile --output runs/bench_gpu.json \\
          bf16=true max_length=1024 per_device_train_batch_size=4
    """

    config: str  # a YAML as for remoe train; configs/train/bench.yaml is made for this
    overrides: Sequence[str] = ()  # key=value: override a key of the config
    stock: str = "grouped_mm,eager"  # the opponent's experts implementations, with commas between; the fastest counts
    # further sides, with commas between: ce_only, stock_experts (ours), our_experts (Trainer's); all: these three;
    # mxfp4, fp8, int4, int8: ours with experts in that format
    sides: str = ""
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to train; auto: on an accelerator if there is one
    profile: bool = False  # write into the output where one more step of ours spends its time
    steps: int = 6  # timed steps of a process, after one to warm up
    repeats: int = 3  # processes of every side
    threads: int = field(default_factory=torch.get_num_threads)  # of every side; all cores if not given
    output: str | None = None  # JSON file to write everything that was measured to

    def __post_init__(self) -> None:
        at_least(self, steps=1, repeats=1, threads=1)
        _ = self.stock_sides, self.further_sides
        if self.profile and not self.output:
            raise UserError("--profile writes into the output; write --output FILE")

    @property
    def stock_sides(self) -> list[str]:
        return chosen(self.stock, STOCK, flag="--stock")

    @property
    def further_sides(self) -> list[str]:
        asked = chosen(self.sides, [*EXPLAINING, *KINDS, "all"], flag="--sides") if self.sides else []
        return list(dict.fromkeys(side for one in asked for side in (EXPLAINING if one == "all" else [one])))

    def train_arguments(self) -> TrainArguments:
        """The config with every ramp at its end, one more step to warm up, and nothing reported or resumed."""
        ramps = ("reuse_warmup_steps=0", "consistency_warmup_steps=0")
        return load(TrainArguments, self.config, [*self.overrides, f"max_steps={self.steps + 1}", *ramps, *ALONE])


def benchmark(options: TrainingBenchmark) -> None:
    """Let the sides take turns, compare, write and print."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; write auto or cpu")
    output = prepare(options.output) if options.output else None
    config = options.train_arguments()
    sides = [OURS, *options.further_sides, *options.stock_sides]
    how: dict[str, Any] = {"threads": options.threads, "device": options.device, "profiles": options.profile}
    result = compare(take_turns(sides, config, repeats=options.repeats, **how))
    if output:
        about = {"torch": torch.__version__, "device": _device_name(options.device)}
        write_json(output, {**result, "config": asdict(config), "threads": options.threads, **about})
    Console(width=max(110, Console().width)).print(table(result))


def _device_name(asked: str) -> str:
    return torch.cuda.get_device_name() if asked != "cpu" and torch.cuda.is_available() else "cpu"


def take_turns(sides: Sequence[str], config: TrainArguments, *, repeats: int, **how: Any) -> dict[str, list[Measured]]:
    """New processes in every repeat, loaded one after the other; in every round of steps another side begins."""
    runs: dict[str, list[Measured]] = {side: [] for side in sides}
    with tqdm(total=repeats * len(sides) * config.max_steps, unit="step") as progress:
        for _ in range(repeats):
            with ExitStack() as stack:
                started = [(side, stack.enter_context(loaded(side, config, **how))) for side in sides]
                for step in range(config.max_steps):
                    for i in range(len(started)):
                        side, child = started[(step + i) % len(started)]
                        said = take_step(side, child)
                        if step == config.max_steps - 1:
                            runs[side].append(Measured(**json.loads(said.removeprefix(FIGURES))))
                        progress.update()
    return runs


@contextmanager
def loaded(
    side: str, config: TrainArguments, *, threads: int, device: str = "auto", profiles: bool = False
) -> Iterator[Child]:
    """A process that has loaded this side's model; it takes as many steps as the config has."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{side}.yaml"
        write_yaml(path, replace(config, output_dir=str(Path(folder) / side), run_name=side))
        environment = {"ACCELERATE_USE_CPU": "true"} if device == "cpu" else {}
        with Child(MODULE, side, str(path), str(threads), str(profiles), environment=environment) as child:
            _answer(side, child)
            yield child


def take_step(side: str, child: Child) -> str:
    """Let the process take a step; returns what it says then: that it is ready again, or at its end its figures."""
    child.nudge()
    return _answer(side, child)


def _answer(side: str, child: Child) -> str:
    """The next thing it says; a `UserError` with its last words when it has ended."""
    while line := child.line():
        if line.startswith((READY, FIGURES)):
            return line
    raise UserError(f"side {side} ended with exit code {child.wait()}: {child.last_words}")


def compare(runs: Runs) -> dict[str, Any]:
    """Each side's figures, and ours beside the stock side that is fastest.

    `speed_ratio` is tokens per second of ours / of the fastest stock side: the median over a repeat's steps, one value
    for each repeat and their median; `memory_ratio` peak memory above the model likewise. Each side has its own in `sides`.
    Sides with quantised experts are compared with ours, too, in `quantised`.
    """
    stock = {side: runs[side] for side in runs if side in STOCK}
    fastest = min(stock, key=lambda side: median(_step_seconds(one) for one in stock[side]))
    sides = {side: {**_summary(measured), **_ratios(measured, stock[fastest])} for side, measured in runs.items()}
    return {
        "sides": sides,
        "fastest_stock": fastest,
        **{ratio: sides[OURS][ratio] for ratio in ("speed_ratio", "memory_ratio")},
        "quantised": {
            side: {
                **_ratios(runs[side], runs[OURS]),
                "weights_ratio": runs[side][0].weights_bytes / runs[OURS][0].weights_bytes,
            }
            for side in runs
            if side in KINDS
        },
        "runs": {side: [asdict(one) for one in measured] for side, measured in runs.items()},
    }


def _ratios(ours: Sequence[Measured], fastest: Sequence[Measured]) -> dict[str, Any]:
    pairs = list(zip(ours, fastest, strict=True))
    steps = [zip(mine.step_seconds[1:], theirs.step_seconds[1:], strict=True) for mine, theirs in pairs]
    speed = [median(theirs / mine for mine, theirs in seconds) for seconds in steps]
    memory = [mine.peak_bytes / theirs.peak_bytes for mine, theirs in pairs]
    return {
        "speed_ratio": {"median": median(speed), "each": speed},
        "memory_ratio": {"median": median(memory), "each": memory},
    }


def _step_seconds(measured: Measured) -> float:
    return median(measured.step_seconds[1:])  # the first one warms up


def _summary(measured: Sequence[Measured]) -> dict[str, Any]:
    seconds = [_step_seconds(one) for one in measured]
    return {
        "step_seconds": median(seconds),
        "step_seconds_min": min(seconds),
        "step_seconds_max": max(seconds),
        "tokens_per_second": measured[0].tokens_per_step / median(seconds),
        "weights_bytes": measured[0].weights_bytes,
        "peak_bytes": median(one.peak_bytes for one in measured),
        "model_bytes": median(one.model_bytes for one in measured),
        "loss_at_step_1": measured[0].losses[0],
        "waits_per_step": measured[0].waits_per_step,
        "bound_share": median(
            2 * one.forward_flop_per_step / one.matrix_flop_per_second / _step_seconds(one) for one in measured
        ),
    }


def table(result: Mapping[str, Any]) -> Table:
    """The figures for a terminal."""
    speed, memory = (_ratio(result[which]) for which in ("speed_ratio", "memory_ratio"))
    said = [f"ours / {result['fastest_stock']}: {speed} the tokens per second, {memory} the memory above the model"]
    for side, row in result["quantised"].items():
        speed, weights = _ratio(row["speed_ratio"]), f"{row['weights_ratio']:.3f} x the weights"
        said.append(f"{NAMES[side]} / {OURS}: {speed} the tokens per second, {weights}")
    waits = any(row["waits_per_step"] is not None for row in result["sides"].values())
    rows = [
        (
            NAMES.get(side, f"Trainer, {side}"),
            f"{row['step_seconds']:.3f} ({row['step_seconds_min']:.3f} to {row['step_seconds_max']:.3f})",
            f"{row['tokens_per_second']:,.0f} ({row['speed_ratio']['median']:.2f} x)",
            f"{row['weights_bytes'] / 2**20:,.0f} MiB",
            f"{row['peak_bytes'] / 2**20:,.0f} MiB ({row['memory_ratio']['median']:.2f} x)",
            f"{100 * row['bound_share']:.0f} %", f"{row['loss_at_step_1']:.5f}", *([str(row["waits_per_step"])] * waits),
        )
        for side, row in result["sides"].items()
    ]  # fmt: skip
    return tables.table(
        "Training routers: ours beside transformers' Trainer",
        "side|>s per step|>tokens/s|>weights|>above the model|>of the bound|>loss, step 1" + "|>waits a step" * waits,
        rows,
        caption="\n".join(said),
    )


def _ratio(ratio: Mapping[str, Any]) -> str:
    return f"{ratio['median']:.2f} x ({min(ratio['each']):.2f} to {max(ratio['each']):.2f})"
