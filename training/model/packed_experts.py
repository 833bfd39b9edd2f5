"""Frozen experts that stay as they are stored, in memory or on disk; some experts' matrices exist while they are computed with.

`load_packed` makes a model whose experts were never there in another form: bytes of the checkpoint go where they stay, and
experts of 16 or 32 bits that are to be quantised are rounded one matrix at a time.
Axes: E experts of a layer, e some of them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from configs.load import UserError
from training.model.disk_memory import DiskTensor
from training.model.expert_format import MATRICES, ExpertFormat
from training.model.expert_layout import ExpertLayout, expert_layout
from training.model.host_memory import huge_pages
from training.model.lazy_weights import (
    StaysOnMeta,
    lazy_slices,
    load_slices,
    names_in_model,
    quantisation_of,
    read_config,
)
from training.model.number_formats.formats import STORED_DTYPES, Stored, as_tensor
from training.model.quantising import quantised_format
from training.model.shards import StoredTensor, read_bytes, read_index

ALIGNED = 16
"""Bytes: every part of an expert begins at a multiple, so that it can be looked at as numbers of any size."""


class PackedMatrices:
    """One matrix of all experts of a layer, in the place of a parameter [E, rows, columns]; indexed by a slice it is decoded.

    What is stored is one parameter of the experts module in the model's precision, whatever it holds: libraries that lay
    weights out over processes take no others. Each expert's parts follow each other, from the next `ALIGNED` bytes on.
    """

    def __init__(self, experts: nn.Module, form: ExpertFormat, matrix: str, *, number: int, dtype: torch.dtype) -> None:
        self.dtype, self.shape = dtype, torch.Size((number, *form.shape(matrix)))
        self._experts, self._form, self._matrix = experts, form, matrix
        self._on_disk: DiskTensor | None = None
        self._places: dict[str, slice] = {}
        end = 0
        for name in form.parts_of(matrix):
            length = form.parts[name].stored.length_bytes
            self._places[name] = slice(end, end + length)
            end += -(-length // ALIGNED) * ALIGNED
        packed = torch.empty(number, end // dtype.itemsize, dtype=dtype, device="meta")
        experts.register_parameter(f"packed_{matrix}", nn.Parameter(packed, requires_grad=False))

    def make_memory(self, disk: Path | None = None) -> None:
        """For what is stored, which is on the meta device at first; in a file in the folder `disk`, if that is given."""
        if disk is not None:
            self._on_disk = DiskTensor(self.packed.shape, self.packed.dtype, disk)
        # between parts there is something too, always the same
        packed = self._on_disk.tensor if self._on_disk else torch.zeros_like(self.packed, device="cpu")
        self._experts.register_parameter(f"packed_{self._matrix}", nn.Parameter(packed, requires_grad=False))

    @property
    def packed(self) -> nn.Parameter:
        """[E, numbers that an expert takes]; sharded, its parts are gathered while the module computes."""
        return self._experts.get_parameter(f"packed_{self._matrix}")

    def dim(self) -> int:
        return len(self.shape)

    def __getitem__(self, some: slice) -> Tensor:
        """[e, rows, columns]; it holds until matrices are decoded again, as all use the same memory."""
        bytes_eB = self.packed.detach()[some].view(torch.uint8)
        if self._on_disk:  # those that come next are read while these are computed with
            start, stop, _ = some.indices(len(self.packed))
            self._on_disk.read_ahead(slice(start, 2 * stop - start))
        out = _memory((len(bytes_eB), *self.shape[1:]), self.dtype, bytes_eB.device)
        stored_out = out.mT if self._form.transposed and self._form.is_quantised else out
        row = 0
        for role in self._form.roles:
            if (role == "down") != (self._matrix == "down"):
                continue
            rows = self._form.stored_shape(role)[0]
            self._decode(role, bytes_eB, stored_out[:, row : row + rows])
            row += rows
        return out

    def _decode(self, role: str, bytes_eB: Tensor, out: Tensor) -> None:
        parts = {
            self._form.parts[name]: place for name, place in self._places.items() if self._form.parts[name].role == role
        }
        if not self.by_loops(out):
            stored = {part.ending: _as_stored(bytes_eB[:, place], part.stored) for part, place in parts.items()}
            out.copy_(self._form.numbers.values(stored))
            return
        as_bytes = np.from_dlpack(bytes_eB)  # after numpy() torch could not give the memory back, as FSDP2 does
        for expert_B, out_of_one in zip(as_bytes, out, strict=True):
            self._form.numbers.decode({part.ending: expert_B[place] for part, place in parts.items()}, out_of_one)

    @staticmethod
    def by_loops(out: Tensor) -> bool:
        """Whether numbers are decoded by compiled loops, which are for the processor; otherwise by torch."""
        return out.device.type == "cpu"

    @torch.no_grad()
    def fill(self, expert: int, parts: Mapping[str, Tensor]) -> None:
        """Set what is stored of one expert."""
        for name, place in self._places.items():
            self.packed[expert].view(torch.uint8)[place] = parts[name].contiguous().flatten().view(torch.uint8)


def _as_stored(bytes_eN: Tensor, stored: Stored) -> Tensor:
    """[e, ...]: the tensors that these bytes are."""
    return bytes_eN.view(STORED_DTYPES[stored.dtype]).view(len(bytes_eN), *stored.shape)


_MEMORY: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def _memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Where matrices are decoded: memory that is new at every call costs as much as decoding."""
    wanted, known = math.prod(shape), _MEMORY.get((dtype, device))
    if known is None or known.numel() < wanted:
        if device.type == "cpu":
            known = torch.frombuffer(huge_pages(wanted * dtype.itemsize), dtype=dtype)
        else:
            known = torch.empty(wanted, dtype=dtype, device=device)
        _MEMORY[dtype, device] = known
    return known[:wanted].view(*shape)


def count_parameters(model: nn.Module) -> int:
    """Numbers of all parameters, of packed matrices as if each were a tensor of its own."""
    packed = [each for module in model.modules() for each in packed_matrices(module)]
    more = sum(each.shape.numel() - each.packed.numel() for each in packed)
    return more + sum(parameter.numel() for parameter in model.parameters())


def packed_matrices(module: nn.Module) -> list[PackedMatrices]:
    """Those of one experts module; none of any other."""
    return [each for each in vars(module).values() if isinstance(each, PackedMatrices)]


def expert_modules(module: nn.Module) -> list[nn.Module]:
    """The modules that hold the weights of all experts of a layer: stacked, [experts, rows, columns], or packed."""
    return [m for m in module.modules() if packed_matrices(m) or any(p.dim() == 3 for p in m.parameters(recurse=False))]


def packed_layout(folder: str, kind: str | None, *, on_disk: bool = False) -> tuple[ExpertLayout, ExpertFormat] | None:
    """The experts of a checkpoint and the format that they have; None if transformers loads them, into memory.

    Args:
        kind: what experts of 16 or 32 bits are rounded to; None: they are as stored.
        on_disk: of any format, as they are not to be in memory.

    Raises:
        UserError: they cannot be that, or config.json announces another format.
    """
    if kind is None and not on_disk and quantisation_of(read_config(folder))[0] is None:
        return None
    try:
        layout = expert_layout(read_index(folder), Path(folder))
    except UserError:  # transformers may know that form
        if kind is not None or on_disk:
            raise
        return None
    check_announced(folder, layout.format)
    if kind is not None:
        return layout, replace(layout.format, numbers=quantised_format(kind, layout.format))
    return (layout, layout.format) if layout.format.is_quantised or on_disk else None


def check_announced(folder: str | Path, form: ExpertFormat) -> None:
    """Refuse by a `UserError` experts in another format than config.json says: transformers would make others of them."""
    announced, numbers = quantisation_of(read_config(folder))[0], form.numbers
    if numbers.method is not None and numbers.method != announced:
        raise UserError(
            f"{folder}: experts are stored as {numbers.name}, which config.json announces by a quantization_config "
            f"with quant_method {numbers.method!r}, and it has {announced!r}; copy the model again, with its config.json"
        )


def load_packed(
    folder: str, layout: ExpertLayout, form: ExpertFormat, *, dtype: torch.dtype, disk: Path | None = None
) -> PreTrainedModel:
    """The model in evaluation mode on the CPU, its experts in this format, in files in the folder `disk` if that is given.

    Raises:
        UserError: see `load_slices`.
    """
    index = read_index(folder)
    others = {
        name: tensor for name, tensor in index.items() if name not in layout.module_of and name not in layout.others
    }
    later = {name: StaysOnMeta(shape) for name, shape in layout.meta_shapes.items()}
    model = load_slices(folder, {**lazy_slices(others), **later}, config=read_config(folder), dtype=dtype)
    pack(model, layout, form)
    fill_packed(model, "", layout, form, disk=disk)
    return model


def pack(model: PreTrainedModel, layout: ExpertLayout, form: ExpertFormat) -> None:
    """Put experts in this format in the place of those that are on the meta device; they are there too.

    Raises:
        UserError: experts are no [gate; up] and down.
    """
    for name in {target.rpartition(".")[0] for target in names_in_model(model, layout.meta_shapes).values()}:
        experts = model.get_submodule(name)
        check_form(name, experts, transposed=form.transposed)
        for matrix in MATRICES:
            before = experts.get_parameter(f"{matrix}_proj")
            delattr(experts, f"{matrix}_proj")
            packed = PackedMatrices(experts, form, matrix, number=layout.num_experts, dtype=before.dtype)
            setattr(experts, f"{matrix}_proj", packed)


def fill_packed(
    part: nn.Module, name: str, layout: ExpertLayout, form: ExpertFormat, *, disk: Path | None = None
) -> None:
    """Read the experts in the part of the model of that name, one after the other; what is stored otherwise is rounded."""
    matrices_of = {found: packed_matrices(module) for found, module in part.named_modules(prefix=name)}
    for packed in chain.from_iterable(matrices_of.values()):
        packed.make_memory(disk)
    for module, matrices in matrices_of.items():
        if not matrices:
            continue
        layer = layer_id(module, layout.layer_ids)
        for expert in range(layout.num_experts):
            parts = _packed(layout.parts[layer, expert], layout.format, form)
            for packed in matrices:
                packed.fill(expert, parts)


def layer_id(module: str, layer_ids: Iterable[int]) -> int:
    """Which of these layers a module is in."""
    return next(layer for layer in layer_ids if f".layers.{layer}." in f".{module}.")


def _packed(stored: Mapping[str, StoredTensor], before: ExpertFormat, form: ExpertFormat) -> dict[str, Tensor]:
    """An expert's parts as this format has them."""
    read = {name: as_tensor(read_bytes(one), one.dtype).view(one.shape) for name, one in stored.items()}
    if before == form:
        return read
    return {
        role + ending: part
        for role, matrix in read.items()
        for ending, part in form.numbers.encode(matrix.T if form.transposed else matrix).items()
    }


def check_form(name: str, experts: nn.Module, *, transposed: bool) -> None:
    """Refuse by a `UserError` experts that are no [gate; up] and down."""
    wanted = {"has_gate": True, "is_transposed": transposed, "has_post_expert_norm": False}
    for flag, value in wanted.items():
        if getattr(experts, flag, None) != value:
            raise UserError(f"experts module {name} has {flag} other than {value}; that form is not supported")
