import numba
import numpy as np
import pytest
import torch

from training.model.number_formats import kernels, mxfp4, mxfp4_x86
from training.model.number_formats.mxfp4 import VALUES, Mxfp4

ROWS, COLUMNS = 24, 192
has_instructions = pytest.mark.skipif(not mxfp4_x86.can_multiply(), reason="this processor has no AVX512-BF16")


def test_what_is_multiplied_so() -> None:
    """Rows of 8 bits of mantissa, in whole steps; nothing may be rounded that was not before."""
    row_XK = torch.randn(2, COLUMNS).bfloat16().float().numpy()
    bits_XK = mxfp4_x86.as_multiplied(row_XK)
    assert bits_XK is not None
    assert sorted(bits_XK[1]) == sorted(row_XK[1].view(np.uint32) >> 16)
    assert mxfp4_x86.as_multiplied(np.ascontiguousarray(row_XK[:, :96])) is None
    row_XK[1, 5] += 2**-9 * row_XK[1, 5]
    assert mxfp4_x86.as_multiplied(row_XK) is None


def multiplied(codes_NB: np.ndarray, scales_NG: np.ndarray, row_K: np.ndarray) -> np.ndarray:
    """By `Mxfp4`; the bytes around are no numbers."""
    around = np.full(63, 255, dtype=np.uint8)
    memory = np.concatenate([around, codes_NB.ravel(), around, scales_NG.ravel(), around])
    at = {"_blocks": np.array([63]), "_scales": np.array([2 * 63 + codes_NB.size])}
    return Mxfp4(is_gpt_oss=True).multiply(memory, at, row_K[None], rows=len(codes_NB))[0]


@has_instructions
def test_every_number_in_every_column(monkeypatch: pytest.MonkeyPatch) -> None:
    """One column at a time, so that one in the wrong place, or with another block's scale, would be seen."""
    monkeypatch.delattr(mxfp4, "mxfp4_products")  # the other loop
    generator = np.random.default_rng(0)
    codes_NB = generator.integers(0, 256, (ROWS, COLUMNS // 2), dtype=np.uint8)
    scales_NG = generator.integers(100, 150, (ROWS, COLUMNS // 32), dtype=np.uint8)
    codes_NK = np.stack([codes_NB & 15, codes_NB >> 4], axis=-1).reshape(ROWS, COLUMNS)
    matrix_NK = np.array(VALUES)[codes_NK] * 2.0 ** (scales_NG.repeat(32, axis=1).astype(int) - 127)
    assert len(np.unique(codes_NK)) == 16
    for column in range(COLUMNS):
        row_K = np.zeros(COLUMNS, dtype=np.float32)
        row_K[column] = 1.5
        assert (multiplied(codes_NB, scales_NG, row_K) == 1.5 * matrix_NK[:, column]).all()


@has_instructions
def test_a_row_that_is_no_number_stays_none() -> None:
    codes_NB, scales_NG = np.full((8, 32), 0x22, dtype=np.uint8), np.full((8, 2), 127, dtype=np.uint8)
    row_K = np.ones(64, dtype=np.float32)
    for value in (np.nan, np.inf, -np.inf):
        row_K[40] = value
        np.testing.assert_equal(multiplied(codes_NB, scales_NG, row_K), np.full(8, value, dtype=np.float32))


@pytest.mark.skipif(not mxfp4_x86.can_look_up(), reason="this processor has no AVX2")
@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("loop", ["mxfp4_rows", "mxfp4_columns"])
def test_numbers_that_are_looked_up_have_the_same_bits(
    loop: str, is_shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every code under every scale that the loops are for, both zeros among them; into the matrix, and into its transpose."""
    scales_N = np.resize(np.arange(2, 253, dtype=np.uint8).repeat(4), 2080)
    scales_NG = np.stack([scales_N, np.roll(scales_N, 40)], axis=1)
    codes_NB = np.random.default_rng(0).integers(0, 256, (len(scales_NG), 32), dtype=np.uint8)
    stored = {"_blocks": codes_NB.ravel(), "_scales": scales_NG.ravel()}
    is_transposed = loop == "mxfp4_columns"
    shape = (64, len(scales_NG)) if is_transposed else (len(scales_NG), 64)
    found, expected = (torch.zeros(shape, dtype=torch.bfloat16) for _ in range(2))
    with monkeypatch.context() as other:
        other.setattr(mxfp4, "can_look_up", lambda: False)
        Mxfp4(is_gpt_oss=True).decode(stored, expected.T if is_transposed else expected)
    monkeypatch.delattr(mxfp4, loop)
    if is_shared:
        monkeypatch.setattr(kernels, "SHARED_NUMBERS", 1)
        monkeypatch.setattr(kernels, "threads_to_share", lambda: 3)
        monkeypatch.delattr(mxfp4, f"{loop}_in_parts")
    Mxfp4(is_gpt_oss=True).decode(stored, found.T if is_transposed else found)
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))
    assert len(found.unique()) > 1000


def test_rows_that_are_no_whole_blocks_are_decoded_too() -> None:
    """Into the transpose 32 rows are looked up at once."""
    codes_NB = np.random.default_rng(0).integers(0, 256, (40, 16), dtype=np.uint8)
    stored = {"_blocks": codes_NB.ravel(), "_scales": np.arange(100, 140, dtype=np.uint8)}
    found, expected = torch.zeros(32, 40, dtype=torch.bfloat16), torch.zeros(40, 32, dtype=torch.bfloat16)
    Mxfp4(is_gpt_oss=True).decode(stored, found.T)
    Mxfp4(is_gpt_oss=True).decode(stored, expected)
    assert torch.equal(found, expected.T)


def test_a_user_may_forbid_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """What numba compiles for would lack them, and the compiler would end the process."""
    monkeypatch.setattr(numba.config, "CPU_FEATURES", "+avx2,+avx512vl,+avx512f")
    assert not mxfp4_x86.can_multiply()
    monkeypatch.setattr(numba.config, "CPU_FEATURES", "+avx2,+avx512vl,+avx512bf16")
    assert mxfp4_x86.can_multiply()


def test_without_the_instructions_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    codes_NB = generator.integers(0, 256, (ROWS, COLUMNS // 2), dtype=np.uint8)
    scales_NG = generator.integers(120, 130, (ROWS, COLUMNS // 32), dtype=np.uint8)
    row_K = torch.randn(COLUMNS, generator=torch.Generator().manual_seed(0)).bfloat16().float().numpy()
    found = multiplied(codes_NB, scales_NG, row_K)
    monkeypatch.setattr(mxfp4, "can_multiply", lambda: False)
    np.testing.assert_allclose(multiplied(codes_NB, scales_NG, row_K), found, rtol=1e-4, atol=1e-4 * abs(found).max())
