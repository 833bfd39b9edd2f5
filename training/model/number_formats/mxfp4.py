"""MXFP4: numbers of 4 bits (sign, two bits of exponent, one of mantissa) that share a power of two, 32 of a row at a time.

As gpt-oss is stored, and as compressed-tensors stores any model (`mxfp4-pack-quantized`); OCP Microscaling Formats 1.0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from training.model.number_formats.formats import (
    Bytes,
    Floats,
    Places,
    Stored,
    as_tensors,
    halves,
    in_bfloat16,
    multiply_values,
)
from training.model.number_formats.kernels import (
    LARGEST_SCALE,
    LEAST_SCALE,
    all_within,
    by_rows,
    mxfp4_columns,
    mxfp4_columns_in_parts,
    mxfp4_rows,
    mxfp4_rows_in_parts,
)
from training.model.number_formats.mxfp4_x86 import (
    COLUMNS,
    ROWS,
    as_multiplied,
    can_look_up,
    can_multiply,
    mxfp4_columns_looked_up,
    mxfp4_columns_looked_up_in_parts,
    mxfp4_dots,
    mxfp4_dots_in_parts,
    mxfp4_rows_looked_up,
    mxfp4_rows_looked_up_in_parts,
)
from training.model.number_formats.row_products import mxfp4_products, mxfp4_products_in_parts

BLOCK = 32
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
BIAS, NO_NUMBER = 127, 255
LARGEST_EXPONENT = 2
"""Of 6, the largest number."""


@dataclass(frozen=True)
class Mxfp4:
    """Two numbers in a byte, the first in its low half; a byte s of scale for each block, 2^(s - 127)."""

    is_gpt_oss: bool  # its names, and blocks as an axis of their own

    name = "MXFP4"

    @property
    def method(self) -> str:
        return "mxfp4" if self.is_gpt_oss else "compressed-tensors"

    @property
    def _endings(self) -> tuple[str, str]:
        return ("_blocks", "_scales") if self.is_gpt_oss else ("_packed", "_scale")

    def tensors(self, rows: int, columns: int) -> dict[str, Stored]:
        if columns % BLOCK:
            raise ValueError(f"{columns} columns are no whole blocks of {BLOCK}")
        blocks = columns // BLOCK
        codes = (rows, blocks, BLOCK // 2) if self.is_gpt_oss else (rows, columns // 2)
        return dict(zip(self._endings, (Stored("U8", codes), Stored("U8", (rows, blocks))), strict=True))

    def decode(self, stored: Mapping[str, Bytes], out: Tensor) -> None:
        rows, columns = out.shape
        codes, scales = (stored[ending] for ending in self._endings)
        codes_NB, scales_NG = codes.reshape(rows, columns // 2), scales.reshape(rows, columns // BLOCK)
        if not self._are_normal(scales):
            out.copy_(self.values(as_tensors(self, stored, rows, columns)))
        elif out.dtype == torch.bfloat16 and out.T.is_contiguous() and rows % 8 == 0:
            given = rows, columns, codes_NB, scales_NG, halves(out.T)
            if can_look_up() and rows % ROWS == 0:
                by_rows(mxfp4_columns_looked_up, mxfp4_columns_looked_up_in_parts, *given)
            else:
                by_rows(mxfp4_columns, mxfp4_columns_in_parts, *given)
        else:
            with in_bfloat16(out) as rounded:  # which has all these numbers
                given = rows, columns, codes_NB, scales_NG, halves(rounded)
                if can_look_up() and columns % COLUMNS == 0:
                    by_rows(mxfp4_rows_looked_up, mxfp4_rows_looked_up_in_parts, *given)
                else:
                    by_rows(mxfp4_rows, mxfp4_rows_in_parts, *given)

    def multiply(self, memory: Bytes, at_X: Mapping[str, Places], row_XK: Floats, *, rows: int) -> Floats:
        (matrices, columns), (codes, scales) = row_XK.shape, self._endings
        found_XN = np.empty((matrices, rows), dtype=np.float32)
        sizes, places = (found_XN.size, columns), (memory, at_X[codes], at_X[scales])
        half_XK = as_multiplied(row_XK) if can_multiply() else None
        if half_XK is not None:
            by_rows(mxfp4_dots, mxfp4_dots_in_parts, *sizes, *places, half_XK, found_XN)
        else:
            even_XB, odd_XB = (np.ascontiguousarray(row_XK[:, start::2]) for start in range(2))
            by_rows(mxfp4_products, mxfp4_products_in_parts, *sizes, *places, even_XB, odd_XB, found_XN)
        if np.isfinite(found_XN).all():
            return found_XN
        length = rows * columns // BLOCK
        are_normal = [self._are_normal(memory[start : start + length]) for start in at_X[scales]]
        return found_XN if all(are_normal) else multiply_values(self, memory, at_X, row_XK, rows=rows)

    def _are_normal(self, scales: Bytes) -> bool:
        """Whether they are what the compiled loops are for; a `ValueError` if one is no number."""
        if all_within(scales, LEAST_SCALE, LARGEST_SCALE):
            return True
        if scales.max() == NO_NUMBER:
            raise ValueError(f"a scale of {self.name} is {NO_NUMBER}, which is no number")
        return False

    def values(self, stored: Mapping[str, Tensor]) -> Tensor:
        codes, scales = (stored[ending] for ending in self._endings)
        codes = codes.flatten(-2) if self.is_gpt_oss else codes
        numbers = torch.tensor(VALUES, device=codes.device)[
            torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).int()
        ]
        return numbers * torch.exp2(scales.float() - BIAS).repeat_interleave(BLOCK, dim=-1)

    def encode(self, matrix: Tensor) -> dict[str, Tensor]:
        """The largest number of a block decides its scale, as the standard has it; what is then beyond 6 becomes 6."""
        rows, columns = matrix.shape
        blocks_NGb = matrix.float().view(rows, columns // BLOCK, BLOCK)
        exponents_NG = torch.frexp(blocks_NGb.abs().amax(2)).exponent - 1  # of the largest: 2^e <= it < 2^(e + 1)
        exponents_NG = (exponents_NG - LARGEST_EXPONENT).clamp(LEAST_SCALE - BIAS, LARGEST_SCALE - BIAS)
        sizes_NGb = torch.ldexp(blocks_NGb, -exponents_NG.unsqueeze(2)).abs()
        codes_NGb = torch.zeros(sizes_NGb.shape, dtype=torch.uint8)
        for code, (low, high) in enumerate(pairwise(VALUES[:8])):  # ties go to the even one of two codes
            middle = (low + high) / 2
            codes_NGb += sizes_NGb > middle if code % 2 == 0 else sizes_NGb >= middle
        codes_NGb += 8 * blocks_NGb.signbit().to(torch.uint8)
        packed_NB = codes_NGb[:, :, 0::2] + 16 * codes_NGb[:, :, 1::2]
        codes, scales = self.tensors(rows, columns).items()
        return {
            codes[0]: packed_NB.reshape(codes[1].shape),
            scales[0]: (exponents_NG + BIAS).to(torch.uint8),
        }
