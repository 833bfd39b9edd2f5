"""Products of MXFP4 numbers by a row in bfloat16, with the instructions that x86 processors have for that (AVX512-BF16).

A number of 4 bits is looked up in a table that lies in a register, and products of two pairs are added up at once: neither can
be written in Python, so the loop over a row is given to the compiler in its own language (LLVM's, by numba's `intrinsic`).
Instructions: `vpshufb` and `vdpbf16ps`, Intel 64 Architectures Software Developer's Manual, volume 2; the latter takes what is
below 2^-126 for 0.
Axes: X matrices, N rows (outputs), K columns (inputs).
"""

from functools import cache
from typing import Any, cast

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from training.model.compiled import compiled, compiled_in_parts
from training.model.number_formats.kernels import LARGEST_SCALE, LEAST_SCALE, Codes, Floats, all_within, part_of

COLUMNS = 64
"""That are multiplied at once: 32 bytes, two blocks."""
Halves = npt.NDArray[np.uint16]
Places = npt.NDArray[np.int64]
U16, U32 = np.uint16, np.uint32
_BITS = [int(number) >> 16 for number in np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32).view(np.uint32)]
_TABLE = [*_BITS, *(bits | 0x8000 for bits in _BITS)] * 2
"""A code's number in bfloat16; twice, as each half of a register looks in its own."""


class _BFloat(ir.types.Type):
    """LLVM's type, which llvmlite does not name."""

    null = "0.0"
    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_I8, _I32, _F32 = ir.IntType(8), ir.IntType(32), ir.FloatType()
_8_F32, _32_I8, _16_BF16 = ir.VectorType(_F32, 8), ir.VectorType(_I8, 32), ir.VectorType(_BFloat(), 16)
_2_I8, _2_I32, _2_F32 = (ir.VectorType(of, 2) for of in (_I8, _I32, _F32))


@cache
def is_possible() -> bool:
    """Whether this processor has the instructions, and numba may use them (`NUMBA_CPU_NAME`, `NUMBA_CPU_FEATURES`)."""
    allowed: str | None = cast(Any, numba.config).CPU_FEATURES
    has = (get_host_cpu_features() if allowed is None else allowed).split(",")
    return all(f"+{name}" in has for name in ("avx2", "avx512vl", "avx512bf16"))


def as_multiplied(row_XK: Floats) -> Halves | None:
    """[X, K]: rows in bfloat16, in the order of `_dot`; None where they are of more bits, or no whole number of `COLUMNS`."""
    found_XK = np.empty(row_XK.shape, dtype=np.uint16)
    is_whole = row_XK.shape[1] % COLUMNS == 0 and _in_order(row_XK.view(np.uint32), found_XK)
    return found_XK if is_whole else None


@compiled
def _in_order(bits_XK: npt.NDArray[np.uint32], out_XK: Halves) -> bool:
    """Even columns come before odd ones, and of both the first 8 of two blocks before the last 8; whether no bit was lost."""
    lost = U32(0)
    for x in range(len(bits_XK)):
        for start in range(0, bits_XK.shape[1], COLUMNS):
            to = start
            for first in (0, 16, 1, 17):
                for block in (0, 32):
                    for column in range(start + block + first, start + block + first + 16, 2):
                        lost |= U32(bits_XK[x, column] << U32(16))
                        out_XK[x, to] = U16(bits_XK[x, column] >> U32(16))
                        to += 1
    return lost == 0


@compiled
def mxfp4_dots(
    memory: Codes, codes_at_X: Places, scales_at_X: Places, row_XK: Halves, out_XN: Floats, first: int, end: int
) -> None:
    """As `mxfp4_products` in row_products.py, of rows as `as_multiplied` makes them."""
    rows, columns = out_XN.shape[1], row_XK.shape[1]
    for row in range(first, end):
        x, n = row // rows, row % rows
        codes, scales = codes_at_X[x] + n * (columns // 2), scales_at_X[x] + n * (columns // 32)
        if all_within(memory[scales : scales + columns // 32], LEAST_SCALE, LARGEST_SCALE):
            start, given = memory.ctypes.data, row_XK.ctypes.data + x * columns * 2
            out_XN[x, n] = _dot(np.uintp(start + codes), np.uintp(start + scales), np.uintp(given), columns // COLUMNS)
        else:
            out_XN[x, n] = np.nan


@compiled_in_parts
def mxfp4_dots_in_parts(
    parts: int, memory: Codes, codes_at_X: Places, scales_at_X: Places, row_XK: Halves, out_XN: Floats
) -> None:
    """The same, by so many threads."""
    for part in numba.prange(parts):
        first, end = part_of(part, parts, out_XN.size)
        mxfp4_dots(memory, codes_at_X, scales_at_X, row_XK, out_XN, first, end)


@cast(Any, intrinsic)  # whose type asks callers for the first argument, which it gives
def _dot(typing: Any, codes: Any, scales: Any, row: Any, steps: Any) -> Any:
    """So many times 32 bytes of codes and their two scales, times 64 numbers of the row; all at these addresses.

    A register's halves hold a block each. The numbers of the bytes' low halves are in even columns, those of the high halves
    in odd ones, and each is looked up byte by byte: so 16 numbers are the first, or the last, 8 bytes of both blocks.
    """
    return types.float32(types.uintp, types.uintp, types.uintp, types.intp), _write_dot


def _write_dot(context: Any, write: Any, signature: Any, given: Any) -> Any:
    codes, scales, row, steps = given
    look_up = _instruction(write, "llvm.x86.avx2.pshuf.b", _32_I8, _32_I8, _32_I8)
    add_products = _instruction(write, "llvm.x86.avx512bf16.dpbf16ps.256", _8_F32, _8_F32, _16_BF16, _16_BF16)
    multiply_add = _instruction(write, "llvm.fma.v8f32", _8_F32, _8_F32, _8_F32, _8_F32)
    add_up = _instruction(write, "llvm.vector.reduce.fadd.v8f32", _F32, _F32, _8_F32)
    low_table, high_table = (_constant(_32_I8, [bits >> shift & 0xFF for bits in _TABLE]) for shift in (0, 8))
    zeros = ir.Constant(_8_F32, [0.0] * 8)
    total = cgutils.alloca_once_value(write, zeros)
    with cgutils.for_range(write, steps) as loop:

        def load(start: Any, step: int, offset: int, kind: Any) -> Any:
            at = write.add(start, write.mul(loop.index, ir.Constant(loop.index.type, step)))
            at = write.add(at, ir.Constant(at.type, offset))
            return write.load(write.inttoptr(at, kind.as_pointer()), align=1)

        bytes_32 = load(codes, 32, 0, _32_I8)
        low_halves = write.and_(bytes_32, _constant(_32_I8, [15] * 32))
        high_halves = write.lshr(bytes_32, _constant(_32_I8, [4] * 32))
        found, offset = zeros, 0
        for halves in (low_halves, high_halves):
            low_bytes, high_bytes = (write.call(look_up, [table, halves]) for table in (low_table, high_table))
            for first in (0, 8):
                order = [
                    byte for block in (0, 16) for i in range(8) for byte in (block + first + i, 32 + block + first + i)
                ]
                numbers = write.shuffle_vector(low_bytes, high_bytes, _constant(ir.VectorType(_I32, 32), order))
                numbers = write.bitcast(numbers, _16_BF16)
                found = write.call(add_products, [found, numbers, load(row, 2 * COLUMNS, offset, _16_BF16)])
                offset += 32
        exponents = write.zext(load(scales, 2, 0, _2_I8), _2_I32)
        powers = write.bitcast(write.shl(exponents, _constant(_2_I32, [23, 23])), _2_F32)
        spread = _constant(ir.VectorType(_I32, 8), [0] * 4 + [1] * 4)
        powers = write.shuffle_vector(powers, ir.Constant(_2_F32, ir.Undefined), spread)
        write.store(write.call(multiply_add, [found, powers, write.load(total)]), total)
    return write.call(add_up, [ir.Constant(_F32, 0.0), write.load(total)], fastmath=["reassoc"])


def _instruction(write: Any, name: str, gives: Any, *takes: Any) -> Any:
    return cgutils.get_or_insert_function(write.module, ir.FunctionType(gives, takes), name)


def _constant(kind: Any, values: list[int]) -> Any:
    return ir.Constant(kind, [ir.Constant(kind.element, value) for value in values])
