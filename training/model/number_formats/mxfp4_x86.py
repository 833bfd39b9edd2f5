"""Decoding MXFP4, and multiplying by it, with the vector instructions of x86 processors.

A number of 4 bits is looked up in a table that lies in a register (AVX2), and products of two pairs of numbers in bfloat16 are
added up at once (AVX512-BF16): neither can be written in Python, so the loop over a row is given to the compiler in its own
language (LLVM's, by numba's `intrinsic`). 64 numbers are worked on at once: 32 bytes, two blocks, of which each half of a
register holds one; or, where the transpose is written, a block of 32 rows.
Instructions: `vpshufb` and `vdpbf16ps`, Intel 64 Architectures Software Developer's Manual, volume 2; the latter takes what is
below 2^-126 for 0.
Axes: X matrices, N rows (outputs), K columns (inputs), G blocks of a row, B bytes of a row.
"""

from functools import cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from training.model.compiled import compiled, compiled_in_parts
from training.model.number_formats.kernels import (
    LARGEST_SCALE,
    LEAST_SCALE,
    Codes,
    Floats,
    all_within,
    part_of,
)

COLUMNS = 64
"""That are worked on at once; loops are for whole numbers of them."""
ROWS, TILE_ROWS = 32, 2048
"""Likewise where the transpose is written; and how many are written column by column, for long stretches of memory."""
Halves = npt.NDArray[np.uint16]
Places = npt.NDArray[np.int64]
U16, U32 = np.uint16, np.uint32
_CONFIG: Any = numba.config
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


_I8, _I16, _I32, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
_8_F32, _16_I8, _32_I8, _16_I16, _16_BF16 = (
    ir.VectorType(of, lanes) for of, lanes in ((_F32, 8), (_I8, 16), (_I8, 32), (_I16, 16), (_BFloat(), 16))
)
_2_I8, _2_I16, _2_I32, _2_F32 = (ir.VectorType(of, 2) for of in (_I8, _I16, _I32, _F32))


def can_look_up() -> bool:
    """Whether this processor has the instructions of `mxfp4_rows_looked_up`, and numba may use them."""
    return "+avx2" in _features(_CONFIG.CPU_FEATURES)


def can_multiply() -> bool:
    """Whether it has those of `mxfp4_dots`."""
    return _features(_CONFIG.CPU_FEATURES) >= {"+avx2", "+avx512vl", "+avx512bf16"}


@cache
def _features(allowed: str | None) -> frozenset[str]:
    """Of this processor, if NUMBA_CPU_NAME or NUMBA_CPU_FEATURES does not say otherwise."""
    return frozenset((get_host_cpu_features() if allowed is None else allowed).split(","))


@compiled
def mxfp4_rows_looked_up(blocks_NB: Codes, scales_NG: Codes, out_NK: Halves, first: int, end: int) -> None:
    """As `mxfp4_rows` in kernels.py."""
    codes, scales, out = blocks_NB.ctypes.data, scales_NG.ctypes.data, out_NK.ctypes.data
    for n in range(first, end):
        at = codes + n * blocks_NB.shape[1], scales + n * scales_NG.shape[1], out + n * out_NK.shape[1] * 2
        _decode(np.uintp(at[0]), np.uintp(at[1]), np.uintp(at[2]), out_NK.shape[1] // COLUMNS)


@compiled_in_parts
def mxfp4_rows_looked_up_in_parts(parts: int, blocks_NB: Codes, scales_NG: Codes, out_NK: Halves) -> None:
    """The same, by so many threads."""
    for part in numba.prange(parts):
        first, end = part_of(part, parts, len(blocks_NB))
        mxfp4_rows_looked_up(blocks_NB, scales_NG, out_NK, first, end)


@compiled
def mxfp4_columns_looked_up(blocks_NB: Codes, scales_NG: Codes, out_KN: Halves, first: int, end: int) -> None:
    """As `mxfp4_columns` in kernels.py, rows in multiples of `ROWS`."""
    powers_N = np.empty(ROWS, dtype=np.uint16)
    codes, powers, out = blocks_NB.ctypes.data, powers_N.ctypes.data, out_KN.ctypes.data
    row_bytes, out_bytes = blocks_NB.shape[1], out_KN.shape[1] * 2
    for start in range(first, end, TILE_ROWS):
        for g in range(scales_NG.shape[1]):
            for row in range(start, min(start + TILE_ROWS, end), ROWS):
                for n in range(ROWS):
                    powers_N[n] = U16(((np.int32(scales_NG[row + n, g]) - 127) << 7) & 0xFFFF)
                at = codes + row * row_bytes + 16 * g, out + 32 * g * out_bytes + row * 2
                _decode_block(
                    np.uintp(at[0]), np.uintp(row_bytes), np.uintp(powers), np.uintp(at[1]), np.uintp(out_bytes)
                )


@compiled_in_parts
def mxfp4_columns_looked_up_in_parts(parts: int, blocks_NB: Codes, scales_NG: Codes, out_KN: Halves) -> None:
    """The same, by so many threads."""
    for part in numba.prange(parts):
        first, end = part_of(part, parts, len(blocks_NB), ROWS)
        mxfp4_columns_looked_up(blocks_NB, scales_NG, out_KN, first, end)


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


_untyped: Any = intrinsic  # its type asks callers for the first argument, which it gives


@_untyped
def _decode(typing: Any, codes: Any, scales: Any, out: Any, steps: Any) -> Any:
    """So many times 32 bytes of codes and their two scales, into 64 numbers in bfloat16; all at these addresses."""
    return types.void(types.uintp, types.uintp, types.uintp, types.intp), _write_decode


def _write_decode(context: Any, write: Any, signature: Any, given: Any) -> Any:
    codes, scales, out, steps = given
    with cgutils.for_range(write, steps) as loop:
        numbers = _looked_up(write, _load(write, codes, loop.index, 32, 0, _32_I8))
        exponents = write.zext(_load(write, scales, loop.index, 2, 0, _2_I8), _2_I16)
        powers = write.shl(write.sub(exponents, _constant(_2_I16, [127, 127])), _constant(_2_I16, [7, 7]))
        powers = _spread(write, powers, 16)
        scaled = [_scaled(write, one, powers) for one in numbers]
        for half in (0, 1):  # of each block: the numbers of its first, or last, 8 bytes
            even, odd = scaled[half], scaled[2 + half]
            for block in (0, 1):
                order = [which for i in range(8) for which in (8 * block + i, 16 + 8 * block + i)]
                following = write.shuffle_vector(even, odd, _constant(ir.VectorType(_I32, 16), order))
                to = _address(write, out, loop.index, 2 * COLUMNS, 64 * block + 32 * half, _16_I16)
                write.store(following, to, align=1)
    return context.get_dummy_value()


@_untyped
def _decode_block(typing: Any, codes: Any, row_bytes: Any, powers: Any, out: Any, out_bytes: Any) -> Any:
    """16 bytes of each of 32 rows, which are so far apart, into 32 columns of 32 numbers in bfloat16, likewise apart.

    `powers` is the address of 32 numbers of 16 bits: what the rows' scales add to the bits of a number.
    """
    address = types.uintp
    return types.void(address, address, address, address, address), _write_decode_block


def _write_decode_block(context: Any, write: Any, signature: Any, given: Any) -> Any:
    codes, row_bytes, powers, out, out_bytes = given
    rows = [
        _load(write, write.add(codes, write.mul(row_bytes, _number(row_bytes, n))), row_bytes, 0, 0, _16_I8)
        for n in range(ROWS)
    ]
    powers_2 = [_load(write, powers, powers, 0, 32 * half, _16_I16) for half in (0, 1)]
    # Of two rows that are 16 apart bytes are taken in turn, 5 times: then two follow each other that hold a byte of all rows
    for _ in range(5):
        pairs = zip(rows[: ROWS // 2], rows[ROWS // 2 :], strict=True)
        rows = [_in_turn(write, *pair, first) for pair in pairs for first in (0, 8)]
    both = _constant(ir.VectorType(_I32, 32), list(range(32)))
    for byte in range(16):
        bytes_32 = write.shuffle_vector(rows[2 * byte], rows[2 * byte + 1], both)
        for half, (low_bytes, high_bytes) in enumerate(_bytes_looked_up(write, bytes_32)):
            for part in (0, 1):
                order = [which for i in range(16) for which in (16 * part + i, 32 + 16 * part + i)]
                numbers = write.shuffle_vector(low_bytes, high_bytes, _constant(ir.VectorType(_I32, 32), order))
                column = write.add(out, write.mul(out_bytes, _number(out_bytes, 2 * byte + half)))
                to = _address(write, column, column, 0, 32 * part, _16_I16)
                write.store(_scaled(write, numbers, powers_2[part]), to, align=1)
    return context.get_dummy_value()


@_untyped
def _dot(typing: Any, codes: Any, scales: Any, row: Any, steps: Any) -> Any:
    """So many times 32 bytes of codes and their two scales, times 64 numbers of the row; all at these addresses."""
    return types.float32(types.uintp, types.uintp, types.uintp, types.intp), _write_dot


def _write_dot(context: Any, write: Any, signature: Any, given: Any) -> Any:
    codes, scales, row, steps = given
    add_products = _instruction(write, "llvm.x86.avx512bf16.dpbf16ps.256", _8_F32, _8_F32, _16_BF16, _16_BF16)
    multiply_add = _instruction(write, "llvm.fma.v8f32", _8_F32, _8_F32, _8_F32, _8_F32)
    add_up = _instruction(write, "llvm.vector.reduce.fadd.v8f32", _F32, _F32, _8_F32)
    zeros = ir.Constant(_8_F32, [0.0] * 8)
    total = cgutils.alloca_once_value(write, zeros)
    with cgutils.for_range(write, steps) as loop:
        found = zeros
        for i, numbers in enumerate(_looked_up(write, _load(write, codes, loop.index, 32, 0, _32_I8))):
            of_row = _load(write, row, loop.index, 2 * COLUMNS, 32 * i, _16_BF16)
            found = write.call(add_products, [found, write.bitcast(numbers, _16_BF16), of_row])
        exponents = write.zext(_load(write, scales, loop.index, 2, 0, _2_I8), _2_I32)
        powers = write.bitcast(write.shl(exponents, _constant(_2_I32, [23, 23])), _2_F32)
        write.store(write.call(multiply_add, [found, _spread(write, powers, 8), write.load(total)]), total)
    return write.call(add_up, [ir.Constant(_F32, 0.0), write.load(total)], fastmath=["reassoc"])


def _looked_up(write: Any, bytes_32: Any) -> list[Any]:
    """Four times 16 numbers in bfloat16, of both blocks half: even columns, first and last 8 bytes; then odd columns likewise.

    The numbers of the bytes' low halves are in even columns. Each number is looked up byte by byte.
    """
    found = []
    for low_bytes, high_bytes in _bytes_looked_up(write, bytes_32):
        for first in (0, 8):
            at = [block + first + i for block in (0, 16) for i in range(8)]
            order = [byte for place in at for byte in (place, 32 + place)]
            found.append(write.shuffle_vector(low_bytes, high_bytes, _constant(ir.VectorType(_I32, 32), order)))
    return found


def _bytes_looked_up(write: Any, bytes_32: Any) -> list[tuple[Any, Any]]:
    """Of the bytes' low and of their high halves: the lower bytes of their numbers in bfloat16, and the upper ones."""
    look_up = _instruction(write, "llvm.x86.avx2.pshuf.b", _32_I8, _32_I8, _32_I8)
    lower, upper = (_constant(_32_I8, [bits >> shift & 0xFF for bits in _TABLE]) for shift in (0, 8))
    low_halves = write.and_(bytes_32, _constant(_32_I8, [15] * 32))
    high_halves = write.lshr(bytes_32, _constant(_32_I8, [4] * 32))
    return [
        (write.call(look_up, [lower, each]), write.call(look_up, [upper, each])) for each in (low_halves, high_halves)
    ]


def _scaled(write: Any, numbers: Any, powers: Any) -> Any:
    """16 numbers in bfloat16 with as many powers of two added to their exponents; both zeros stay."""
    bits = write.bitcast(numbers, _16_I16)
    is_zero = write.icmp_unsigned("==", write.shl(bits, _constant(_16_I16, [1] * 16)), _constant(_16_I16, [0] * 16))
    return write.select(is_zero, bits, write.add(bits, powers))


def _in_turn(write: Any, one: Any, other: Any, first: int) -> Any:
    """Eight bytes of each, from this one on, in turn."""
    order = [which for i in range(first, first + 8) for which in (i, 16 + i)]
    return write.shuffle_vector(one, other, _constant(ir.VectorType(_I32, 16), order))


def _spread(write: Any, pair: Any, lanes: int) -> Any:
    """One of two numbers in each half of a register."""
    order = _constant(ir.VectorType(_I32, lanes), [0] * (lanes // 2) + [1] * (lanes // 2))
    return write.shuffle_vector(pair, ir.Constant(pair.type, ir.Undefined), order)


def _load(write: Any, start: Any, index: Any, step: int, offset: int, kind: Any) -> Any:
    return write.load(_address(write, start, index, step, offset, kind), align=1)


def _address(write: Any, start: Any, index: Any, step: int, offset: int, kind: Any) -> Any:
    at = write.add(start, write.mul(index, _number(index, step)))
    return write.inttoptr(write.add(at, _number(at, offset)), kind.as_pointer())


def _number(like: Any, value: int) -> Any:
    return ir.Constant(like.type, value)


def _instruction(write: Any, name: str, gives: Any, *takes: Any) -> Any:
    return cgutils.get_or_insert_function(write.module, ir.FunctionType(gives, takes), name)


def _constant(kind: Any, values: list[int]) -> Any:
    return ir.Constant(kind, [ir.Constant(kind.element, value) for value in values])
