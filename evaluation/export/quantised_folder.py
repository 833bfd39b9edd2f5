"""A checkpoint of 16 or 32 bits written anew with quantised experts, in a standard layout that transformers loads.

Numbers are rounded to the nearest that a format has. Routers and everything else stay as they are, byte for byte. One matrix
is in memory at a time, and what was written is read back before the folder gets its name.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from torch import Tensor
from tqdm import tqdm

from configs.files import folder_aside
from configs.load import UserError
from evaluation.engine.store.experts import ExpertStore
from evaluation.engine.store.packing import OTHER_WEIGHTS, chunks, header
from training.model.lazy_weights import lazy_slices
from training.model.number_formats.formats import Bytes, NumberFormat, Stored, as_tensor
from training.model.number_formats.fp8 import Fp8
from training.model.number_formats.mxfp4 import BLOCK as MXFP4_BLOCK
from training.model.number_formats.packed_int import PackedInt
from training.model.quantising import quantised_format
from training.model.shards import INDEX_NAME, StoredTensor, read_shard


def write_quantised(model_dir: Path, output: Path, kind: str) -> NumberFormat:
    """Write the whole folder anew, aside and renamed; a full disk or a `UserError` leaves nothing behind."""
    store = ExpertStore(model_dir)
    numbers, index_path = quantised_format(kind, store.format), model_dir / INDEX_NAME
    with folder_aside(output) as aside:
        for path in tqdm(sorted(model_dir.iterdir()), desc=f"experts to {kind}", unit="file"):
            if path.suffix == ".safetensors":
                _write_shard(path, aside / path.name, store, numbers)
            elif path.is_file() and path.suffix not in OTHER_WEIGHTS and path != index_path:
                shutil.copyfile(path, aside / path.name)
        if index_path.is_file():
            _write_index(index_path, aside)
        config = json.loads((aside / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = announcement(numbers, store)
        (aside / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        _read_back(store, aside, numbers)
    return numbers


@dataclass(frozen=True)
class _Matrices:
    """One tensor of experts and what becomes of it."""

    tensor: StoredTensor
    numbers: NumberFormat
    is_transposed: bool  # in the model, and as it was stored

    def written(self) -> list[StoredTensor]:
        """What takes its place, in the order in which it is written."""
        return written_as(self.tensor, self.numbers, is_transposed=self.is_transposed)

    def encoded(self) -> Iterator[Tensor]:
        """The same, matrix by matrix: the numbers of all first, then their scales."""
        matrices = lazy_slices({self.tensor.name: self.tensor})[self.tensor.name]
        is_stacked, later = len(self.tensor.shape) == 3, []
        for place in range(self.tensor.shape[0]) if is_stacked else (slice(None),):
            matrix = matrices[place]
            numbers, *others = self.numbers.encode(matrix.T if self.is_transposed else matrix).values()
            later.append(others)
            yield numbers
        for each in zip(*later, strict=True):
            yield from each
        if isinstance(self.numbers, PackedInt):
            yield torch.tensor(self.tensor.shape)


def written_as(tensor: StoredTensor, numbers: NumberFormat, *, is_transposed: bool) -> list[StoredTensor]:
    """What takes the place of a tensor of experts; `is_transposed`: in the model, and as it was stored."""
    *stacked, rows, columns = tensor.shape
    shape = (columns, rows) if is_transposed else (rows, columns)
    found = {ending: Stored(dtype, (*stacked, *each)) for ending, (dtype, each) in numbers.tensors(*shape).items()}
    if isinstance(numbers, PackedInt):
        found["_shape"] = Stored("I64", (2,))
    return [
        replace(tensor, name=tensor.name + ending, dtype=one.dtype, shape=one.shape, length_bytes=one.length_bytes)
        for ending, one in found.items()
    ]


def _write_shard(shard: Path, target: Path, store: ExpertStore, numbers: NumberFormat) -> None:
    metadata, tensors = read_shard(shard)
    experts = {t.name: _Matrices(t, numbers, store.format.transposed) for t in tensors if t.name in store.names}
    order = [one for t in tensors for one in (experts[t.name].written() if t.name in experts else [t])]
    with shard.open("rb") as source, target.open("wb") as file:
        file.write(header(metadata, order))
        for tensor in tensors:
            if tensor.name in experts:
                for part in experts[tensor.name].encoded():
                    file.write(raw(part))
            else:
                for chunk in chunks(source, tensor):
                    file.write(chunk)


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _write_index(index_path: Path, folder: Path) -> None:
    """The index of what was written, with all else that the old one says."""
    index = json.loads(index_path.read_text(encoding="utf-8"))
    shards = {name: read_shard(folder / name)[1] for name in sorted(set(index["weight_map"].values()))}
    index["weight_map"] = {tensor.name: name for name, tensors in shards.items() for tensor in tensors}
    total_bytes = sum(tensor.length_bytes for tensors in shards.values() for tensor in tensors)
    index["metadata"] = {**index.get("metadata", {}), "total_size": total_bytes}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")


def announcement(numbers: NumberFormat, store: ExpertStore) -> dict[str, Any]:
    """`quantization_config` of a config.json: the experts, and no other matrix."""
    matrices = [name for name, tensor in store.resident.items() if len(tensor.shape) == 2]
    others = sorted(
        {name.removesuffix(".weight") for name in matrices} | {"lm_head"}
    )  # which is not stored where it is tied
    if numbers.method == "mxfp4":
        return {"quant_method": "mxfp4", "modules_to_not_convert": others}
    if isinstance(numbers, Fp8):
        how = {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": list(numbers.block),
        }
        return {**how, "modules_to_not_convert": others}
    is_int = isinstance(numbers, PackedInt)
    weights = QuantizationArgs(
        num_bits=numbers.bits if isinstance(numbers, PackedInt) else 4, type="int" if is_int else "float", symmetric=True,
        strategy="group", group_size=numbers.group if isinstance(numbers, PackedInt) else MXFP4_BLOCK,
        **({} if is_int else {"scale_dtype": torch.uint8, "zp_dtype": torch.uint8}),
    )  # fmt: skip
    layout = "pack-quantized" if is_int else "mxfp4-pack-quantized"
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=layout)
    whole = QuantizationConfig(
        config_groups={"experts": scheme}, format=layout, quantization_status="compressed", ignore=others
    )
    return json.loads(whole.model_dump_json(exclude_none=True))


def _read_back(store: ExpertStore, folder: Path, numbers: NumberFormat) -> None:
    """Read one expert of every layer as any reader would find it; a `UserError` if it is not what it should be."""
    written, form = ExpertStore(folder), store.format
    for place, layer in enumerate(store.layer_ids):
        expert = place % store.num_experts
        found, before = written.tensors(layer, expert), store.tensors(layer, expert)
        for role, tensor in before.items():
            matrix = as_tensor(_bytes(tensor), tensor.dtype).view(tensor.shape)
            for ending, part in numbers.encode(matrix.T if form.transposed else matrix).items():
                if written.format.numbers != numbers or _bytes(found[role + ending]).data != raw(part):
                    told = f"layer {layer} expert {expert} was not written as it should be"
                    raise UserError(f"{told}; check the disk that holds {folder.parent}")


def _bytes(tensor: StoredTensor) -> Bytes:
    return np.fromfile(tensor.shard, np.uint8, count=tensor.length_bytes, offset=tensor.offset)
