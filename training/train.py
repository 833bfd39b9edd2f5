"""`remoe train`: parse, load the configuration, train.

Also the module that `accelerate launch -m training.train CONFIG key=value ...` starts on every process.
"""

import argparse
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from configs.command import run
from configs.load import UserError, dump, keys_help, load
from training.arguments import TrainArguments
from training.loop import train

EXAMPLE = """examples:
  remoe train configs/train/tiny.yaml objective=cache output_dir=runs/cache
  remoe train configs/train/tiny.yaml max_steps=400 resume_from_checkpoint=auto
  remoe train configs/train/tiny.yaml --accelerate-config configs/accelerate/cpu_2_processes.yaml
  accelerate launch --config_file configs/accelerate/cpu_2_processes.yaml -m training.train configs/train/tiny.yaml
"""
LAUNCH_FLAGS = {  # of `accelerate launch`
    "num_processes": "of all machines together",
    "num_machines": "how many",
    "machine_rank": "which of them this is",
    "main_process_ip": "of the first machine",
    "main_process_port": "of the first machine",
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="remoe train",
        description="Fine-tune the routers of a mixture-of-experts model; everything else stays as it is.",
        epilog=EXAMPLE + keys_help(TrainArguments),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="a YAML under configs/train/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the config")
    parser.add_argument("--accelerate-config", metavar="YAML", help="start several processes with accelerate")
    for flag, meaning in LAUNCH_FLAGS.items():
        parser.add_argument(f"--{flag}", metavar="X", help=f"instead of what that YAML says: {meaning}")
    args = parser.parse_intermixed_args(argv)  # key=value may stand anywhere
    given = {flag: getattr(args, flag) for flag in LAUNCH_FLAGS if getattr(args, flag) is not None}
    launch_training(load(TrainArguments, args.config, args.overrides), args.accelerate_config, **given)


def launch_training(training: TrainArguments, accelerate_config: str | None, **flags: str) -> None:
    """Train in this process, or in those that an accelerate YAML and `flags` of `accelerate launch` describe.

    Raises:
        UserError: the YAML is missing, or training failed (its own message was printed before).
    """
    if accelerate_config is None:
        if flags:
            raise UserError(f"--{next(iter(flags))} needs --accelerate-config, whose YAML it changes")
        train(training)
        return
    if not Path(accelerate_config).is_file():
        raise UserError(
            f"accelerate config {accelerate_config} does not exist; shipped ones are under configs/accelerate/"
        )
    with tempfile.TemporaryDirectory() as folder:
        resolved = Path(folder) / "config.yaml"
        dump(training, resolved)
        launch = ["--config_file", accelerate_config, *(f"--{flag}={value}" for flag, value in flags.items())]
        launch += ["-m", "training.train", str(resolved)]
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # or it logs tracebacks of its own
        try:
            launch_command(launch_command_parser().parse_args(launch))
        except (ChildFailedError, subprocess.CalledProcessError) as error:
            raise UserError(f"training under {accelerate_config} failed; its own message is above") from error


if __name__ == "__main__":
    sys.exit(run(main))
