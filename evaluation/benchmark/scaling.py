"""The speed of several training processes beside one, with the same rows in every step; each process has one thread.

The sides take turns, every run starts anew, and a run's figure is the median of its steps after the first five.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import yaml
from tqdm import tqdm

from configs.checks import at_least
from configs.files import write_yaml
from configs.load import UserError, load
from evaluation.benchmark.processes import PROJECT, Child
from evaluation.benchmark.training import ALONE
from evaluation.turns import in_turn
from training.arguments import TrainArguments

LAUNCHER = PROJECT / "configs/accelerate/cpu_2_processes.yaml"
WARM_UP = 5  # steps


@dataclass(frozen=True, kw_only=True)
class ScalingBenchmark:
    """Measure how many more tokens per second several training processes make than one, on the same rows.

    example:
      remoe bench scaling configs/train/tiny.yaml objective=remoe
    """

    config: str  # a YAML as for remoe train; its batch is the one process's
    overrides: Sequence[str] = ()  # key=value: override a key of the config
    processes: int = 2  # beside one
    steps: int = 40  # of every run; the first five warm up
    repeats: int = 3  # of both

    def __post_init__(self) -> None:
        at_least(self, processes=2, steps=WARM_UP + 1, repeats=1)

    def train_arguments(self) -> TrainArguments:
        """The config of the one process; a `UserError` if its batch cannot be shared out evenly."""
        alone = [f"max_steps={self.steps}", f"save_steps={self.steps}", "logging_steps=1", *ALONE]
        config = load(TrainArguments, self.config, [*self.overrides, *alone])
        if config.per_device_train_batch_size % self.processes:
            raise UserError(
                f"per_device_train_batch_size={config.per_device_train_batch_size} is that of the one process and must be "
                f"a multiple of --processes {self.processes}"
            )
        return config


def benchmark(options: ScalingBenchmark) -> None:
    """Let one and several processes take turns; print the ratio of every repeat and its median."""
    config, processes = options.train_arguments(), options.processes
    ratios = []
    for repeat in tqdm(range(options.repeats), unit="repeat"):
        speed = {n: tokens_per_second(config, processes=n) for n in in_turn([1, processes], repeat)}
        ratios.append(speed[processes] / speed[1])
        tqdm.write(f"1: {speed[1]:,.0f} tokens/s; {processes}: {speed[processes]:,.0f}; {ratios[-1]:.2f} x")
    print(f"{processes} processes / 1: {median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})")


def tokens_per_second(config: TrainArguments, *, processes: int) -> float:
    """The speed of all processes together, which share each micro-batch of the config and have one thread each."""
    rows, threads = config.per_device_train_batch_size // processes, {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        run, train, launcher = Path(folder) / "run", Path(folder) / "train.yaml", Path(folder) / "launcher.yaml"
        several = {**yaml.safe_load(LAUNCHER.read_text(encoding="utf-8")), "num_processes": processes}
        launcher.write_text(json.dumps(several), encoding="utf-8")
        write_yaml(train, replace(config, output_dir=str(run), per_device_train_batch_size=rows))
        arguments = [str(train), "--accelerate-config", str(launcher)] if processes > 1 else [str(train)]
        with Child("training.train", *arguments, environment=threads) as child:
            if code := child.wait():
                raise UserError(f"{processes} processes ended with exit code {code}: {child.last_words}")
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return median(json.loads(line)["time/tokens_per_second"] for line in lines[WARM_UP:])
