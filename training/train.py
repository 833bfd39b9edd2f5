"""`remoe train`: parse, load the configuration, train.

Also the module that `accelerate launch -m training.train CONFIG key=value ...` starts on every process.
"""

import logging
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import tyro
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from yaml import YAMLError

from configs.command import parse, run
from configs.files import write_yaml
from configs.load import UserError, keys_help, load
from training.arguments import TrainArguments
from training.loop import train


@dataclass(frozen=True)
class AccelerateFlags:
    """What `accelerate launch` calls them; each replaces what the YAML says."""

    num_processes: str | None = None  # processes of all machines together
    num_machines: str | None = None  # how many machines there are
    machine_rank: str | None = None  # which of them this is, from 0
    main_process_ip: str | None = None  # address of the first machine
    main_process_port: str | None = None  # port of the first machine


@dataclass(frozen=True)
class Train:
    """Fine-tune the routers of a mixture-of-experts model; everything else stays as it is.

    examples:
      remoe train configs/train/tiny.yaml objective=cache output_dir=runs/cache
      remoe train configs/train/tiny.yaml max_steps=400 resume_from_checkpoint=auto
      remoe train configs/train/tiny.yaml --accelerate-config configs/accelerate/cpu_2_processes.yaml
      accelerate launch --config_file configs/accelerate/cpu_2_processes.yaml -m training.train configs/train/tiny.yaml
    """

    config: tyro.conf.Positional[str]  # a YAML under configs/train/
    overrides: tyro.conf.Positional[tuple[str, ...]] = ()  # key=value: overrides a key of the config
    accelerate_config: str | None = None  # a YAML under configs/accelerate/: start several processes with accelerate
    accelerate: AccelerateFlags = field(default_factory=AccelerateFlags)


def main(argv: Sequence[str] | None = None) -> None:
    """Load the configuration and train."""
    command = parse(Train, argv, prog="remoe train", epilog=keys_help(TrainArguments))
    given = {flag: value for flag, value in asdict(command.accelerate).items() if value is not None}
    launch_training(load(TrainArguments, command.config, command.overrides), command.accelerate_config, **given)


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
    with tempfile.TemporaryDirectory() as folder:
        resolved = Path(folder) / "config.yaml"
        write_yaml(resolved, training)
        in_processes(accelerate_config, ["training.train", str(resolved)], what="training", **flags)


def in_processes(accelerate_config: str, command: Sequence[str], *, what: str, **flags: str) -> None:
    """Run a module with its arguments in the processes that an accelerate YAML and `flags` of `accelerate launch` describe.

    Raises:
        UserError: the YAML is missing or not understood, or `what` failed (its own message was printed before).
    """
    if not Path(accelerate_config).is_file():
        raise UserError(
            f"accelerate config {accelerate_config} does not exist; shipped ones are under configs/accelerate/"
        )
    try:
        load_config_from_file(accelerate_config)
    except (ValueError, TypeError, KeyError, AttributeError, YAMLError) as error:
        raise UserError(
            f"accelerate config {accelerate_config} is not understood: {error}; shipped ones are under configs/accelerate/"
        ) from error
    launch = ["--config_file", accelerate_config, *(f"--{flag}={value}" for flag, value in flags.items())]
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # or it logs tracebacks of its own
    try:
        with _passing_on(signal.SIGUSR1):
            launch_command(launch_command_parser().parse_args([*launch, "-m", *command]))
    except (ChildFailedError, subprocess.CalledProcessError) as error:
        raise UserError(f"{what} under {accelerate_config} failed; its own message is above") from error


@contextmanager
def _passing_on(number: signal.Signals) -> Iterator[None]:
    """Let the processes that this one starts hear a signal that it is sent, unless it ignores that."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(number) != signal.SIG_DFL:
        yield
        return

    def pass_on(*_: object) -> None:
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    signal.signal(number, pass_on)
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(run(main))
