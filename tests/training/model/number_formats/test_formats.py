"""Number formats: bit for bit what transformers and compressed-tensors make of the same tensors, and the nearest numbers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from training.model.number_formats import kernels
from training.model.number_formats.formats import Bytes, NumberFormat, Plain, Stored
from training.model.number_formats.found import format_of
from training.model.number_formats.fp8 import Fp8
from training.model.number_formats.mxfp4 import VALUES, Mxfp4
from training.model.number_formats.packed_int import PackedInt

ROWS, COLUMNS = 64, 192
DTYPES = [torch.bfloat16, torch.float32, torch.float16]
FORMATS = [
    Plain("F16"),
    Mxfp4(is_gpt_oss=True),
    Mxfp4(is_gpt_oss=False),
    Fp8("_scale_inv", "F32", (32, 32)),
    Fp8("_scale_inv", "BF16", (32, 32)),
    Fp8("_scale", "BF16", (1, None)),
    Fp8("_scale", "F32", (None, None), 1),
    PackedInt(4, 32, "BF16"),
    PackedInt(8, None, "BF16"),
    PackedInt(8, 16, "F32"),
    PackedInt(4, 48, "F16"),
]
WITH_ZEROS = [PackedInt(4, 32, "BF16", has_zeros=True), PackedInt(8, 48, "F32", has_zeros=True)]


def drawn(numbers: NumberFormat, seed: int = 0) -> dict[str, Tensor]:
    """Any bytes for numbers and zeros, scales of many sizes."""
    torch.manual_seed(seed)
    found = {}
    for ending, (dtype, shape) in numbers.tensors(ROWS, COLUMNS).items():
        if dtype == "U8":
            found[ending] = (
                torch.randint(100, 140, shape).byte() if "scale" in ending else torch.randint(0, 256, shape).byte()
            )
        elif dtype == "I32":
            found[ending] = torch.randint(-(2**31), 2**31, shape).int()
        elif dtype == "F8_E4M3":
            codes = torch.randint(0, 256, shape)
            found[ending] = codes.where(codes % 128 != 127, 0).byte().view(torch.float8_e4m3fn)
        else:
            known = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
            found[ending] = (torch.randn(shape) * 10.0 ** torch.randint(-3, 2, shape)).to(known[dtype])
    return found


def as_bytes(tensors: dict[str, Tensor]) -> dict[str, Bytes]:
    return {ending: t.contiguous().flatten().view(torch.uint8).numpy() for ending, t in tensors.items()}


def decoded(
    numbers: NumberFormat, stored: dict[str, Tensor], dtype: torch.dtype, *, transposed: bool = False
) -> Tensor:
    out = torch.full((COLUMNS, ROWS) if transposed else (ROWS, COLUMNS), 7.0, dtype=dtype)
    out = out.T if transposed else out
    numbers.decode(as_bytes(stored), out)
    return out


def theirs(numbers: NumberFormat, stored: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """What transformers loads, or compressed-tensors where transformers asks it."""
    if isinstance(numbers, Plain):
        return stored[""].to(dtype)
    if isinstance(numbers, Mxfp4) and numbers.is_gpt_oss:
        return convert_moe_packed_tensors(stored["_blocks"][None], stored["_scales"][None], dtype=dtype)[0].T
    if isinstance(numbers, Fp8):
        return Fp8Dequantize(None)._dequantize_one(stored[""], stored[numbers.ending], output_dtype=dtype)
    if isinstance(numbers, Mxfp4):
        kind, args = (
            "mxfp4-pack-quantized",
            {"num_bits": 4, "type": "float", "group_size": 32, "scale_dtype": torch.uint8},
        )
        more = {}
    else:
        assert isinstance(numbers, PackedInt)
        kind, more = "pack-quantized", {"weight_shape": torch.tensor([ROWS, COLUMNS])}
        args = {
            "num_bits": numbers.bits,
            "type": "int",
            "group_size": numbers.group,
            "symmetric": not numbers.has_zeros,
        }
        args["strategy"] = "group" if numbers.group else "channel"
    args = {"strategy": "group", "symmetric": True, **args}
    compressor = BaseCompressor.get_value_from_registry(kind)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    return compressor.decompress({f"weight{e}": t for e, t in stored.items()} | more, scheme)["weight"].to(dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numbers", [*FORMATS, *WITH_ZEROS], ids=repr)
def test_numbers_are_those_that_others_read(numbers: NumberFormat, dtype: torch.dtype, transposed: bool) -> None:
    stored = drawn(numbers)
    found, expected = decoded(numbers, stored, dtype, transposed=transposed), theirs(numbers, stored, dtype)
    same = found.view(torch.uint8 if dtype.itemsize == 1 else {2: torch.int16, 4: torch.int32}[dtype.itemsize])
    wanted = expected.contiguous().view(same.dtype)
    assert torch.equal(same.contiguous(), wanted)
    assert expected.float().abs().max() > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numbers", [*FORMATS, *WITH_ZEROS], ids=repr)
def test_stacked_matrices_by_torch_are_the_same(numbers: NumberFormat, dtype: torch.dtype) -> None:
    """As they are decoded on an accelerator."""
    each = [drawn(numbers, seed) for seed in range(3)]
    stacked = numbers.values({ending: torch.stack([stored[ending] for stored in each]) for ending in each[0]})
    assert torch.equal(stacked.to(dtype), torch.stack([decoded(numbers, stored, dtype) for stored in each]))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0, 1, 2, 3, 126, 251, 252, 253, 254])
def test_scales_at_both_ends_of_mxfp4(scale: int, dtype: torch.dtype, transposed: bool) -> None:
    numbers = Mxfp4(is_gpt_oss=True)
    stored = drawn(numbers)
    stored["_scales"][:, 1] = scale
    found, expected = decoded(numbers, stored, dtype, transposed=transposed), theirs(numbers, stored, dtype)
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("numbers", [*FORMATS[1:], *WITH_ZEROS], ids=repr)
def test_a_scale_that_is_no_number_is_told(numbers: NumberFormat) -> None:
    stored = drawn(numbers)
    scales = next(t for ending, t in stored.items() if "scale" in ending)
    if scales.dtype == torch.uint8:
        scales.view(-1)[-1] = 255
    else:
        scales.view(-1)[-1] = torch.inf
    with pytest.raises(ValueError, match=r"a scale of .* no (finite )?number"):
        decoded(numbers, stored, torch.bfloat16)
    with pytest.raises(ValueError, match=r"a scale of .* no (finite )?number"):
        multiplied(numbers, stored, np.ones(COLUMNS, dtype=np.float32))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("numbers", FORMATS[1:], ids=repr)
def test_threads_change_nothing(numbers: NumberFormat, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = drawn(numbers)
    row = np.random.default_rng(0).standard_normal(COLUMNS, dtype=np.float32)
    alone, product = decoded(numbers, stored, torch.bfloat16, transposed=transposed), multiplied(numbers, stored, row)
    shared: list[int] = []
    monkeypatch.setattr(kernels, "SHARED_NUMBERS", 1)
    monkeypatch.setattr(kernels, "threads_to_share", lambda: shared.append(3) or 3)
    assert torch.equal(decoded(numbers, stored, torch.bfloat16, transposed=transposed), alone)
    assert (multiplied(numbers, stored, row) == product).all()
    assert shared, "parts were made"


def multiplied(numbers: NumberFormat, stored: dict[str, Tensor], row: npt.NDArray[np.float32]) -> Any:
    return multiplied_at_once(numbers, [stored], row[None])[0]


def multiplied_at_once(numbers: NumberFormat, each: list[dict[str, Tensor]], row_XK: npt.NDArray[np.float32]) -> Any:
    """The last matrix lies first in memory, and something else between all tensors."""
    memory, at_X = np.full(64, 255, dtype=np.uint8), {ending: np.zeros(len(each), dtype=np.int64) for ending in each[0]}
    for x in reversed(range(len(each))):
        for ending, part in as_bytes(each[x]).items():
            at_X[ending][x] = len(memory)
            padding = np.full(64 + -len(part) % 64, 255, dtype=np.uint8)
            memory = np.concatenate([memory, part, padding])
    return numbers.multiply(memory, at_X, row_XK, rows=ROWS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [120, 1])
@pytest.mark.parametrize("numbers", [*FORMATS, *WITH_ZEROS], ids=repr)
def test_products_of_several_matrices_are_those_of_each(
    numbers: NumberFormat, scale: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared out among threads too, where some begin in the middle of a matrix."""
    each = [drawn(numbers, seed) for seed in range(5)]
    if isinstance(numbers, Mxfp4):  # 1: one that is not for the compiled loop
        each[3][numbers._endings[1]][:, 1] = scale
    row_XK = torch.randn(5, COLUMNS, generator=torch.Generator().manual_seed(0)).to(dtype).float().numpy()
    alone = np.stack([multiplied(numbers, stored, row) for stored, row in zip(each, row_XK, strict=True)])
    at_once = multiplied_at_once(numbers, each, row_XK)
    np.testing.assert_allclose(at_once, alone, rtol=1e-4, atol=1e-4 * abs(alone).max())
    monkeypatch.setattr(kernels, "SHARED_NUMBERS", 1)
    monkeypatch.setattr(kernels, "threads_to_share", lambda: 3)
    assert (multiplied_at_once(numbers, each, row_XK) == at_once).all()


def test_every_number_of_fp8() -> None:
    """Those without an exponent, the one that is none, and both zeros."""
    numbers = Fp8("_scale_inv", "F32", (1, 128))
    stored = {"": torch.arange(256).byte().view(torch.float8_e4m3fn).view(2, 128), "_scale_inv": torch.ones(2, 1)}
    out = torch.empty(2, 128, dtype=torch.bfloat16)
    numbers.decode(as_bytes(stored), out)
    expected = stored[""].float()
    assert torch.equal(out.float().nan_to_num(7), expected.nan_to_num(7))
    assert torch.equal(out.signbit(), expected.signbit())
    for column in range(128):
        row = np.zeros((1, 128), dtype=np.float32)
        row[0, column] = 1
        codes = stored[""].view(torch.uint8).clone()
        codes[:, torch.arange(128) != column] = 0
        memory = np.concatenate([codes.flatten().numpy(), np.ones(2, np.float32).view(np.uint8)])
        at = {"": np.array([0]), "_scale_inv": np.array([256])}
        product = torch.from_numpy(numbers.multiply(memory, at, row, rows=2))[0]
        assert torch.equal(product.nan_to_num(7), expected[:, column].nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numbers", [*FORMATS, *WITH_ZEROS], ids=repr)
def test_products_are_those_of_the_decoded_matrix_but_for_the_last_bits(
    numbers: NumberFormat, dtype: torch.dtype
) -> None:
    """Of rows in bfloat16 by other instructions, where the processor has them."""
    stored = drawn(numbers)
    row = torch.randn(COLUMNS, generator=torch.Generator().manual_seed(1)).to(dtype).float().numpy()
    matrix = decoded(numbers, stored, torch.float32).double()
    expected, found = matrix @ torch.from_numpy(row).double(), torch.from_numpy(multiplied(numbers, stored, row))
    scales_round = (
        isinstance(numbers, PackedInt) and numbers.scale_dtype != "F32"
    )  # as they are defined; products do not
    allowed = (2**-8 if scales_round else 1e-6) * (matrix.abs() @ torch.from_numpy(abs(row)).double())
    assert ((found - expected).abs() <= allowed).all()
    assert expected.abs().min() > 0


@pytest.mark.parametrize("others", [1e-3, 2**-10], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [0, 1, 2, 252])
def test_products_with_scales_at_both_ends_of_mxfp4(scale: int, others: float) -> None:
    numbers = Mxfp4(is_gpt_oss=True)
    stored = drawn(numbers)
    stored["_scales"][:, 1] = scale
    row = np.full(COLUMNS, others, dtype=np.float32)
    row[32:64] = 2.0 ** (140 - scale) if scale > 100 else 2.0**100
    matrix, row_K = decoded(numbers, stored, torch.float32).double(), torch.from_numpy(row).double()
    wrong = torch.from_numpy(multiplied(numbers, stored, row)) - matrix @ row_K
    assert (wrong.abs() <= 1e-6 * (matrix.abs() @ row_K)).all()


def test_rows_of_several_tiles_and_odd_numbers_of_rows() -> None:
    """Of which the compiled loops for a transpose work on some at a time, in multiples of 8."""
    numbers = Mxfp4(is_gpt_oss=True)
    for rows in (2 * kernels.TILE_ROWS + 24, 20):
        shapes = {ending: shape for ending, (_, shape) in numbers.tensors(rows, 32).items()}
        stored = {"_blocks": torch.randint(0, 256, shapes["_blocks"]).byte()}
        stored["_scales"] = torch.randint(100, 140, shapes["_scales"]).byte()
        out = torch.empty(32, rows, dtype=torch.bfloat16)
        numbers.decode(as_bytes(stored), out.T)
        assert torch.equal(out, convert_moe_packed_tensors(stored["_blocks"][None], stored["_scales"][None])[0])


@pytest.mark.parametrize("numbers", FORMATS, ids=repr)
def test_what_is_encoded_is_stored_as_it_should_be_and_near(numbers: NumberFormat) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(ROWS, COLUMNS) * 0.03
    matrix[:32, :32] = 0
    encoded = numbers.encode(matrix)
    assert {e: Stored(dtype, tuple(encoded[e].shape)) for e, (dtype, _) in numbers.tensors(ROWS, COLUMNS).items()} == (
        numbers.tensors(ROWS, COLUMNS)
    )
    found = decoded(numbers, encoded, torch.float32)
    most = {"MXFP4": 0.13, "int4": 0.12, "FP8": 0.03, "int8": 0.02, "float16": 0.001}[numbers.name]
    assert 0 < (found - matrix).norm() / matrix.norm() < most
    assert not found[:32, :32].any()


def test_mxfp4_takes_the_nearest_number_and_the_even_one_of_two() -> None:
    numbers = Mxfp4(is_gpt_oss=False)
    values = torch.tensor([4.0, 0.24, 0.25, 0.26, 0.74, 0.75, 0.76, 1.25, 1.75, 2.5, 3.5, 3.6, 5.0, 5.1, -0.25, -0.75])
    row = torch.cat([values, -values])[None] * 8
    found = torch.empty_like(row)
    numbers.decode(as_bytes(numbers.encode(row)), found)
    nearest = torch.tensor([4.0, 0, 0, 0.5, 0.5, 1, 1, 1, 2, 2, 4, 4, 4, 6, 0, -1])
    assert torch.equal(found[0] / 8, torch.cat([nearest, -nearest]))
    assert set(VALUES[:8]) >= set(nearest.abs().tolist())


def test_largest_numbers_are_kept_within_what_there_is() -> None:
    matrix = torch.tensor([[7.9, -7.9] + [0.1] * 30])
    assert Mxfp4(is_gpt_oss=False).encode(matrix)["_packed"][0, 0] == 7 + 16 * 15, "6 and -6, not the next power of two"
    fp8 = Fp8("_scale", "BF16", (1, None)).encode(torch.full((1, 8), 1.0009765))
    assert fp8[""].float().isfinite().all()
    ints = PackedInt(4, 8, "BF16").encode(torch.tensor([[1.0, -1, 0.5, -0.5, 0, 0, 0, 0]]))
    assert ints["_packed"].view(torch.uint8)[0, 0] % 16 == 15, "7, the largest, for 7.5"


def told(numbers: NumberFormat, *shapes: tuple[int, int]) -> dict[tuple[int, int], dict[str, Stored]]:
    return {shape: numbers.tensors(*shape) for shape in shapes}


@pytest.mark.parametrize("numbers", [*FORMATS, *WITH_ZEROS], ids=repr)
def test_a_format_is_found_by_what_is_stored(numbers: NumberFormat) -> None:
    assert format_of(told(numbers, (96, 192), (192, 96))) == numbers


@pytest.mark.parametrize(
    ("numbers", "shapes"),
    [
        (Fp8("_scale_inv", "F32", (128, 128)), [(128, 256), (256, 128)]),
        (Fp8("_scale_inv", "F32", (128, 128)), [(256, 128), (128, 256)]),
        (PackedInt(4, 32, "BF16"), [(64, 32), (32, 64)]),
        (PackedInt(4, None, "BF16"), [(64, 32), (32, 64)]),
    ],
)
def test_one_block_in_a_row_may_be_the_row_or_a_block_of_that_size(
    numbers: NumberFormat, shapes: list[tuple[int, int]]
) -> None:
    assert format_of(told(numbers, *shapes)) == numbers


Change = Callable[[dict[str, Stored]], Any]


@pytest.mark.parametrize(
    ("numbers", "change", "words"),
    [
        (FORMATS[3], lambda stored: stored.pop("_scale_inv"), r"weight: F8_E4M3 \[96, 192\]}"),
        (FORMATS[3], lambda stored: stored.update({"_scale_inv": Stored("F32", (3, 5))}), "looks like FP8"),
        (FORMATS[7], lambda stored: stored.update({"_packed": Stored("I32", (96, 18))}), "in no format that is known"),
        (FORMATS[1], lambda stored: stored.update({"_scales": Stored("U8", (96, 5))}), "looks like MXFP4"),
        (
            FORMATS[0],
            lambda stored: stored.update({"": Stored("I8", (96, 192))}),
            "16 and 32 bits in floating point, MXFP4",
        ),
        (FORMATS[2], lambda stored: stored.update({"_global_scale": Stored("F32", (1,))}), "looks like NVFP4"),
        (
            FORMATS[3],
            lambda stored: stored.update({"_scale_inv": Stored("U8", (96, 6))}),
            "looks like FP8",
        ),
        (FORMATS[0], lambda stored: stored.update({"_g_idx": Stored("I32", (192,))}), "in no format that is known"),
    ],
)
def test_what_is_in_no_format_is_told(numbers: NumberFormat, change: Change, words: str) -> None:
    matrices = told(numbers, (96, 192), (192, 96))
    change(matrices[96, 192])
    with pytest.raises(ValueError, match=words):
        format_of(matrices)


def test_a_matrix_without_whole_blocks_is_refused() -> None:
    for numbers, shape in ((FORMATS[1], (8, 40)), (FORMATS[3], (40, 32)), (FORMATS[7], (8, 40))):
        with pytest.raises(ValueError, match="no whole"):
            numbers.tensors(*shape)


def test_bytes_of_a_number() -> None:
    for numbers, bits in ((FORMATS[1], 4.25), (FORMATS[7], 4.5), (FORMATS[3], 8 + 32 / 1024)):
        stored = numbers.tensors(ROWS, COLUMNS).values()
        assert sum(one.length_bytes for one in stored) == ROWS * COLUMNS * bits / 8
    assert np.prod(FORMATS[1].tensors(ROWS, COLUMNS)["_blocks"].shape) == ROWS * COLUMNS / 2
