"""Integers of 4 or 8 bits packed into words, a scale for a group of a row: `pack-quantized` of compressed-tensors."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.model.number_formats.formats import (
    PLAIN_DTYPES,
    Bytes,
    Floats,
    Places,
    Stored,
    as_tensors,
    halves,
    in_bfloat16,
    rounds_to_bfloat16,
    stored_in,
)
from training.model.number_formats.kernels import by_rows, packed_rows, packed_rows_in_parts
from training.model.number_formats.row_products import packed_products, packed_products_in_parts


@dataclass(frozen=True)
class PackedInt:
    """Numbers between -2^(bits - 1) and 2^(bits - 1) - 1, stored without their sign; the first in the lowest bits of a word.

    Args:
        group: numbers of a row that share a scale; None: the whole row.
        has_zeros: whether each group has a zero of its own, packed along the rows.
    """

    bits: int
    group: int | None
    scale_dtype: str
    has_zeros: bool = False

    method = "compressed-tensors"

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def tensors(self, rows: int, columns: int) -> dict[str, Stored]:
        in_word, group = 32 // self.bits, self.group or columns
        if columns % in_word or columns % group:
            raise ValueError(
                f"{columns} columns are no whole groups of {group}, or no whole words of {in_word} numbers"
            )
        found = {
            "_packed": Stored("I32", (rows, columns // in_word)),
            "_scale": Stored(self.scale_dtype, (rows, columns // group)),
        }
        if self.has_zeros:
            found["_zero_point"] = Stored("I32", (-(-rows // in_word), columns // group))
        return found

    def decode(self, stored: Mapping[str, Bytes], out: Tensor) -> None:
        rows, columns = out.shape
        tensors = as_tensors(self, stored, rows, columns)
        zeros, scales = self._zeros_and_scales(tensors, rows)
        given = stored["_packed"].reshape(rows, columns * self.bits // 8), self.bits, zeros, scales
        if self.scale_dtype != "BF16" and not (self.scale_dtype == "F32" and rounds_to_bfloat16(out)):
            out.copy_(self.values(tensors))
            return
        with in_bfloat16(out) as rounded:  # as scales in bfloat16 make others round to it
            by_rows(packed_rows, packed_rows_in_parts, rows, columns, *given, halves(rounded))

    def multiply(self, memory: Bytes, at_X: Mapping[str, Places], row_XK: Floats, *, rows: int) -> Floats:
        matrices, columns = row_XK.shape
        small = [ending for ending in self.tensors(rows, columns) if ending != "_packed"]
        zeros, scales = self._zeros_and_scales(stored_in(self, memory, at_X, rows, columns, of=small), rows)
        found_XN = np.empty((matrices, rows), dtype=np.float32)
        given = memory, at_X["_packed"], self.bits, zeros, scales, row_XK, found_XN
        by_rows(packed_products, packed_products_in_parts, found_XN.size, columns, *given)
        return found_XN

    def _zeros_and_scales(self, stored: Mapping[str, Tensor], rows: int) -> tuple[Floats, Floats]:
        """[rows, groups] of matrices below each other, twice; of zeros [1, 1] where all are the same."""
        scales: Floats = stored["_scale"].float().flatten(0, -2).numpy()
        if not np.isfinite(scales).all():
            raise ValueError(f"a scale of {self.name} is no finite number")
        zeros: Floats = self._zeros(stored, rows).float().flatten(0, -2).numpy()
        return zeros, scales

    def values(self, stored: Mapping[str, Tensor]) -> Tensor:
        codes, scales = self._codes(stored["_packed"]).float(), stored["_scale"]
        group = codes.shape[-1] // scales.shape[-1]
        zeros = self._zeros(stored, codes.shape[-2]).float().expand(scales.shape).repeat_interleave(group, dim=-1)
        return (codes - zeros).to(scales.dtype) * scales.repeat_interleave(group, dim=-1)

    def encode(self, matrix: Tensor) -> dict[str, Tensor]:
        """The numbers of a group that are largest in size become the largest or smallest there are."""
        rows, columns = matrix.shape
        groups_NGg = matrix.float().view(rows, columns // (self.group or columns), -1)
        largest_NG, middle = groups_NGg.abs().amax(2), 2 ** (self.bits - 1)
        scales_NG = (largest_NG / (middle - 0.5)).where(largest_NG > 0, 1).to(PLAIN_DTYPES[self.scale_dtype])
        numbers_NGg = (groups_NGg / scales_NG.float().unsqueeze(2)).round().clamp(-middle, middle - 1)
        codes_NK = (numbers_NGg + middle).to(torch.uint8).view(rows, columns)
        packed_NB = codes_NK if self.bits == 8 else codes_NK[:, 0::2] + 16 * codes_NK[:, 1::2]
        return {"_packed": packed_NB.contiguous().view(torch.int32), "_scale": scales_NG}

    def _zeros(self, stored: Mapping[str, Tensor], rows: int) -> Tensor:
        """[..., N, G], as unsigned numbers; [1, 1] where all are the same."""
        if not self.has_zeros:
            return torch.full((1, 1), 2 ** (self.bits - 1), device=stored["_scale"].device)
        return self._codes(stored["_zero_point"].mT.contiguous())[..., :rows].mT.contiguous()

    def _codes(self, packed: Tensor) -> Tensor:
        """Unsigned numbers, from words of a row."""
        codes = packed.view(torch.uint8)
        return codes if self.bits == 8 else torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
