"""How many rows to fill a product up to, so that few different numbers of rows occur.

In 16-bit precision oneDNN compiles a product for every number of rows it meets (torch 2.13 on x86: 0.6 ms, and 0.6 MB for
as long as it is kept), and in a prompt every expert has another number. Zeros below the rows make few numbers of many,
but a kernel for more rows may add up in another order and give other last bits. So every number is tried beforehand, on
data that show the order, and is filled up only where every row keeps its bits. Trying compiles a kernel for every number,
so it is for processes that keep few of them (`bound_kernel_caches` in loading.py). Where a processor lacks what oneDNN needs
(x86 without AVX-512), torch multiplies by itself and compiles nothing: zeros would only be more to multiply.
Axes: M rows, K and N of the matrix that they are multiplied by.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

SIZES = (1, 8, 16, 24, 32, 48, 64, 96, 128)
"""Numbers of rows to fill up to; one row alone, which is what decoding multiplies, stays alone."""
LARGEST_MATRIX = 2**23
"""Numbers of a matrix beyond which a product takes so long that compiling it does not matter."""
_FOUND: dict[tuple[object, ...], tuple[int, ...]] = {}


def filled_rows(scratch_KN: Tensor) -> tuple[int, ...]:
    """By number of rows, up to the largest of `SIZES`: how many to compute with; empty where nothing is gained.

    It holds for the number of threads torch has now. Found once in a process for every shape, in a fraction of a second.

    Args:
        scratch_KN: a matrix in the precision and layout of those that will be multiplied by; it is overwritten.
    """
    if not is_compiled(scratch_KN.dtype) or scratch_KN.numel() > LARGEST_MATRIX:
        return ()
    what = (scratch_KN.shape, scratch_KN.stride(), scratch_KN.dtype, torch.get_num_threads())
    if what not in _FOUND:
        _FOUND[what] = _tried(scratch_KN)
    return _FOUND[what]


def is_compiled(dtype: torch.dtype) -> bool:
    """Whether this processor's products in this precision are compiled by oneDNN for every number of rows."""
    asked = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in asked and asked[dtype]()


def _tried(scratch_KN: Tensor, *, multiply: Callable[[Tensor, Tensor], Tensor] = torch.mm) -> tuple[int, ...]:
    rows_MK = order_showing(scratch_KN, rows=SIZES[-1])
    sizes = [0, 1]
    for below, size in pairwise(SIZES):
        filled_MN = multiply(rows_MK[:size], scratch_KN)
        for count in range(below + 1, size + 1):
            same = torch.equal(multiply(rows_MK[:count], scratch_KN), filled_MN[:count])
            sizes.append(size if same else count)
    return tuple(sizes)


def order_showing(scratch_KN: Tensor, *, rows: int) -> Tensor:
    """Rows whose products with `scratch_KN`, which is overwritten, are nothing but rounding errors of adding up.

    Every term has its negative somewhere else, so all that is left depends on what was added to what.
    """
    inner, columns = scratch_KN.shape
    generator = torch.Generator().manual_seed(0)
    one, other, rest = torch.randperm(inner, generator=generator).tensor_split([inner // 2, inner // 2 * 2])
    sizes = 2.0 ** torch.randint(0, 9, (inner // 2, 1), generator=generator)
    terms = (torch.randn(inner // 2, columns, generator=generator) * sizes).to(scratch_KN.dtype)
    scratch_KN[one], scratch_KN[other], scratch_KN[rest] = terms, -terms, 0
    rows_MK = torch.empty(rows, inner, dtype=scratch_KN.dtype)
    rows_MK[:, one] = rows_MK[:, other] = torch.randn(rows, inner // 2, generator=generator).to(scratch_KN.dtype)
    rows_MK[:, rest] = 1
    return rows_MK
