"""Tuned routers in a copy of an existing GGUF file; they are float32 there, whatever they were and experts are.

The copy has a few more text fields, which say what was done; every tensor but the routers keeps its bytes. Layout:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (header, fields, tensor infos, padding, data; infos end with a
tensor's type and its offset from the start of the data, where one follows the other, each on a boundary).
"""

import hashlib
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from configs.files import writing_aside
from configs.load import UserError
from training.model.shards import StoredTensor

COUNT_OF_FIELDS_AT = 16  # after magic, version and the number of tensors
TYPE_AND_OFFSET, F32 = "<IQ", gguf.GGMLQuantizationType.F32
COPIED_BYTES = 2**22
OURS = "remoe."  # what names of the fields begin with that say what was done
MADE_FROM = "give a GGUF that was made from the base the delta was trained on"
Routers = Mapping[str, Tensor]


def patch_gguf(
    base: Path, output: Path, routers: Routers, *, stored: Mapping[str, StoredTensor], about: Mapping[str, Any]
) -> None:
    """Write `base` with these routers to `output`, aside and renamed.

    Args:
        routers: by name in the loaded model.
        stored: where they lie in the base's checkpoint; in its precision the file must have the same values there.
        about: the delta's description.

    Raises:
        UserError: `base` is no GGUF, or one of another base: routers are missing or have another shape, type or value.
    """
    reader = _read(base)
    places = _places(reader, base, stored)
    fields = _text_fields(routers, about)
    fields_end = int(reader.tensors[0].field.offset)
    with writing_aside(output) as aside, base.open("rb") as source, aside.open("wb") as target:
        head = bytearray(source.read(fields_end))
        count = struct.unpack_from("<Q", head, COUNT_OF_FIELDS_AT)[0]
        before = [
            field for name, field in reader.fields.items() if name.startswith(OURS)
        ]  # of a file tuned once already
        for start, end in sorted(map(_extent, before), reverse=True):
            del head[start:end]
        struct.pack_into("<Q", head, COUNT_OF_FIELDS_AT, count + len(fields) - len(before))
        infos = bytearray(source.read(_extent(reader.tensors[-1].field)[1] - fields_end))
        routed = {str(tensor.name): routers[name] for name, tensor in places.items()}
        alignment, end = int(reader.alignment), 0
        for tensor in reader.tensors:
            kind = F32 if tensor.name in routed else tensor.tensor_type
            struct.pack_into(TYPE_AND_OFFSET, infos, _extent(tensor.field)[1] - fields_end - 12, kind, end)
            end += _padded(4 * int(tensor.n_elements) if tensor.name in routed else int(tensor.n_bytes), alignment)
        target.write(head + b"".join(fields) + infos)
        for tensor in reader.tensors:
            target.write(bytes(-target.tell() % alignment))
            if tensor.name in routed:
                target.write(routed[tensor.name].float().contiguous().numpy().astype("<f4").tobytes())
            else:
                source.seek(int(tensor.data_offset))
                _copy(source, target, int(tensor.n_bytes))
        target.write(bytes(-target.tell() % alignment))
        target.flush()
        _read_back(aside, routed)


def _padded(length: int, alignment: int) -> int:
    return -(-length // alignment) * alignment


def _copy(source: BinaryIO, target: BinaryIO, length: int) -> None:
    while length:
        part = source.read(min(length, COPIED_BYTES))
        if not part:
            raise UserError("the GGUF is truncated; copy it again")
        target.write(part)
        length -= len(part)


def _read_back(path: Path, routers: Routers) -> None:
    """Open what was written as any reader would; a `UserError` if a router is not what it should be."""
    for tensor in _read(path).tensors:
        router = routers.get(tensor.name)
        if router is not None and not np.array_equal(tensor.data.ravel(), router.float().numpy().ravel()):
            raise UserError(f"{tensor.name} was not written as it should be; check the disk that holds {path.parent}")


def _read(path: Path) -> gguf.GGUFReader:
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise UserError(f"{path} cannot be read as GGUF ({error}); {MADE_FROM}") from error
    if reader.endianess != gguf.GGUFEndian.LITTLE or not reader.tensors:
        raise UserError(f"{path} is big-endian or holds no tensors; {MADE_FROM}")
    return reader


def _places(reader: gguf.GGUFReader, path: Path, stored: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """The file's tensor of each router, by its name in the loaded model; all of them have the base's values."""
    said = {
        name: reader.fields[f"general.{name}"].contents()
        for name in ("architecture", "type")
        if f"general.{name}" in reader.fields
    }
    if said.get("type", "model") != "model" or said.get("architecture") in (None, "clip"):
        kind = said.get("type") or said.get("architecture") or "no architecture"
        raise UserError(f"{path} is not this model's GGUF but one of another kind ({kind}); {MADE_FROM}")
    if "split.count" in reader.fields and int(reader.fields["split.count"].contents()) > 1:
        raise UserError(
            f"{path} is one of {reader.fields['split.count'].contents()} parts; merge them first, with llama.cpp's "
            f"`llama-gguf-split --merge {path} merged.gguf`"
        )
    architecture = str(said["architecture"])
    known = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise UserError(f"{path} is of architecture {architecture!r}, which this gguf does not know; {MADE_FROM}")
    layers = int(reader.fields[f"{architecture}.block_count"].contents())
    names = gguf.get_tensor_name_map(known[architecture], layers)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    found = {}
    for name, place in stored.items():
        in_file = names.get_name(place.name, try_suffixes=(".weight", ".bias"))
        tensor = tensors.get(in_file or "")
        shape = None if tensor is None else tensor.shape.tolist()[::-1]
        if tensor is None or shape != [*place.shape]:
            raise UserError(
                f"{path} ({architecture}) has {in_file} of shape {shape} where the base has its router {place.name} of "
                f"shape {list(place.shape)}; {MADE_FROM}"
            )
        with safe_open(place.shard, framework="pt") as shard:
            values = shard.get_tensor(place.name)
        if not _holds(tensor, values):
            raise UserError(f"{path} has other values in {in_file} than the base in {place.shard}; {MADE_FROM}")
        found[name] = tensor
    ahead = reader.fields.get(f"{architecture}.nextn_predict_layers")  # layers at the end that predict further tokens
    own = layers - (int(ahead.contents()) if ahead else 0)
    blocks = {t: int(t.split(".")[1]) for t in tensors if ".ffn_gate_inp." in t}
    missing = [t for t, block in blocks.items() if block < own and t not in {tensor.name for tensor in found.values()}]
    if missing:
        raise UserError(f"{path} has a router {missing[0]} that the delta does not hold; {MADE_FROM}")
    return found


def _holds(tensor: gguf.ReaderTensor, values: Tensor) -> bool:
    """Whether a tensor of a file holds these values, in the precision of whichever is coarser."""
    if tensor.tensor_type == F32:  # also of a file that was tuned once, whose base holds what its own precision can
        return torch.equal(torch.from_numpy(np.array(tensor.data)).view(values.shape).to(values.dtype), values)
    try:
        quantised = gguf.quants.quantize(values.float().numpy(), tensor.tensor_type)
    except NotImplementedError:
        return False
    return np.array_equal(quantised.view(np.uint8).ravel(), np.ascontiguousarray(tensor.data).view(np.uint8).ravel())


def _extent(field: gguf.ReaderField) -> tuple[int, int]:
    """Where a field, or the info of a tensor, begins and ends in its file."""
    return int(field.offset), int(field.offset) + sum(int(part.nbytes) for part in field.parts)


def _text_fields(routers: Routers, about: Mapping[str, Any]) -> list[bytes]:
    digest = hashlib.sha256()
    for name in sorted(routers):
        digest.update(name.encode() + routers[name].float().contiguous().numpy().tobytes())
    said = {key: str(about[key]) for key in ("base_model", "base_frozen_sha256", "objective", "code_commit")}
    kind, texts = struct.pack("<I", gguf.GGUFValueType.STRING), {"router_delta_sha256": digest.hexdigest(), **said}
    return [_text(f"{OURS}{key}") + kind + _text(value) for key, value in texts.items()]


def _text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw
