"""Compiled loops that multiply stored numbers by one row, without ever writing the matrix that they stand for.

Decoding one row of the matrix stays in the processor's cache, so only what is stored is read from memory. Everything is added up
in float32; the last bits are not those of a product with the decoded matrix in 16 bits.
Axes: N rows (outputs), K columns (inputs), G blocks of a row that share a scale, B bytes of a row.
"""

import numba
import numpy as np
import numpy.typing as npt

from training.model.compiled import compiled, compiled_in_any_order, compiled_in_parts
from training.model.number_formats.kernels import Codes, Floats, looked_up, nibbles, part_of

Sizes = npt.NDArray[np.int8]
F32, I8, I32, U8, U32, U64 = np.float32, np.int8, np.int32, np.uint8, np.uint32, np.uint64


@compiled
def mxfp4_product(
    blocks_NB: Codes, scales_NG: Codes, even_B: Floats, odd_B: Floats, out_N: Floats, first: int, end: int
) -> None:
    """Numbers of 4 bits times the row's numbers in even and in odd columns; scales are 2^(s - 127), neither 0 nor 255."""
    width = blocks_NB.shape[1]
    low_B, high_B = np.empty(width, dtype=np.int8), np.empty(width, dtype=np.int8)
    exponent_B, bits_B = np.empty(width, dtype=np.uint8), np.empty(width, dtype=np.uint32)
    exponent_GW, scale_B = exponent_B.view(np.uint64).reshape(-1, 2), bits_B.view(np.float32)
    for n in range(first, end):
        _doubled(blocks_NB[n], low_B, high_B)
        _in_every_byte(scales_NG[n], exponent_GW)
        _exponents(exponent_B, bits_B)
        out_N[n] = F32(0.5) * _mxfp4_dot(low_B, high_B, even_B, odd_B, scale_B)


@compiled_in_parts
def mxfp4_product_in_parts(
    parts: int, blocks_NB: Codes, scales_NG: Codes, even_B: Floats, odd_B: Floats, out_N: Floats
) -> None:
    """The same, by so many threads."""
    for part in numba.prange(parts):
        first, end = part_of(part, parts, len(blocks_NB))
        mxfp4_product(blocks_NB, scales_NG, even_B, odd_B, out_N, first, end)


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
def fp8_product(
    codes_NK: Codes, value: Floats, scales: Floats, block_rows: int, row_K: Floats, out_N: Floats, first: int, end: int
) -> None:
    """Numbers of 8 bits, `value` of each code; `scales` as for `fp8_rows`."""
    columns, blocks = codes_NK.shape[1], scales.shape[1]
    width = columns // blocks
    value_K = np.empty(columns, dtype=np.float32)
    for n in range(first, end):
        looked_up(codes_NK[n], value, F32(1), value_K)
        found = F32(0)
        for g in range(blocks):
            part = slice(g * width, (g + 1) * width)
            found += scales[n // block_rows, g] * _dot(value_K[part], row_K[part])
        out_N[n] = found


@compiled_in_parts
def fp8_product_in_parts(
    parts: int, codes_NK: Codes, value: Floats, scales: Floats, block_rows: int, row_K: Floats, out_N: Floats
) -> None:
    """The same, by so many threads."""
    for part in numba.prange(parts):
        first, end = part_of(part, parts, len(codes_NK))
        fp8_product(codes_NK, value, scales, block_rows, row_K, out_N, first, end)


@compiled_in_any_order
def _dot(one_K: Floats, other_K: Floats) -> np.float32:
    found = F32(0)
    for k in range(len(one_K)):
        found += one_K[k] * other_K[k]
    return found


@compiled
def packed_product(
    packed_NB: Codes, bits: int, zeros: Floats, scales_NG: Floats, row_K: Floats, out_N: Floats, first: int, end: int
) -> None:
    """Unsigned numbers of 4 or 8 bits; `zeros` as for `packed_rows`."""
    columns, blocks = len(row_K), scales_NG.shape[1]
    width = columns // blocks
    codes_K, sum_G = np.empty(columns, dtype=np.uint8), np.empty(blocks, dtype=np.float32)
    for g in range(blocks):
        sum_G[g] = row_K[g * width : (g + 1) * width].sum()
    for n in range(first, end):
        if bits == 4:
            nibbles(packed_NB[n], codes_K.view(np.uint16))
        else:
            codes_K = packed_NB[n]
        found = F32(0)
        for g in range(blocks):
            zero = zeros[n, g] if len(zeros) > 1 else zeros[0, 0]
            part = slice(g * width, (g + 1) * width)
            found += scales_NG[n, g] * (_codes_dot(codes_K[part], row_K[part]) - zero * sum_G[g])
        out_N[n] = found


@compiled_in_parts
def packed_product_in_parts(
    parts: int, packed_NB: Codes, bits: int, zeros: Floats, scales_NG: Floats, row_K: Floats, out_N: Floats
) -> None:
    """The same, by so many threads."""
    for part in numba.prange(parts):
        first, end = part_of(part, parts, len(packed_NB))
        packed_product(packed_NB, bits, zeros, scales_NG, row_K, out_N, first, end)


@compiled_in_any_order
def _codes_dot(codes_K: Codes, row_K: Floats) -> np.float32:
    found = F32(0)
    for k in range(len(codes_K)):
        found += F32(I32(codes_K[k])) * row_K[k]
    return found
