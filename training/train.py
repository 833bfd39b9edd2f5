"""`remoe train`: parse, load the configuration, train.

Also the module that `accelerate launch -m training.train CONFIG key=value ...` starts on every process.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from configs.command import run
from configs.load import UserError, load
from training.loop import TrainArguments, train

EXAMPLE = """examples:
  remoe train configs/train/tiny.yaml objective=cache output_dir=runs/cache
  remoe train configs/train/tiny.yaml max_steps=400 resume_from_checkpoint=auto
  remoe train configs/train/tiny.yaml --accelerate-config configs/accelerate/cpu_2_processes.yaml
  accelerate launch --config_file configs/accelerate/cpu_2_processes.yaml -m training.train configs/train/tiny.yaml
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="remoe train",
        description="Fine-tune the routers of a mixture-of-experts model; everything else stays as it is.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="a YAML under configs/train/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the config")
    parser.add_argument("--accelerate-config", metavar="YAML", help="start with accelerate, for example on several processes")
    args = parser.parse_args(argv)
    if args.accelerate_config is None:
        train(load(TrainArguments, args.config, args.overrides))
    else:
        load(TrainArguments, args.config, args.overrides)  # a mistake should be told once, not by every process
        _launch(args.accelerate_config, [args.config, *args.overrides])


def _launch(accelerate_config: str, arguments: Sequence[str]) -> None:
    if not Path(accelerate_config).is_file():
        raise UserError(f"accelerate config {accelerate_config} does not exist; shipped ones are under configs/accelerate/")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", accelerate_config]
    code = subprocess.run([*command, "-m", "training.train", *arguments], env=os.environ, check=False).returncode
    if code != 0:
        raise UserError(f"training under {accelerate_config} ended with exit code {code}; its own message is above")


if __name__ == "__main__":
    sys.exit(run(main))
