"""FP8: numbers of 8 bits (E4M3) with a scale for each block, row or matrix.

As DeepSeek-V3 and Qwen3's FP8 checkpoints are stored (blocks of 128 x 128), and as compressed-tensors stores it (a scale for
each row or matrix; blocks too).
"""

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
    as_tensor,
    as_tensors,
    halves,
    rounds_to_bfloat16,
    stored_in,
)
from training.model.number_formats.kernels import by_rows, fp8_rows, fp8_rows_in_parts
from training.model.number_formats.row_products import fp8_products, fp8_products_in_parts

LARGEST = 448.0


@dataclass(frozen=True)
class Fp8:
    """One number in a byte, times the scale of its block.

    Args:
        ending: of the name of the scales.
        block: rows and columns that share a scale; None: all of them.
        scale_axes: 2, or fewer for one scale of a matrix.
    """

    ending: str
    scale_dtype: str
    block: tuple[int | None, int | None]
    scale_axes: int = 2

    name = "FP8"

    @property
    def method(self) -> str:
        return "fp8" if self.ending == "_scale_inv" else "compressed-tensors"

    def tensors(self, rows: int, columns: int) -> dict[str, Stored]:
        high, wide = self.block[0] or rows, self.block[1] or columns
        if rows % high or columns % wide:
            raise ValueError(f"{rows} x {columns} numbers are no whole blocks of {high} x {wide}")
        scales = (rows // high, columns // wide)
        return {
            "": Stored("F8_E4M3", (rows, columns)),
            self.ending: Stored(self.scale_dtype, scales if self.scale_axes == 2 else (1,) * self.scale_axes),
        }

    def decode(self, stored: Mapping[str, Bytes], out: Tensor) -> None:
        rows, columns = out.shape
        scales = self._scales(as_tensor(stored[self.ending], self.scale_dtype), columns)
        if rounds_to_bfloat16(out):
            codes_NK, block_rows = stored[""].reshape(rows, columns), self.block[0] or rows
            by_rows(fp8_rows, fp8_rows_in_parts, rows, columns, codes_NK, scales, block_rows, halves(out))
        else:
            out.copy_(self.values(as_tensors(self, stored, rows, columns)))

    def multiply(self, memory: Bytes, at_X: Mapping[str, Places], row_XK: Floats, *, rows: int) -> Floats:
        matrices, columns = row_XK.shape
        scales = self._scales(stored_in(self, memory, at_X, rows, columns, of=[self.ending])[self.ending], columns)
        found_XN, block_rows = np.empty((matrices, rows), dtype=np.float32), self.block[0] or rows
        given = memory, at_X[""], scales, block_rows, row_XK, found_XN
        by_rows(fp8_products, fp8_products_in_parts, found_XN.size, columns, *given)
        return found_XN

    def _scales(self, scales: Tensor, columns: int) -> Floats:
        """[blocks of rows, blocks of columns] of matrices below each other: what compiled loops are given."""
        found: Floats = scales.float().numpy().reshape(-1, columns // (self.block[1] or columns))
        if not np.isfinite(found).all():
            raise ValueError(f"a scale of {self.name} is no finite number")
        return found

    def values(self, stored: Mapping[str, Tensor]) -> Tensor:
        numbers, scales = stored[""].float(), stored[self.ending].float()
        if self.scale_axes < 2:
            return numbers * scales.reshape(*scales.shape[: scales.dim() - self.scale_axes], 1, 1)
        high, wide = self.block[0] or numbers.shape[-2], self.block[1] or numbers.shape[-1]
        return numbers * scales.repeat_interleave(high, dim=-2).repeat_interleave(wide, dim=-1)

    def encode(self, matrix: Tensor) -> dict[str, Tensor]:
        """The largest number of a block becomes the largest there is."""
        rows, columns = matrix.shape
        high, wide = self.block[0] or rows, self.block[1] or columns
        blocks = matrix.float().view(rows // high, high, columns // wide, wide)
        largest = blocks.abs().amax((1, 3))
        scales = (largest / LARGEST).where(largest > 0, 1).to(PLAIN_DTYPES[self.scale_dtype])
        codes = (blocks / scales.float()[:, None, :, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return {"": codes.view(rows, columns), self.ending: scales.view(self.tensors(rows, columns)[self.ending].shape)}
