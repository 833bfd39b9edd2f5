"""Checks of options that several commands share."""

import math
import re
from collections.abc import Sequence
from typing import TypeVar

from configs.load import UserError

Choice = TypeVar("Choice", str, float)


def at_least(options: object, **least: int) -> None:
    """A `UserError` that names the flag of a number below its least one, or no finite number; None was not given."""
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and not smallest <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {value}; write at least {smallest}")


def in_range(options: object, **ranges: tuple[float, float]) -> None:
    """Refuse a config by a `ValueError` where a number, or one in a list of numbers, is not in its range [low, high).

    None, which stands for a number that another key decides, is left alone; so is inf as the end of a range.
    """
    for name, (low, high) in ranges.items():
        value = getattr(options, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not low <= number < high:  # no number is in a range of NaN
                below = "" if high == math.inf else f" and below {high:g}"
                raise ValueError(f"{name}={value}: write a number of at least {low:g}{below}")


def words(text: str) -> list[str]:
    """The words between commas, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def chosen(text: str, known: Sequence[Choice], *, flag: str) -> list[Choice]:
    """Those of `known` that the words of `text` name; a `UserError` if none is named, or one is not known."""
    found = []
    for word in words(text) or [text]:
        try:
            found.append(known[known.index(type(known[0])(word))])
        except ValueError:
            raise UserError(f"{flag} {word!r} is not known; write some of {','.join(map(str, known))}") from None
    return found


def whole_numbers(text: str, *, flag: str, example: str) -> list[int]:
    """The numbers between commas, each once; a `UserError` if there is something else."""
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text):
        raise UserError(f"{flag} {text!r} is no list of numbers; write for example {example}")
    return list(dict.fromkeys(map(int, text.split(","))))
