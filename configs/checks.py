"""Checks of options that several commands share."""

import re
from collections.abc import Sequence
from typing import TypeVar

from configs.load import UserError

Choice = TypeVar("Choice", str, float)


def at_least(options: object, **least: int) -> None:
    """A `UserError` that names the flag of a number below its least one; None stands for one that was not given."""
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise UserError(f"--{name.replace('_', '-')} is {value}; write at least {smallest}")


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
