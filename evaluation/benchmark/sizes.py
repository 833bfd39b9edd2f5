"""Sizes as people write them and as people read them."""

import re

from configs.load import UserError
from evaluation.engine.budget import UNIT_BYTES

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB)?")


def size_bytes(text: str, what: str) -> int:
    """Bytes of `512MiB`, `2.5GiB` or a plain number; `what` is the flag's name for the message.

    Raises:
        UserError: anything else, or nothing.
    """
    match = SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) <= 0:
        raise UserError(f"{what} {text!r} is not a size; write for example 512MiB, 2.5GiB or bytes")
    return int(float(match[1]) * UNIT_BYTES[match[2] or ""])
