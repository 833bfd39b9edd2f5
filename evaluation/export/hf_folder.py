"""A checkpoint with tuned routers as a Hugging Face folder, which others use without this project.

Only router tensors change. Shards without one are hard-linked (copied where that cannot be done), shards with one are
copied and written over in place, so every other byte stays as it was. What was written is read back before the folder
gets its name.
"""

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor
from yaml import YAMLError

from configs.files import folder_aside
from configs.load import UserError
from evaluation.engine.store.packing import OTHER_WEIGHTS
from training.model.lazy_weights import lazy_slices
from training.model.number_formats.formats import PLAIN_DTYPES
from training.model.shards import StoredTensor, read_index

CHAT_TEMPLATES = "additional_chat_templates"  # the one folder beside a model's files that transformers reads
Routers = Mapping[str, Tensor]
logger = logging.getLogger(__name__)


def write_folder(
    model_dir: Path, output: Path, routers: Routers, *, stored: Mapping[str, StoredTensor], about: Mapping[str, Any]
) -> None:
    """Write the whole model as a Hugging Face folder, aside and renamed; a full disk leaves nothing behind.

    Weights that are not the model's (other forms, files that the index does not name) stay behind.
    """
    changed, shards = ({place.shard.name for place in of.values()} for of in (stored, read_index(model_dir)))
    with folder_aside(output) as aside:
        for path in sorted(model_dir.iterdir()):
            if path.is_dir() and path.name == CHAT_TEMPLATES:
                shutil.copytree(path, aside / path.name)
            if not path.is_file() or path.suffix in OTHER_WEIGHTS or path.name == "README.md":
                continue
            if path.suffix == ".safetensors" and path.name not in shards:
                continue
            if path.name in shards - changed:
                _link_or_copy(path, aside / path.name)
            else:
                shutil.copyfile(path, aside / path.name)
        for name, place in stored.items():
            _write_over(aside / place.shard.name, place, routers[name])
        _read_back(aside, routers, stored)
        (aside / "README.md").write_text(model_card(model_dir, about), encoding="utf-8")


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _write_over(shard: Path, place: StoredTensor, weight: Tensor) -> None:
    dtype = PLAIN_DTYPES.get(place.dtype)
    if dtype is None:
        raise UserError(f"{shard.name} stores {place.name} as {place.dtype}; known: {', '.join(PLAIN_DTYPES)}")
    raw = weight.to(dtype).contiguous().view(torch.uint8).numpy()
    assert raw.nbytes == place.length_bytes, place
    with shard.open("r+b") as file:
        file.seek(place.offset)
        file.write(np.ascontiguousarray(raw).data)


def _read_back(folder: Path, routers: Routers, stored: Mapping[str, StoredTensor]) -> None:
    """Read the routers as any reader of the folder would; a `UserError` if one is not what it should be."""
    written = lazy_slices({place.name: read_index(folder)[place.name] for place in stored.values()})
    for name, place in stored.items():
        if not torch.equal(written[place.name][...], routers[name].to(PLAIN_DTYPES[place.dtype])):
            raise UserError(f"{place.name} was not written as it should be; check the disk that holds {folder.parent}")


def model_card(model_dir: Path, about: Mapping[str, Any]) -> str:
    """The card of the tuned model: base and its licence, objective and coefficients, figures of the last step."""
    base_card = _base_card(model_dir / "README.md")
    licence = getattr(base_card, "license", None)
    base = str(about["base_model"])
    data = ModelCardData(
        license=licence,
        license_name=getattr(base_card, "license_name", None),
        library_name="transformers",
        base_model=None if Path(base).exists() else base,
        tags=["mixture-of-experts", "remoe", "expert-reuse"],
    )
    config, metrics = about["config"], about["metrics"]
    coefficients = ", ".join(f"{key} {value}" for key, value in config.items() if key.endswith("_coef") and value)
    rows = [
        ("base", base),
        ("licence", licence or "that of the base: see there"),
        ("trained", f"{len(about['tensors'])} router tensors; every other byte is the base's"),
        ("objective", f"{about['objective']} ({coefficients})"),
        ("steps, learning rate, seed", f"{config['max_steps']}, {config['learning_rate']}, {config['seed']}"),
        ("code", str(about["code_commit"])),
        *((key, f"{value:.6g}") for key, value in metrics.items() if key.startswith(("train/", "moe/reuse_rate_mean"))),
    ]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {Path(base).name}, routers tuned for expert reuse\n\nThe routers were "
        "fine-tuned so that neighbouring tokens choose the same experts more often (ReMoE, arXiv 2605.27081): an engine "
        "that reads experts from slow storage reads fewer. Use it as the base.\n\n| | |\n|---|---|\n"
        f"{table}\n"
    )


def _base_card(path: Path) -> ModelCardData | None:
    """The metadata of the base's card; None without one, or with one that cannot be read, which is said."""
    if not path.is_file():
        return None
    try:
        return ModelCard.load(path).data
    except (ValueError, TypeError, YAMLError) as error:
        logger.warning("%s has no metadata that can be read (%s); the new card names no licence", path, error)
        return None
