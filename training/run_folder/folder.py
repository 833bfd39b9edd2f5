"""A run's folder: what it may be used for, which code wrote it, small JSON files in it."""

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from configs.files import write_json
from configs.load import UserError, load

# Keys that may differ between a run and its continuation: none of them changes a number.
FREE_ON_RESUME = {
    "resume_from_checkpoint", "save_steps", "save_total_limit", "logging_steps", "report_to", "run_name", "output_dir",
    "per_device_train_batch_size", "gradient_accumulation_steps",
}  # fmt: skip


def check_output_dir(args: Any, resume_from: Path | None) -> None:
    """Refuse a folder that holds a run by a `UserError`, unless that same run is to be resumed."""
    out = Path(args.output_dir)
    if not (out / "config.yaml").exists():
        return
    if args.resume_from_checkpoint is None:
        raise UserError(
            f"output_dir={out} already holds a run; write resume_from_checkpoint=auto to resume it, or another output_dir"
        )
    before = asdict(load(type(args), out / "config.yaml"))
    changed = [key for key, value in asdict(args).items() if key not in FREE_ON_RESUME and before[key] != value]
    if resume_from is not None and changed:
        key = changed[0]  # the objective stands before the coefficients that it sets
        raise UserError(
            f"{out} was started with {key}={before[key]}, now it is {asdict(args)[key]}: the result would not be that of one "
            f"run. Write {key}={before[key]}, or another output_dir"
        )


@contextmanager
def explaining_a_full_disk(what: str, *, left: str = "The checkpoints are whole") -> Iterator[None]:
    """Raise a `UserError` where `what` cannot be written, which says what is left of the run."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{what} cannot be written ({error}): the disk is full or not writable. {left}; free some space and start "
            "again with resume_from_checkpoint=auto"
        ) from error


def code_commit() -> str | None:
    """The commit of this checkout, with +dirty if files differ from it; None outside of git, or where there is no git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    if shutil.which("git") is None:
        return None
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode != 0:
        return None
    dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False).stdout
    return head.stdout.strip() + ("+dirty" if dirty.strip() else "")


def update_json(path: Path, values: Mapping[str, Any]) -> None:
    """Add keys to a JSON file, which is made if it is not there."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, {**known, **values})
