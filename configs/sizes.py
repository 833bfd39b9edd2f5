"""Sizes in bytes: read as people write them, written as people read them."""

import re

from configs.load import UserError

UNIT_BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>%|[A-Za-z]*)")


def parse_size(text: int | str, *, what: str = "size", whole_bytes: int | None = None) -> int:
    """Bytes from an int, `512KiB`, `2MiB`, `1.5GiB`, or, where there is a whole, `25%` of `whole_bytes`.

    Args:
        what: how the message calls the size, for example a flag's name.

    Raises:
        UserError: anything else, nothing, more than 100 %.
    """
    match = SIZE.fullmatch(str(text).strip())
    units = {"": 1, **UNIT_BYTES, **({} if whole_bytes is None else {"%": whole_bytes / 100})}
    if match is None or match["unit"] not in units or float(match["number"]) <= 0:
        share = "" if whole_bytes is None else ", or a share as 25% (of all experts, or of the machine's memory)"
        raise UserError(f"{what} {text!r} is not understood; write bytes as 2097152, 512KiB, 2MiB or 8GiB{share}")
    if match["unit"] == "%" and float(match["number"]) > 100:
        raise UserError(f"{what} {text!r} is more than there is; write at most 100%")
    return int(float(match["number"]) * units[match["unit"]])


def readable(size_bytes: int) -> str:
    """Bytes as `parse_size` reads them, rounded up to a tenth of a unit: what is printed is never too little."""
    unit = size_unit(size_bytes)
    tenths = -(-size_bytes * 10 // UNIT_BYTES[unit])
    return f"{tenths // 10}.{tenths % 10}{unit}" if tenths % 10 else f"{tenths // 10}{unit}"


def size_text(size_bytes: int) -> str:
    """Bytes with three digits."""
    unit = size_unit(size_bytes)
    return f"{size_bytes / UNIT_BYTES[unit]:.3g} {unit}"


def size_unit(size_bytes: float) -> str:
    """The name of the largest unit that leaves at least one."""
    return next((unit for unit in ("TiB", "GiB", "MiB", "KiB") if abs(size_bytes) >= UNIT_BYTES[unit]), "B")
