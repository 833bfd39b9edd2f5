"""The router delta: what fine-tuning changed, as a file of a few megabytes that belongs to exactly one base model.

`router_delta.safetensors` holds the gate tensors (FP32) under their parameter names, `router_delta.json` says which
base they belong to: name and SHA-256 over the base checkpoint's frozen tensors as they are stored on disk.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from configs.files import folder_aside
from configs.load import UserError
from training.model.lazy_weights import lazy_slices
from training.model.shards import read_index
from training.run_folder.folder import explaining_a_full_disk
from training.run_folder.proof import combined, tensor_sha256

WEIGHTS, DESCRIPTION = "router_delta.safetensors", "router_delta.json"
FORMAT_VERSION = 1


def checkpoint_sha256(model_dir: str | Path, routers: Collection[str]) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor of a checkpoint folder, its routers left out.

    Reads one tensor at a time; a `UserError` if there are no safetensors files, or one is damaged.
    """
    frozen = {name: tensor for name, tensor in read_index(model_dir).items() if name not in routers}
    return combined({name: tensor_sha256(part[...]) for name, part in lazy_slices(frozen).items()})


def save(
    folder: str | Path, routers: Mapping[str, Tensor], *, base_model: str, base_sha256: str, about: Mapping[str, Any]
) -> None:
    """Write a delta folder, aside first; `about` (objective, coefficients, metrics ...) goes into the JSON as it is.

    Where the disk is full there is a `UserError`, and a delta that was there before is left as it was.
    """
    weights = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in routers.items()}
    description = {
        "format_version": FORMAT_VERSION,
        "base_model": base_model,
        "base_frozen_sha256": base_sha256,
        "tensors": {name: list(tensor.shape) for name, tensor in weights.items()},
        **about,
    }
    with explaining_a_full_disk(f"router delta {folder}"), folder_aside(folder, replace=True) as aside:
        # not by safetensors' save_file (0.8), whose files nobody but their owner may read, whatever the umask
        (aside / WEIGHTS).write_bytes(to_bytes(weights, metadata={"format": "pt"}))
        (aside / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def describe(folder: str | Path, *, needed: Collection[str] = ("base_model", "base_frozen_sha256")) -> dict[str, Any]:
    """The JSON of a delta folder, which has these keys; a `UserError` if it is none, or one of a newer version."""
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise UserError(
            f"{folder} is not a router delta (no {DESCRIPTION}); training writes one as runs/<name>/router_delta"
        )
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); copy the delta again") from error
    if not isinstance(description, dict):
        raise UserError(f"{path} is damaged (it is no JSON object); copy the delta again")
    if (version := description.get("format_version")) != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}, this code reads {FORMAT_VERSION}")
    if lacking := [key for key in needed if key not in description]:
        raise UserError(f"{path} is damaged (it lacks {lacking[0]}); copy the delta again")
    return dict(description)


def load_for(model_dir: str | Path, folder: str | Path) -> dict[str, Tensor]:
    """The gate tensors (FP32) of a delta; a `UserError` if it is damaged or was trained on another base."""
    description = describe(folder)
    try:
        weights = load_file(Path(folder) / WEIGHTS)
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{Path(folder) / WEIGHTS} is missing or damaged ({error}); copy the delta again") from error
    if bad := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        raise UserError(f"router delta {folder}: {bad[0]} holds numbers that are not finite; train again, more slowly")
    if checkpoint_sha256(model_dir, weights.keys()) != description["base_frozen_sha256"]:
        raise UserError(
            f"router delta {folder} was trained on {description['base_model']}, and the frozen weights of {model_dir} "
            "differ from it: its routers would choose wrong experts. Give the model it was trained on"
        )
    return weights
