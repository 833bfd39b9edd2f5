"""How much faster several processes train than one, with the same rows in every step; each process has one thread.

The sides take turns, every run starts anew, and a run's figure is the median of its steps after the first five.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from tqdm import tqdm

from configs.command import run
from configs.load import UserError, dump, load
from training.arguments import TrainArguments

EXAMPLE = """example:
  python -m evaluation.benchmark.scaling configs/train/tiny.yaml objective=remoe
"""
PROJECT = Path(__file__).parents[1]
LAUNCHER = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "MULTI_GPU",
    "main_process_port": 0,
    "mixed_precision": "no",
    "num_machines": 1,
    "use_cpu": True,
}
WARM_UP = 5  # steps


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, let one and several processes take turns, print the ratio of every repeat and its median."""
    arguments = _parser().parse_intermixed_args(argv)
    if arguments.processes < 2 or arguments.repeats < 1 or arguments.steps <= WARM_UP:
        raise UserError(
            f"--processes {arguments.processes} --repeats {arguments.repeats} --steps {arguments.steps}: write at least 2, 1 "
            f"and {WARM_UP + 1}"
        )
    config = load(TrainArguments, arguments.config, arguments.overrides)
    rows, rest = divmod(config.per_device_train_batch_size, arguments.processes)
    if rest:
        raise UserError(
            f"per_device_train_batch_size={config.per_device_train_batch_size} is that of the one process and must be a "
            f"multiple of --processes {arguments.processes}"
        )
    config = replace(
        config, max_steps=arguments.steps, logging_steps=1, save_steps=arguments.steps, report_to="none",
        resume_from_checkpoint=None,
    )  # fmt: skip
    ratios = []
    for repeat in tqdm(range(arguments.repeats), unit="repeat"):
        sides = [1, arguments.processes]
        speed = {
            n: tokens_per_second(config, processes=n, rows=rows if n > 1 else None)
            for n in sides[:: 1 - 2 * (repeat % 2)]
        }
        ratios.append(speed[arguments.processes] / speed[1])
        tqdm.write(
            f"1: {speed[1]:,.0f} tokens/s; {arguments.processes}: {speed[arguments.processes]:,.0f}; {ratios[-1]:.2f} x"
        )
    print(f"{arguments.processes} processes / 1: {median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})")


def tokens_per_second(config: TrainArguments, *, processes: int, rows: int | None) -> float:
    """Of all processes together, one thread each; `rows` is each one's share of a micro-batch, if not all of it.

    Raises:
        UserError: training failed; with what it said last.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "launcher.yaml").write_text(json.dumps({**LAUNCHER, "num_processes": processes}), encoding="utf-8")
        size = rows or config.per_device_train_batch_size
        dump(replace(config, output_dir=str(folder / "run"), per_device_train_batch_size=size), folder / "train.yaml")
        command = [sys.executable, "-m", "training.train", str(folder / "train.yaml")]
        command += ["--accelerate-config", str(folder / "launcher.yaml")] * (processes > 1)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["nothing on standard error"])[-1]
            raise UserError(
                f"{processes} processes ended with exit code {done.returncode}: {last.removeprefix('error: ')}"
            )
        lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return median(json.loads(line)["time/tokens_per_second"] for line in lines[WARM_UP:])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.benchmark.scaling",
        description="Tokens per second of several training processes beside one, same rows in every step.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="a YAML as for remoe train; its batch is the one process's")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the config")
    parser.add_argument("--processes", type=int, default=2, help="beside one (default 2)")
    parser.add_argument(
        "--steps", type=int, default=40, help=f"of every run, {WARM_UP} of them to warm up (default 40)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="of both (default 3)")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
