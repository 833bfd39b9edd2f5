"""Which format the matrices of a checkpoint are in, told from the tensors of one expert."""

from collections.abc import Iterator, Mapping
from itertools import product

from training.model.number_formats.formats import PLAIN_DTYPES, NumberFormat, Plain, Stored
from training.model.number_formats.fp8 import Fp8
from training.model.number_formats.mxfp4 import Mxfp4
from training.model.number_formats.packed_int import PackedInt

KNOWN = (
    "16 and 32 bits in floating point, MXFP4, FP8 with scales (`_scale_inv`, `_scale`), and compressed-tensors' packed integers "
    "of 4 and 8 bits"
)
BESIDE = ("_shape", "activation_scale", "input_scale")
"""How names of tensors end that tell nothing that is needed: they are an expert's, and are not read."""


def format_of(matrices: Mapping[tuple[int, int], Mapping[str, Stored]]) -> NumberFormat:
    """The one format that all these matrices are in.

    Args:
        matrices: rows, columns -> what is stored of a matrix of that shape, by how the tensors' names end.

    Raises:
        ValueError: they are in none that is known.
    """
    tried = [one for (rows, columns), stored in matrices.items() for one in _candidates(stored, rows, columns)]
    for found in tried:
        if all(_is_stored_so(found, stored, *shape) for shape, stored in matrices.items()):
            return found
    (rows, columns), stored = next(iter(matrices.items()))
    told = ", ".join(f"{ending or 'weight'}: {one.dtype} {list(one.shape)}" for ending, one in stored.items())
    nvfp4 = ["NVFP4"] if any(ending.endswith("global_scale") for ending in stored) else []
    looks = f" (it looks like {name})" if (name := next(iter([*nvfp4, *(one.name for one in tried)]), None)) else ""
    raise ValueError(f"{rows} x {columns} numbers stored as {{{told}}} are in no format that is known{looks}: {KNOWN}")


def _is_stored_so(found: NumberFormat, stored: Mapping[str, Stored], rows: int, columns: int) -> bool:
    try:
        wanted = found.tensors(rows, columns)
    except ValueError:
        return False
    return wanted == {ending: one for ending, one in stored.items() if not ending.endswith(BESIDE)}


def _candidates(stored: Mapping[str, Stored], rows: int, columns: int) -> Iterator[NumberFormat]:
    numbers = stored.get("", stored.get("_packed", stored.get("_blocks")))
    endings = [ending for ending in ("_scale_inv", "_scale", "_scales") if ending in stored]
    if numbers is None:
        return
    if not endings:
        if numbers.dtype in PLAIN_DTYPES:
            yield Plain(numbers.dtype)
        return
    scales = stored[endings[0]]
    if scales.dtype == numbers.dtype == "U8":
        yield Mxfp4(is_gpt_oss="_blocks" in stored)
    elif scales.dtype in PLAIN_DTYPES and numbers.dtype == "F8_E4M3":
        if len(scales.shape) < 2:
            yield Fp8(endings[0], scales.dtype, (None, None), len(scales.shape))
            return
        for block in product(_part(rows, scales.shape[0]), _part(columns, scales.shape[1])):
            yield Fp8(endings[0], scales.dtype, block)
    elif scales.dtype in PLAIN_DTYPES and numbers.dtype == "I32" and len(scales.shape) == 2:
        bits = 32 * numbers.shape[1] // columns
        for group in _part(columns, scales.shape[1]) if bits in (4, 8) else ():
            yield PackedInt(bits, group, scales.dtype, has_zeros="_zero_point" in stored)


def _part(numbers: int, parts: int) -> list[int | None]:
    """What a part may have been meant to be: of that many numbers, or, where there is one, all."""
    return [None, numbers] if parts == 1 else [numbers // parts] if parts else []
