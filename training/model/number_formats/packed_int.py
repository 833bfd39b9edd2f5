"""Integers of 4 or 8 bits packed into words, a scale for a group of a row: `pack-quantized` of compressed-tensors."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.model.number_formats.formats import (
    PLAIN_DTYPES,
    Bytes,
    Stored,
    as_tensor,
    halves,
    rounds_to_bfloat16,
)
from training.model.number_formats.kernels import by_rows, packed_rows


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
        group = self.group or columns
        scales_NG = as_tensor(stored["_scale"], self.scale_dtype).view(rows, columns // group)
        if not scales_NG.isfinite().all():
            raise ValueError(f"a scale of {self.name} is no finite number")
        packed_NB, zeros = stored["_packed"].reshape(rows, columns * self.bits // 8), self._zeros(stored, scales_NG)
        if rounds_to_bfloat16(out) and self.scale_dtype != "F16":  # which is rounded to before bfloat16 is
            by_rows(packed_rows, rows, columns, packed_NB, self.bits, zeros, scales_NG.float().numpy(), halves(out))
            return
        codes_NK = torch.from_numpy(packed_NB if self.bits == 8 else _nibbles(packed_NB)).float()
        zeros_NK = torch.from_numpy(zeros).expand_as(scales_NG).repeat_interleave(group, dim=1)
        numbers_NK = (codes_NK - zeros_NK).to(PLAIN_DTYPES[self.scale_dtype])
        out.copy_(numbers_NK * scales_NG.repeat_interleave(group, dim=1))

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

    def _zeros(
        self, stored: Mapping[str, Bytes], scales_NG: Tensor
    ) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        """[N, G], as unsigned numbers; [1, 1] where all are the same."""
        if not self.has_zeros:
            return np.full((1, 1), 2 ** (self.bits - 1), dtype=np.float32)
        rows, groups = scales_NG.shape
        packed_GB = stored["_zero_point"].view(np.int32).reshape(-1, groups).T.copy().view(np.uint8)
        codes_GN = packed_GB if self.bits == 8 else _nibbles(packed_GB)
        return np.ascontiguousarray(codes_GN[:, :rows].T).astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    return np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)
