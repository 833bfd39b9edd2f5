"""Compiled loops that multiply matrices of stored numbers by one row each, without ever writing what the numbers stand for.

Decoding one row of a matrix stays in the processor's cache, so only what is stored is read from memory. Everything is added up
in float32; the last bits are not those of a product with the decoded matrix in 16 bits.
The matrices lie anywhere in one `memory`, each tensor of matrix x at byte `..._at_X[x]`. Loops go through the rows `first` to
`end` of all matrices as if these stood below each other, and as `..._in_parts` through all, shared out among threads.
Axes: X matrices, N rows (outputs), K columns (inputs), G blocks of a row that share a scale, B bytes of a row.
"""

import numba
import numpy as np
import numpy.typing as npt

from training.model.compiled import compiled, compiled_in_any_order, compiled_in_parts
from training.model.number_formats.kernels import (
    LARGEST_SCALE,
    LEAST_SCALE,
    Codes,
    Floats,
    all_within,
    as_float,
    nibbles,
    part_of,
)

Places = npt.NDArray[np.int64]
Sizes = npt.NDArray[np.int8]
F32, I8, I32, U8, U32, U64 = np.float32, np.int8, np.int32, np.uint8, np.uint32, np.uint64
FP8_HALF_BIAS = np.float32(2.0**60)
"""By which both factors of a sum of `_fp8_dot` are multiplied, so that neither is too large or too small."""


@compiled
def mxfp4_products(
    memory: Codes,
    codes_at_X: Places,
    scales_at_X: Places,
    even_XB: Floats,
    odd_XB: Floats,
    out_XN: Floats,
    first: int,
    end: int,
) -> None:
    """Numbers of 4 bits times the row's numbers in even and in odd columns; NaN where a scale 2^(s - 127) is not normal."""
    rows, width = out_XN.shape[1], even_XB.shape[1]
    blocks = width // 16
    low_B, high_B = np.empty(width, dtype=np.int8), np.empty(width, dtype=np.int8)
    exponent_B, bits_B = np.empty(width, dtype=np.uint8), np.empty(width, dtype=np.uint32)
    exponent_GW, scale_B = exponent_B.view(np.uint64).reshape(-1, 2), bits_B.view(np.float32)
    for row in range(first, end):
        x, n = row // rows, row % rows
        codes, scales = codes_at_X[x] + n * width, scales_at_X[x] + n * blocks
        _doubled(memory[codes : codes + width], low_B, high_B)
        _in_every_byte(memory[scales : scales + blocks], exponent_GW)
        _exponents(exponent_B, bits_B)
        product = F32(0.5) * _mxfp4_dot(low_B, high_B, even_XB[x], odd_XB[x], scale_B)
        is_normal = all_within(memory[scales : scales + blocks], LEAST_SCALE, LARGEST_SCALE)
        out_XN[x, n] = product if is_normal else np.nan


@compiled_in_parts
def mxfp4_products_in_parts(
    parts: int, memory: Codes, codes_at_X: Places, scales_at_X: Places, even_XB: Floats, odd_XB: Floats, out_XN: Floats
) -> None:
    """The same, by so many threads."""
    for part in numba.prange(parts):
        first, end = part_of(part, parts, out_XN.size)
        mxfp4_products(memory, codes_at_X, scales_at_X, even_XB, odd_XB, out_XN, first, end)


@compiled
def _doubled(codes_B: Codes, low_B: Sizes, high_B: Sizes) -> None:
    """Twice the numbers, which are whole: 0, 1, 2, 3, 4, 6, 8, 12, or less than 0."""
    for b in range(len(codes_B)):
        low_B[b] = _doubled_one(U8(codes_B[b] & U8(15)))
        high_B[b] = _doubled_one(U8(codes_B[b] >> U8(4)))


@numba.njit(inline="always")
def _doubled_one(code: np.uint8) -> np.int8:
    size = U8(code & U8(7))
    beyond_4, beyond_6 = U8(U8(max(size, U8(4))) - U8(4)), U8(U8(max(size, U8(6))) - U8(6))
    doubled = U8(U8(size + beyond_4) + U8(beyond_6 + beyond_6))
    minus = U8(U8(0) - U8(code >> U8(3)))
    return I8(U8(U8(doubled ^ minus) - minus))


@compiled
def _in_every_byte(scales_G: Codes, out_GW: npt.NDArray[np.uint64]) -> None:
    """Each 16 times, as often as there are bytes in a block."""
    for g in range(len(scales_G)):
        word = U64(U64(scales_G[g]) * U64(0x0101010101010101))
        out_GW[g, 0], out_GW[g, 1] = word, word


@compiled
def _exponents(scales_B: Codes, out_B: npt.NDArray[np.uint32]) -> None:
    """Powers of two as the bits of float32."""
    for b in range(len(scales_B)):
        out_B[b] = U32(U32(scales_B[b]) << U32(23))


@compiled_in_any_order
def _mxfp4_dot(low_B: Sizes, high_B: Sizes, even_B: Floats, odd_B: Floats, scale_B: Floats) -> np.float32:
    found = F32(0)
    for b in range(len(low_B)):
        found += (F32(I32(low_B[b])) * even_B[b] + F32(I32(high_B[b])) * odd_B[b]) * scale_B[b]
    return found


@compiled
def fp8_products(
    memory: Codes,
    codes_at_X: Places,
    scales: Floats,
    block_rows: int,
    row_XK: Floats,
    out_XN: Floats,
    first: int,
    end: int,
) -> None:
    """Numbers of 8 bits (E4M3).

    Args:
        scales: [X x blocks of rows, G]; G divides K.
    """
    rows, columns = out_XN.shape[1], row_XK.shape[1]
    scaled_K, scaled_for = np.empty(columns, dtype=np.float32), -1
    for row in range(first, end):
        x, n = row // rows, row % rows
        block = x * (rows // block_rows) + n // block_rows
        if block != scaled_for:
            _scaled(row_XK[x], scales[block], scaled_K)
            scaled_for = block
        start = codes_at_X[x] + n * columns
        codes_K = memory[start : start + columns]
        if _largest_size(codes_K) == 127:
            out_XN[x, n] = np.nan
        else:
            out_XN[x, n] = _fp8_dot(codes_K, scaled_K) * FP8_HALF_BIAS


@compiled_in_parts
def fp8_products_in_parts(
    parts: int, memory: Codes, codes_at_X: Places, scales: Floats, block_rows: int, row_XK: Floats, out_XN: Floats
) -> None:
    """The same, by so many threads."""
    for part in numba.prange(parts):
        first, end = part_of(part, parts, out_XN.size)
        fp8_products(memory, codes_at_X, scales, block_rows, row_XK, out_XN, first, end)


@compiled
def _scaled(row_K: Floats, scales_G: Floats, out_K: Floats) -> None:
    width = len(row_K) // len(scales_G)
    for g in range(len(scales_G)):
        scale = scales_G[g] * FP8_HALF_BIAS
        for k in range(g * width, (g + 1) * width):
            out_K[k] = row_K[k] * scale


@compiled
def _largest_size(codes_K: Codes) -> np.uint8:
    largest = U8(0)
    for k in range(len(codes_K)):
        largest = max(largest, U8(codes_K[k] & U8(127)))
    return largest


@compiled_in_any_order
def _fp8_dot(codes_K: Codes, row_K: Floats) -> np.float32:
    """2^-120 of it: sign, exponent and mantissa stand where those of float32 begin, so exponents count from elsewhere."""
    found = F32(0)
    for k in range(len(codes_K)):
        bits = U32(U32(I32(I8(codes_K[k])) << I32(20)) & U32(0x87F00000))
        found += as_float(bits) * row_K[k]
    return found


@compiled
def packed_products(
    memory: Codes,
    codes_at_X: Places,
    bits: int,
    zeros: Floats,
    scales: Floats,
    row_XK: Floats,
    out_XN: Floats,
    first: int,
    end: int,
) -> None:
    """Unsigned numbers of 4 or 8 bits, less their block's zero, times its scale.

    Args:
        zeros: [X x N, G], or [1, 1]: the same for all.
        scales: [X x N, G]; G divides K.
    """
    rows, columns, blocks = out_XN.shape[1], row_XK.shape[1], scales.shape[1]
    width, length = columns // blocks, columns * bits // 8
    codes_K, sum_G = np.empty(columns, dtype=np.uint8), np.empty(blocks, dtype=np.float32)
    summed = -1  # the matrix whose row is added up in `sum_G`
    for row in range(first, end):
        x, n = row // rows, row % rows
        if x != summed:
            for g in range(blocks):
                sum_G[g] = row_XK[x, g * width : (g + 1) * width].sum()
            summed = x
        codes, found = codes_at_X[x] + n * length, F32(0)
        if bits == 4:
            nibbles(memory[codes : codes + length], codes_K.view(np.uint16))
        else:
            codes_K = memory[codes : codes + length]
        for g in range(blocks):
            zero = zeros[row, g] if len(zeros) > 1 else zeros[0, 0]
            part = slice(g * width, (g + 1) * width)
            found += scales[row, g] * (_codes_dot(codes_K[part], row_XK[x, part]) - zero * sum_G[g])
        out_XN[x, n] = found


@compiled_in_parts
def packed_products_in_parts(
    parts: int,
    memory: Codes,
    codes_at_X: Places,
    bits: int,
    zeros: Floats,
    scales: Floats,
    row_XK: Floats,
    out_XN: Floats,
) -> None:
    """The same, by so many threads."""
    for part in numba.prange(parts):
        first, end = part_of(part, parts, out_XN.size)
        packed_products(memory, codes_at_X, bits, zeros, scales, row_XK, out_XN, first, end)


@compiled_in_any_order
def _codes_dot(codes_K: Codes, row_K: Floats) -> np.float32:
    found = F32(0)
    for k in range(len(codes_K)):
        found += F32(I32(codes_K[k])) * row_K[k]
    return found
