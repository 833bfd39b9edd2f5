"""What a number format is, the plain one, and which format the matrices of a checkpoint are in.

A matrix of `rows` x `columns` is stored as one tensor or several, whose names end differently: the numbers, their scales.
Decoding gives what transformers (5.23) gives when it loads the same tensors on a CPU, bit for bit.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.model.number_formats.kernels import gathered

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Places = npt.NDArray[np.int64]
PLAIN_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""Precisions in which weights can be computed with, by the names that safetensors has for them."""
STORED_DTYPES = {
    **PLAIN_DTYPES,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}


class Stored(NamedTuple):
    """What is said of a tensor of a checkpoint."""

    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]

    @property
    def length_bytes(self) -> int:
        return math.prod(self.shape) * STORED_DTYPES[self.dtype].itemsize


class NumberFormat(Protocol):
    """How a matrix is stored. Formats that are equal store all matrices alike."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def method(self) -> str | None:
        """The `quant_method` by which config.json announces it; None: nothing is announced."""

    def tensors(self, rows: int, columns: int) -> dict[str, Stored]:
        """What a matrix is stored as, by how the tensors' names end; a `ValueError` if no matrix of that shape can be."""

    def decode(self, stored: Mapping[str, Bytes], out: Tensor) -> None:
        """Fill `out` [rows, columns], in a plain precision; it may be the transpose of what lies in memory row by row.

        Args:
            stored: the bytes of each of `tensors`.

        Raises:
            ValueError: a scale is no finite number.
        """

    def multiply(self, memory: Bytes, at_X: Mapping[str, Places], row_XK: Floats, *, rows: int) -> Floats:
        """[X, rows]: the products of matrices that lie in one memory, each with a row of its own, added up in float32.

        Args:
            at_X: the first byte of each of `tensors`, of every matrix.
            rows: of each matrix.

        Raises:
            ValueError: a scale is no finite number.
        """

    def values(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The same numbers by torch, on any device, of matrices that may be stacked: [..., rows, columns].

        They are in a precision from which casting them gives what `decode` does.
        """

    def encode(self, matrix: Tensor) -> dict[str, Tensor]:
        """The nearest numbers that this format has, as `tensors`, with scales by the largest number that shares them."""


@dataclass(frozen=True)
class Plain:
    """Numbers of 16 or 32 bits in floating point."""

    dtype: str
    method = None

    @property
    def name(self) -> str:
        return str(PLAIN_DTYPES[self.dtype]).removeprefix("torch.")

    def tensors(self, rows: int, columns: int) -> dict[str, Stored]:
        return {"": Stored(self.dtype, (rows, columns))}

    def decode(self, stored: Mapping[str, Bytes], out: Tensor) -> None:
        out.copy_(as_tensor(stored[""], self.dtype).view(out.shape))

    def multiply(self, memory: Bytes, at_X: Mapping[str, Places], row_XK: Floats, *, rows: int) -> Floats:
        return multiply_values(self, memory, at_X, row_XK, rows=rows)

    def values(self, stored: Mapping[str, Tensor]) -> Tensor:
        return stored[""]

    def encode(self, matrix: Tensor) -> dict[str, Tensor]:
        return {"": matrix.to(PLAIN_DTYPES[self.dtype])}


def as_tensor(stored: Bytes, dtype: str) -> Tensor:
    """The bytes as a flat tensor; nothing is copied."""
    return torch.from_numpy(stored).view(STORED_DTYPES[dtype])


def as_tensors(numbers: NumberFormat, stored: Mapping[str, Bytes], rows: int, columns: int) -> dict[str, Tensor]:
    """The bytes of a matrix as the tensors that it is stored as."""
    of = numbers.tensors(rows, columns)
    return {ending: as_tensor(stored[ending], one.dtype).view(one.shape) for ending, one in of.items()}


def stored_in(
    numbers: NumberFormat, memory: Bytes, at_X: Mapping[str, Places], rows: int, columns: int, *, of: Iterable[str] = ()
) -> dict[str, Tensor]:
    """The tensors of matrices that lie in one memory, stacked: a copy of all, or of those whose names end so."""
    tensors, found = numbers.tensors(rows, columns), {}
    for ending in of or tensors:
        one = tensors[ending]
        found[ending] = as_tensor(gathered(memory, at_X[ending], one.length_bytes), one.dtype).view(-1, *one.shape)
    return found


def multiply_values(
    numbers: NumberFormat, memory: Bytes, at_X: Mapping[str, Places], row_XK: Floats, *, rows: int
) -> Floats:
    """What `multiply` does, slowly, for any format."""
    matrix_XNK = numbers.values(stored_in(numbers, memory, at_X, rows, row_XK.shape[1])).float()
    found: Floats = torch.einsum("xnk,xk->xn", matrix_XNK, torch.from_numpy(row_XK)).numpy()
    return found


@contextmanager
def in_bfloat16(out: Tensor) -> Iterator[Tensor]:
    """What the compiled loops fill, row by row: `out`, or something that is then copied into it."""
    rounded = out if rounds_to_bfloat16(out) else torch.empty(out.shape, dtype=torch.bfloat16)
    yield rounded
    if rounded is not out:
        out.copy_(rounded)


def rounds_to_bfloat16(out: Tensor) -> bool:
    """Whether `out` is what the compiled loops write: bfloat16, row by row."""
    return out.dtype == torch.bfloat16 and out.is_contiguous()


def halves(out: Tensor) -> npt.NDArray[np.uint16]:
    """The numbers of 16 bits as integers; nothing is copied."""
    return out.view(torch.uint16).numpy()
