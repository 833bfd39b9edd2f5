"""Frozen experts that stay quantised in memory; some experts' matrices exist while something is computed with them.

`load_packed` makes a model whose experts were never there in another form: bytes of the checkpoint go where they stay, and
experts of 16 or 32 bits are rounded one matrix at a time.
Axes: E experts of a layer, e some of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from configs.load import UserError
from training.model.expert_format import MATRICES, ExpertFormat
from training.model.expert_layout import ExpertLayout, expert_layout
from training.model.lazy_weights import StaysOnMeta, lazy_slices, load_slices, quantisation_of, read_config
from training.model.number_formats.formats import STORED_DTYPES, as_tensor
from training.model.quantising import quantised_format
from training.model.shards import AGAIN, StoredTensor, read_index


class PackedMatrices(nn.Module):
    """One matrix of all experts of a layer, in the place of a parameter [E, rows, columns]; indexed by a slice it is decoded."""

    def __init__(self, form: ExpertFormat, matrix: str, *, experts: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.shape = dtype, torch.Size((experts, *form.shape(matrix)))
        self._form, self._matrix = form, matrix
        for name in form.parts_of(matrix):
            stored_dtype, shape = form.parts[name].stored
            packed = torch.empty(experts, *shape, dtype=STORED_DTYPES[stored_dtype])
            self.register_parameter(name, nn.Parameter(packed, requires_grad=False))

    def dim(self) -> int:
        return len(self.shape)

    def __getitem__(self, some: slice) -> Tensor:
        """[e, rows, columns]; it holds until matrices are decoded again, as all use the same memory."""
        chosen = range(self.shape[0])[some]
        out = _memory((len(chosen), *self.shape[1:]), self.dtype, next(self.parameters()).device)
        stored_out = out.mT if self._form.transposed else out
        row = 0
        for role in self._form.roles:
            if (role == "down") != (self._matrix == "down"):
                continue
            rows = self._form.stored_shape(role)[0]
            self._decode(role, chosen, stored_out[:, row : row + rows])
            row += rows
        return out

    def _decode(self, role: str, chosen: range, out: Tensor) -> None:
        packed = {part.ending: self.get_parameter(name) for name, part in self._form.parts.items() if part.role == role}
        some = slice(chosen.start, chosen.stop)
        if not self.by_loops(out):
            out.copy_(self._form.numbers.values({ending: tensor[some] for ending, tensor in packed.items()}))
            return
        for place, expert in enumerate(chosen):
            stored = {ending: tensor[expert].flatten().view(torch.uint8).numpy() for ending, tensor in packed.items()}
            self._form.numbers.decode(stored, out[place])

    @staticmethod
    def by_loops(out: Tensor) -> bool:
        """Whether numbers are decoded by compiled loops, which are for the processor; otherwise by torch."""
        return out.device.type == "cpu"

    @torch.no_grad()
    def fill(self, expert: int, parts: Mapping[str, Tensor]) -> None:
        """Set what is stored of one expert."""
        for name, parameter in self.named_parameters():
            parameter[expert] = parts[name]


_MEMORY: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def _memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Where matrices are decoded: memory that is new at every call costs as much as decoding."""
    wanted, known = math.prod(shape), _MEMORY.get((dtype, device))
    if known is None or known.numel() < wanted:
        known = _MEMORY[dtype, device] = torch.empty(wanted, dtype=dtype, device=device)
    return known[:wanted].view(*shape)


def count_parameters(model: nn.Module) -> int:
    """Numbers of all parameters, of packed matrices as if each were a tensor of its own."""
    packed = [module for module in model.modules() if isinstance(module, PackedMatrices)]
    stored = sum(parameter.numel() for module in packed for parameter in module.parameters())
    return (
        sum(parameter.numel() for parameter in model.parameters()) - stored + sum(each.shape.numel() for each in packed)
    )


def packed_layout(folder: str, kind: str | None) -> tuple[ExpertLayout, ExpertFormat] | None:
    """The experts of a checkpoint and the format that they have in memory; None if that is a plain one.

    Args:
        kind: what experts of 16 or 32 bits are rounded to; None: they are as stored.

    Raises:
        UserError: they cannot be that, or config.json announces another format.
    """
    if kind is None and quantisation_of(read_config(folder))[0] is None:
        return None
    try:
        layout = expert_layout(read_index(folder), Path(folder))
    except UserError:  # transformers may know that form
        if kind is not None:
            raise
        return None
    check_announced(folder, layout.format)
    if kind is not None:
        return layout, replace(layout.format, numbers=quantised_format(kind, layout.format))
    return (layout, layout.format) if layout.format.is_quantised else None


def check_announced(folder: str | Path, form: ExpertFormat) -> None:
    """Refuse by a `UserError` experts in another format than config.json says: transformers would make others of them."""
    announced, numbers = quantisation_of(read_config(folder))[0], form.numbers
    if numbers.method is not None and numbers.method != announced:
        raise UserError(
            f"{folder}: experts are stored as {numbers.name}, which config.json announces by a quantization_config "
            f"with quant_method {numbers.method!r}, and it has {announced!r}; copy the model again, with its config.json"
        )


def load_packed(folder: str, layout: ExpertLayout, form: ExpertFormat, *, dtype: torch.dtype) -> PreTrainedModel:
    """The model in evaluation mode on the CPU, its experts in this format.

    Raises:
        UserError: see `load_slices`.
    """
    index = read_index(folder)
    others = {
        name: tensor for name, tensor in index.items() if name not in layout.module_of and name not in layout.others
    }
    later = {name: StaysOnMeta(shape) for name, shape in layout.meta_shapes.items()}
    model = load_slices(folder, {**lazy_slices(others), **later}, config=read_config(folder), dtype=dtype)
    for layer, module in experts_modules(model, layout.layer_ids, transposed=form.transposed):
        matrices = {
            matrix: PackedMatrices(form, matrix, experts=layout.num_experts, dtype=dtype) for matrix in MATRICES
        }
        for expert in range(layout.num_experts):
            parts = _packed(layout.parts[layer, expert], layout.format, form)
            for packed in matrices.values():
                packed.fill(expert, parts)
        for matrix, packed in matrices.items():
            del module._parameters[f"{matrix}_proj"]
            setattr(module, f"{matrix}_proj", packed)
    return model


def _packed(stored: Mapping[str, StoredTensor], before: ExpertFormat, form: ExpertFormat) -> dict[str, Tensor]:
    """An expert's parts as this format has them."""
    read = {name: _read(tensor) for name, tensor in stored.items()}
    if before == form:
        return read
    return {
        role + ending: part
        for role, matrix in read.items()
        for ending, part in form.numbers.encode(matrix.T if form.transposed else matrix).items()
    }


def _read(tensor: StoredTensor) -> Tensor:
    try:
        found = np.fromfile(tensor.shard, np.uint8, count=tensor.length_bytes, offset=tensor.offset)
    except OSError as error:
        raise UserError(f"{tensor.name} cannot be read from {tensor.shard}: {error}") from error
    if len(found) < tensor.length_bytes:
        raise UserError(f"shard {tensor.shard} became shorter while it was read; {AGAIN}")
    return as_tensor(found, tensor.dtype).view(tensor.shape)


def experts_modules(
    model: PreTrainedModel, layer_ids: Sequence[int], *, transposed: bool
) -> list[tuple[int, nn.Module]]:
    """(layer id, experts module on the meta device) in the order the layers run.

    Raises:
        UserError: experts are no [gate; up] and down.
    """
    layer_of = {f".layers.{layer}.": layer for layer in layer_ids}
    found = []
    for name, module in model.named_modules():
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            _check_form(name, module, transposed=transposed)
            found.append((next(layer for part, layer in layer_of.items() if part in f".{name}."), module))
    return found


def _check_form(name: str, experts: nn.Module, *, transposed: bool) -> None:
    wanted = {"has_gate": True, "is_transposed": transposed, "has_post_expert_norm": False}
    for flag, value in wanted.items():
        if getattr(experts, flag, None) != value:
            raise UserError(f"experts module {name} has {flag} other than {value}; that form is not supported")
