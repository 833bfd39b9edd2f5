"""Compiled loops that turn stored numbers into bfloat16, rounded to nearest, ties to even.

Each works on the rows `first` to `end` of a matrix, and as `..._in_parts` on all of them, shared out among threads.
Loops are written so that the compiler makes vectors of them: types are named at every step, since numba would widen them.
Axes: N rows, K columns, G blocks of a row that share a scale, B bytes of a row, W words of 8 bytes.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from training.model.compiled import compiled, compiled_in_parts, inlined, threads_to_share

Codes = npt.NDArray[np.uint8]
Halves = npt.NDArray[np.uint16]
Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint64]
SHARED_NUMBERS = 2**16
"""A smaller matrix is decoded by one thread: some ten microseconds, as long as it takes to share it out."""
LEAST_SCALE, LARGEST_SCALE = 2, 252
"""Of MXFP4: between them every number but 0 has a full exponent in bfloat16; others go through float32."""
TILE_ROWS = 512
"""Rows that are written column by column, so that whole cache lines are."""
U16, U32, U64, F32 = np.uint16, np.uint32, np.uint64, np.float32


def by_rows(loop: Callable[..., None], in_parts: Callable[..., None], rows: int, columns: int, *given: Any) -> None:
    """Run a loop over all rows of a matrix, `in_parts` if it is large enough to be shared out."""
    threads = threads_to_share() if rows * columns >= SHARED_NUMBERS else 1
    if threads > 1:
        in_parts(threads, *given)
    else:
        loop(*given, 0, rows)


@inlined
def part_of(part: int, parts: int, rows: int, multiple: int = 8) -> tuple[int, int]:
    """First row and end of one of so many parts, which begin at multiples of 8, or of another number."""
    first, end = rows * part // parts, rows * (part + 1) // parts
    return first // multiple * multiple, rows if part == parts - 1 else end // multiple * multiple


@compiled
def gathered(memory: Codes, at_X: npt.NDArray[np.int64], length: int) -> Codes:
    """So many bytes from each of these places, below each other, flat."""
    found = np.empty(len(at_X) * length, dtype=np.uint8)
    for x in range(len(at_X)):
        found[x * length : (x + 1) * length] = memory[at_X[x] : at_X[x] + length]
    return found


@compiled
def all_within(codes: Codes, least: int, largest: int) -> bool:
    """Whether all of a flat array are."""
    found = True
    for code in codes:
        found &= (code >= least) & (code <= largest)
    return found


@compiled
def mxfp4_rows(blocks_NB: Codes, scales_NG: Codes, out_NK: Halves, first: int, end: int) -> None:
    """Two numbers of 4 bits in a byte, the first in the low half, into two of 16 bits that follow each other."""
    pairs_B, add_W = np.empty(blocks_NB.shape[1], dtype=np.uint32), np.empty(out_NK.shape[1] // 4, dtype=np.uint64)
    codes_K, add_K, add_GW = pairs_B.view(np.uint16), add_W.view(np.uint16), add_W.reshape(-1, 8)
    for n in range(first, end):
        _apart(blocks_NB[n], pairs_B)
        for g in range(scales_NG.shape[1]):
            add_GW[g, :] = U64(_mxfp4_add(scales_NG[n, g])) * U64(0x0001000100010001)
        _mxfp4_numbers(codes_K, U16(0), add_K, out_NK[n])


@compiled_in_parts
def mxfp4_rows_in_parts(parts: int, blocks_NB: Codes, scales_NG: Codes, out_NK: Halves) -> None:
    """The same, by so many threads."""
    for part in numba.prange(parts):
        first, end = part_of(part, parts, len(blocks_NB))
        mxfp4_rows(blocks_NB, scales_NG, out_NK, first, end)


@compiled
def mxfp4_columns(blocks_NB: Codes, scales_NG: Codes, out_KN: Halves, first: int, end: int) -> None:
    """The same into the transpose, rows in multiples of 8. Bytes are transposed, 8 x 8 at a time, before they are numbers."""
    blocks_NW = blocks_NB.view(np.uint64)
    tile_BW = np.empty((16, TILE_ROWS // 8), dtype=np.uint64)
    tile_BN, add_N = tile_BW.view(np.uint8), np.empty(TILE_ROWS, dtype=np.uint16)
    for start in range(first, end, TILE_ROWS):
        rows = min(TILE_ROWS, end - start)
        for g in range(scales_NG.shape[1]):
            for n in range(rows):
                add_N[n] = _mxfp4_add(scales_NG[start + n, g])
            for half in range(2):
                for n in range(0, rows, 8):
                    _transpose_bytes(blocks_NW, start + n, 2 * g + half, tile_BW, 8 * half, n // 8)
            for b in range(16):
                k = 32 * g + 2 * b
                _mxfp4_numbers(tile_BN[b, :rows], U16(0), add_N, out_KN[k, start : start + rows])
                _mxfp4_numbers(tile_BN[b, :rows], U16(4), add_N, out_KN[k + 1, start : start + rows])


@compiled_in_parts
def mxfp4_columns_in_parts(parts: int, blocks_NB: Codes, scales_NG: Codes, out_KN: Halves) -> None:
    """The same, by so many threads."""
    for part in numba.prange(parts):
        first, end = part_of(part, parts, len(blocks_NB))
        mxfp4_columns(blocks_NB, scales_NG, out_KN, first, end)


@compiled
def _apart(bytes_B: Codes, out_B: npt.NDArray[np.uint32]) -> None:
    """Each byte's two halves as two numbers of 16 bits."""
    for b in range(len(bytes_B)):
        x = U32(bytes_B[b])
        out_B[b] = U32(U32(x & U32(15)) | U32(U32(x & U32(240)) << U32(12)))


@compiled
def _mxfp4_add(scale: np.uint8) -> np.uint16:
    """2^(scale - 127) x 0.5 in bfloat16, to which sizes are added: 0.5 is the smallest number but for 0."""
    return U16((((np.int32(scale) - 127) << 7) + (126 << 7)) & 0xFFFF)


@compiled
def _mxfp4_numbers(codes_N: npt.NDArray[Any], shift: np.uint16, add_N: Halves, out_N: Halves) -> None:
    """What the 4 bits above `shift` stand for: 0, .5, 1, 1.5, 2, 3, 4, 6, or less than 0. All but 0 and .5 have a mantissa."""
    for n in range(len(codes_N)):
        x = U16(U16(codes_N[n]) >> shift)
        size = U16(x & U16(7))
        bits = U16(U16(size << U16(6)) + add_N[n])
        bits = U16(bits - U16(64)) if size == U16(1) else bits
        bits = U16(0) if size == U16(0) else bits
        out_N[n] = U16(U16(bits & U16(0x7FFF)) | U16(U16(x & U16(8)) << U16(12)))


@inlined
def _transpose_bytes(words: Words, row: int, column: int, out: Words, out_row: int, out_column: int) -> None:
    """Byte i of word j becomes byte j of word i, of 8 words below each other: by halves, quarters and eighths of words."""
    a, b, c, d = words[row, column], words[row + 1, column], words[row + 2, column], words[row + 3, column]
    e, f, g, h = words[row + 4, column], words[row + 5, column], words[row + 6, column], words[row + 7, column]
    mask, bits = U64(0x00FF00FF00FF00FF), U64(8)
    a, b = _exchanged(a, b, mask, bits)
    c, d = _exchanged(c, d, mask, bits)
    e, f = _exchanged(e, f, mask, bits)
    g, h = _exchanged(g, h, mask, bits)
    mask, bits = U64(0x0000FFFF0000FFFF), U64(16)
    a, c = _exchanged(a, c, mask, bits)
    b, d = _exchanged(b, d, mask, bits)
    e, g = _exchanged(e, g, mask, bits)
    f, h = _exchanged(f, h, mask, bits)
    mask, bits = U64(0x00000000FFFFFFFF), U64(32)
    a, e = _exchanged(a, e, mask, bits)
    b, f = _exchanged(b, f, mask, bits)
    c, g = _exchanged(c, g, mask, bits)
    d, h = _exchanged(d, h, mask, bits)
    out[out_row, out_column], out[out_row + 1, out_column] = a, b
    out[out_row + 2, out_column], out[out_row + 3, out_column] = c, d
    out[out_row + 4, out_column], out[out_row + 5, out_column] = e, f
    out[out_row + 6, out_column], out[out_row + 7, out_column] = g, h


@inlined
def _exchanged(one: np.uint64, other: np.uint64, mask: np.uint64, bits: np.uint64) -> tuple[np.uint64, np.uint64]:
    """The upper part of `one` in every place of `mask` and the lower one of `other` change places."""
    different = ((one >> bits) ^ other) & mask
    return one ^ (different << bits), other ^ different


@compiled
def fp8_rows(codes_NK: Codes, scales: Floats, block_rows: int, out_NK: Halves, first: int, end: int) -> None:
    """Numbers of 8 bits (E4M3) times their block's scale.

    Args:
        scales: [blocks of rows, G]; G divides K.
    """
    width = codes_NK.shape[1] // scales.shape[1]
    for n in range(first, end):
        for g in range(scales.shape[1]):
            part = slice(g * width, (g + 1) * width)
            _fp8_numbers(codes_NK[n, part], scales[n // block_rows, g], out_NK[n, part])


@compiled_in_parts
def fp8_rows_in_parts(parts: int, codes_NK: Codes, scales: Floats, block_rows: int, out_NK: Halves) -> None:
    """The same, by so many threads."""
    for part in numba.prange(parts):
        first, end = part_of(part, parts, len(codes_NK))
        fp8_rows(codes_NK, scales, block_rows, out_NK, first, end)


@compiled
def _fp8_numbers(codes_K: Codes, scale: np.float32, out_K: Halves) -> None:
    for k in range(len(codes_K)):
        out_K[k] = _upper_half(_as_bits(F32(_e4m3(codes_K[k]) * scale)))


@compiled
def _e4m3(code: np.uint8) -> np.float32:
    """What 8 bits stand for: sign, 4 bits of exponent and 3 of mantissa; in the first 8 sizes the mantissa is all there is."""
    size = U32(code) & U32(127)
    bits = U32(U32(size << U32(20)) + U32((127 - 7) << 23))
    small = F32(as_float(U32(bits + U32(1 << 23))) - F32(2.0**-6))  # a power of two more, less that power
    found = small if size < U32(8) else as_float(bits)
    found = F32(np.nan) if size == U32(127) else found
    return as_float(U32(U32(_as_bits(found)) | U32(U32(U32(code) & U32(128)) << U32(24))))


@compiled
def as_float(bits: np.uint32) -> np.float32:
    return U32(bits).view(np.float32)


@compiled
def _as_bits(number: np.float32) -> np.uint32:
    return F32(number).view(np.uint32)


@compiled
def packed_rows(
    packed_NB: Codes, bits: int, zeros: Floats, scales_NG: Floats, out_NK: Halves, first: int, end: int
) -> None:
    """Unsigned numbers of 4 or 8 bits, the first in the low half of a byte, less their block's zero, times its scale.

    Args:
        zeros: [N, G] of each block, or [1, 1]: the same for all.
    """
    columns = out_NK.shape[1]
    row_K, scale_K = np.empty(columns, dtype=np.float32), np.empty(columns, dtype=np.float32)
    zero_K = np.full(columns, zeros[0, 0])
    codes_K = np.empty(columns, dtype=np.uint8)
    for n in range(first, end):
        _spread(scales_NG[n], scale_K)
        if len(zeros) > 1:
            _spread(zeros[n], zero_K)
        if bits == 4:
            nibbles(packed_NB[n], codes_K.view(np.uint16))
            _shifted(codes_K, zero_K, scale_K, row_K)
        else:
            _shifted(packed_NB[n], zero_K, scale_K, row_K)
        _rounded(row_K.view(np.uint32), out_NK[n])


@compiled_in_parts
def packed_rows_in_parts(
    parts: int, packed_NB: Codes, bits: int, zeros: Floats, scales_NG: Floats, out_NK: Halves
) -> None:
    """The same, by so many threads."""
    for part in numba.prange(parts):
        first, end = part_of(part, parts, len(packed_NB))
        packed_rows(packed_NB, bits, zeros, scales_NG, out_NK, first, end)


@compiled
def _spread(each_G: Floats, out_K: Floats) -> None:
    """One number for all of a block."""
    width = len(out_K) // len(each_G)
    for g in range(len(each_G)):
        each = each_G[g]
        for k in range(g * width, (g + 1) * width):
            out_K[k] = each


@compiled
def nibbles(packed_B: Codes, out_B: Halves) -> None:
    """Each byte's two halves as two bytes."""
    for b in range(len(packed_B)):
        x = U16(packed_B[b])
        out_B[b] = U16(U16(x & U16(15)) | U16(U16(x << U16(4)) & U16(0xF00)))


@compiled
def _shifted(codes_K: Codes, zero_K: Floats, scale_K: Floats, out_K: Floats) -> None:
    for k in range(len(codes_K)):
        out_K[k] = (np.float32(np.int32(codes_K[k])) - zero_K[k]) * scale_K[k]


@compiled
def _rounded(bits_K: npt.NDArray[np.uint32], out_K: Halves) -> None:
    for k in range(len(bits_K)):
        out_K[k] = _upper_half(bits_K[k])


@compiled
def _upper_half(x: np.uint32) -> np.uint16:
    """Of a float32's bits, rounded."""
    return U16(U32(x + U32(0x7FFF) + ((x >> U32(16)) & U32(1))) >> U32(16))
