"""Checkpoints: what trains, the optimizer, the random state and where the run is; never a frozen weight.

A checkpoint is written aside, flushed to disk and renamed, so what is called `checkpoint-<step>` is whole.
safetensors and JSON only.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor
from torch.optim import Optimizer

from configs.files import folder_aside
from configs.load import UserError
from training.run_folder.folder import explaining_a_full_disk

TRAINED, OPTIMIZER, RANDOM = "trained.safetensors", "optimizer.safetensors", "random.safetensors"
STATE = "trainer_state.json"
Tensors = Mapping[str, Tensor]


def save(
    run_dir: Path, step: int, *, trained: Tensors, optimizer: Optimizer, state: Mapping[str, Any], keep: int
) -> Path:
    """Write `checkpoint-<step>` and delete all but the newest `keep`.

    Raises:
        UserError: the disk is full; earlier checkpoints are left as they were.
    """
    final = run_dir / f"checkpoint-{step}"
    explaining = explaining_a_full_disk(f"checkpoint {final}", left="Earlier checkpoints are whole")
    with explaining, folder_aside(final, replace=True, durable=True) as aside:
        # not safetensors' save_file (0.8), whose files nobody but their owner may read, whatever the umask
        (aside / TRAINED).write_bytes(to_bytes({name: p.detach().contiguous() for name, p in trained.items()}))
        (aside / OPTIMIZER).write_bytes(to_bytes(_optimizer_tensors(trained, optimizer)))
        (aside / RANDOM).write_bytes(to_bytes({"cpu": torch.get_rng_state()}))
        (aside / STATE).write_text(json.dumps({"global_step": step, **state}, indent=2) + "\n", encoding="utf-8")
    others = [path for path in _checkpoints(run_dir) if path != final]  # one from a later step may lie there
    for old in others[: len(others) - (keep - 1)]:
        shutil.rmtree(old)
    return final


def find(run_dir: Path, resume_from: str | None) -> Path | None:
    """The checkpoint to resume from: the newest whole one for `auto`, the named one, or None to start afresh."""
    if resume_from is None:
        return None
    if resume_from == "auto":
        for half_written in run_dir.glob(".checkpoint-*.partial"):
            shutil.rmtree(half_written, ignore_errors=True)
        return next(reversed(_checkpoints(run_dir)), None)
    if not (Path(resume_from) / STATE).is_file():
        raise UserError(
            f"resume_from_checkpoint={resume_from} is not a checkpoint folder (no {STATE}); write auto for the newest"
        )
    return Path(resume_from)


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Everything that is not a tensor; a `UserError` if the file is damaged."""
    try:
        return dict(json.loads((checkpoint / STATE).read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{checkpoint} is damaged ({error}); delete it to resume from the one before") from error


def load(checkpoint: Path, *, trained: Tensors, optimizer: Optimizer) -> None:
    """Put trained tensors, optimizer and random state back, in place.

    Raises:
        UserError: the checkpoint is of another model or damaged.
    """
    try:
        weights, moments, random = (load_file(checkpoint / name) for name in (TRAINED, OPTIMIZER, RANDOM))
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(f"{checkpoint} is damaged ({error}); delete it to resume from the one before") from error
    if {n: t.shape for n, t in weights.items()} != {n: p.shape for n, p in trained.items()}:
        raise UserError(f"{checkpoint} holds other tensors than this run trains; it belongs to another model or config")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    per_parameter: dict[int, dict[str, Tensor]] = {index: {} for index in range(len(trained))}
    names = list(trained)
    for key, tensor in moments.items():
        name, field = key.rsplit("/", 1)
        per_parameter[names.index(name)][field] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": per_parameter})
    torch.set_rng_state(random["cpu"])


def _optimizer_tensors(trained: Tensors, optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{field}": value.detach().contiguous()
        for name, parameter in trained.items()
        for field, value in optimizer.state[parameter].items()
    }


def _checkpoints(run_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first; folders of other names, as copies that somebody made, are left alone."""
    numbered = {path: path.name.removeprefix("checkpoint-") for path in run_dir.glob("checkpoint-*")}
    found = [path for path, number in numbered.items() if number.isdecimal() and (path / STATE).is_file()]
    return sorted(found, key=lambda path: int(numbered[path]))
