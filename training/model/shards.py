"""Which file each tensor of a checkpoint is in, and where: the one rule for training, hashes, the engine and export.

Headers only, no weights are read. Files that are not named are not the model's, whatever they hold.

Every shard's size is checked against its own header, and the index against the shards, so that a truncated, missing
or changed file is named before anything runs. File format: https://github.com/huggingface/safetensors (8 bytes of
header length, a JSON header, the data).
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.load import UserError

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
AGAIN = "copy the model again"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class StoredTensor:
    """One tensor on disk; `offset` counts from the start of the file."""

    name: str
    shard: Path
    dtype: str  # as safetensors spells it: BF16, F32, ...
    shape: tuple[int, ...]
    offset: int
    length_bytes: int


def read_index(model_dir: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in `model_dir`, by name.

    Raises:
        UserError: no folder, no safetensors weights, two sets of them (of which transformers would take the single file),
            or a shard that is missing, truncated or changed.
    """
    model_dir = Path(model_dir)
    if not model_dir.is_dir():
        raise UserError(f"model folder {model_dir} does not exist; give one with config.json and safetensors weights")
    index_path, single_path = model_dir / INDEX_NAME, model_dir / SINGLE_NAME
    if not index_path.is_file():
        if not single_path.is_file():
            raise UserError(f"{model_dir} holds neither {SINGLE_NAME} nor {INDEX_NAME}; save the model as safetensors")
        return {tensor.name: tensor for tensor in read_shard(single_path)[1]}
    weight_map = _read_weight_map(index_path)
    if single_path.is_file() and (others := set(weight_map.values()) - {SINGLE_NAME}):
        raise UserError(
            f"{model_dir} holds {SINGLE_NAME} and also {INDEX_NAME}, which names {min(others)}: which of them is the model "
            "cannot be told; remove what is out of date"
        )
    tensors: dict[str, StoredTensor] = {}
    for shard_name in sorted(set(weight_map.values())):
        tensors |= {tensor.name: tensor for tensor in read_shard(model_dir / shard_name)[1]}
    if unnamed := sorted(tensors.keys() - weight_map.keys()):  # transformers would load them
        raise UserError(
            f"shard {tensors[unnamed[0]].shard} holds {unnamed[0]}, which {INDEX_NAME} does not name; {AGAIN}"
        )
    for name, shard_name in weight_map.items():
        if name not in tensors or tensors[name].shard.name != shard_name:
            raise UserError(
                f"shard {model_dir / shard_name} is changed: it lacks {name}, which the index promises; {AGAIN}"
            )
    return tensors


def read_bytes(tensor: StoredTensor) -> npt.NDArray[np.uint8]:
    """The bytes of a tensor; a `UserError` if they cannot be read."""
    try:
        found = np.fromfile(tensor.shard, np.uint8, count=tensor.length_bytes, offset=tensor.offset)
    except OSError as error:
        raise UserError(f"{tensor.name} cannot be read from {tensor.shard}: {error}") from error
    if len(found) < tensor.length_bytes:
        raise UserError(f"shard {tensor.shard} became shorter while it was read; {AGAIN}")
    return found


def shard_names(model_dir: Path) -> list[str]:
    """The files that the index names, if there is one; they need not be there."""
    index_path = model_dir / INDEX_NAME
    return sorted(set(_read_weight_map(index_path).values())) if index_path.is_file() else []


def _read_weight_map(index_path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index_path} is not a safetensors index ({error!r}); {AGAIN}") from error
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise UserError(f"{index_path} is not a safetensors index (it names no tensors); {AGAIN}")
    outside = [name for name in weight_map.values() if Path(name).name != name]
    if outside:
        raise UserError(f"{index_path} names {outside[0]!r}, which is not a file of its own folder; {AGAIN}")
    return weight_map


def read_shard(shard: Path) -> tuple[dict[str, str], list[StoredTensor]]:
    """What a shard's header says about it, and its tensors; `UserError` if it is missing, truncated or changed."""
    if not shard.is_file():
        raise UserError(f"shard {shard} is missing; {AGAIN}")
    size_bytes = shard.stat().st_size
    header, data_start = _read_header(shard, size_bytes)
    metadata = header.pop("__metadata__", {})
    try:
        tensors = [_stored_tensor(name, shard, entry, data_start) for name, entry in header.items()]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"shard {shard}: unreadable header ({error!r}); {AGAIN}") from error
    expected_bytes = max((tensor.offset + tensor.length_bytes for tensor in tensors), default=data_start)
    if size_bytes != expected_bytes:
        what = "truncated" if size_bytes < expected_bytes else "changed"
        raise UserError(f"shard {shard} is {what}: {size_bytes} bytes, its header says {expected_bytes}; {AGAIN}")
    return metadata, tensors


def _read_header(shard: Path, size_bytes: int) -> tuple[dict[str, Any], int]:
    """The JSON header and where the data starts."""
    with shard.open("rb") as file:
        prefix = file.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < header_bytes <= MAX_HEADER_BYTES or 8 + header_bytes > size_bytes:
            raise UserError(f"shard {shard} is truncated or no safetensors file ({size_bytes} bytes); {AGAIN}")
        try:
            header = json.loads(file.read(header_bytes))
        except ValueError as error:
            raise UserError(f"shard {shard}: unreadable header ({error}); {AGAIN}") from error
    if not isinstance(header, dict):
        raise UserError(f"shard {shard}: unreadable header (no JSON object); {AGAIN}")
    return header, 8 + header_bytes


def _stored_tensor(name: str, shard: Path, entry: dict[str, Any], data_start: int) -> StoredTensor:
    start, end = entry["data_offsets"]
    if not 0 <= start <= end:
        raise ValueError(f"{name}: data_offsets {start}, {end}")
    return StoredTensor(name, shard, entry["dtype"], tuple(entry["shape"]), data_start + start, end - start)
