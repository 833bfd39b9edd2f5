"""In which format experts of 16 or 32 bits are quantised, so that others can read them."""

import math
from typing import Literal, get_args

from configs.load import UserError
from training.model.expert_format import FUSED, ExpertFormat
from training.model.number_formats.formats import NumberFormat
from training.model.number_formats.fp8 import Fp8
from training.model.number_formats.mxfp4 import Mxfp4
from training.model.number_formats.packed_int import PackedInt

Kind = Literal["mxfp4", "fp8", "int4", "int8"]
KINDS: tuple[str, ...] = get_args(Kind)
BLOCK, GROUP = 128, 32
"""Of FP8 in both directions, and of integers along a row; smaller powers of two where a matrix has no whole ones."""


def quantised_format(kind: str, form: ExpertFormat) -> NumberFormat:
    """The format that experts like these are written in; a `UserError` if there is none that others could load."""
    if form.is_quantised:
        raise UserError(f"the experts are {form.numbers.name} already; quantise the model that they were made from")
    if form.roles == FUSED:
        if kind != "mxfp4" or not form.transposed:
            raise UserError(
                f"there is no standard layout for {kind} in which this family stores its experts, all of a layer in one "
                "tensor; gpt-oss alone has one, mxfp4"
            )
        return Mxfp4(is_gpt_oss=True)
    block = math.gcd(form.hidden, form.intermediate, BLOCK)
    if kind == "mxfp4":
        found: NumberFormat = Mxfp4(is_gpt_oss=False)
    elif kind == "fp8":
        found = Fp8("_scale_inv", "F32", (block, block))
    else:
        found = PackedInt(int(kind.removeprefix("int")), math.gcd(block, GROUP), "BF16")
    try:
        for role in form.roles:
            found.tensors(*form.shape(role))
    except ValueError as error:
        raise UserError(f"experts of {form.hidden} x {form.intermediate} numbers cannot be {kind}: {error}") from error
    return found
