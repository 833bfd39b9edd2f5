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

FREE_ON_RESUME = {
    "resume_from_checkpoint", "save_steps", "save_total_limit", "logging_steps", "report_to", "run_name", "output_dir",
    "eval_steps", "eval_config",
    "per_device_train_batch_size", "gradient_accumulation_steps",
    "model_name_or_path", "tokenizer_name", "dataset_name", "dataset_config_name", "dataset_split", "train_file",
    "domains", "skip_bad_rows",
}  # fmt: skip
"""Keys that may differ between a run and its continuation: none changes a number. What paths lead to is compared instead."""
WITHOUT_END = ("constant", "constant_with_warmup", "inverse_sqrt")
"""Schedules whose learning rate does not depend on max_steps, which may therefore grow."""


def decisive(args: Any) -> dict[str, Any]:
    """The keys of a configuration that decide numbers."""
    return {key: value for key, value in asdict(args).items() if key not in FREE_ON_RESUME}


def check_output_dir(args: Any, resume_from: Path | None) -> None:
    """Refuse a folder that holds a run by a `UserError`, unless that same run is to be resumed."""
    out = Path(args.output_dir)
    if not (out / "config.yaml").exists():
        return
    if args.resume_from_checkpoint is None:
        raise UserError(
            f"output_dir={out} already holds a run; write resume_from_checkpoint=auto to resume it, or another output_dir"
        )
    if resume_from is not None:
        check_same_run(args, asdict(load(type(args), out / "config.yaml")), where=out)


def check_same_run(args: Any, before: Mapping[str, Any], *, where: Path) -> None:
    """Refuse by a `UserError` to go on, with `args`, from what the configuration `before` has begun."""
    now = decisive(args)
    if now["lr_scheduler_type"] in WITHOUT_END and now["max_steps"] >= before.get("max_steps", 0):
        del now["max_steps"]
    # the objective stands before the coefficients that it sets
    changed = [key for key, value in now.items() if before.get(key, value) != value]
    if changed:
        key = changed[0]
        raise UserError(
            f"{where} was started with {key}={before[key]}, now it is {now[key]}: the result would not be that of one run. "
            f"Write {key}={before[key]}, or start afresh in another output_dir, without resume_from_checkpoint"
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
