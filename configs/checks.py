"""Checks of options that several commands share."""

import re
from collections.abc import Sequence
from typing import TypeVar

from configs.load import UserError

Choice = TypeVar("Choice", str, float)


def at_least(options: object, **least: int) -> None:
    """Refuse options with a number below its least one; None stands for a number that was not given.

    Raises:
        UserError: the message names the flag.
    """
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise UserError(f"--{name.replace('_', '-')} is {value}; write at least {smallest}")


def words(text: str) -> list[str]:
    """The words between commas, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def chosen(text: str, known: Sequence[Choice], *, flag: str) -> list[Choice]:
    """Those of `known` that the words of `text` name.

    Raises:
        UserError: none is named, or one is not known.
    """
    found = []
    for word in words(text) or [text]:
        try:
            found.append(known[known.index(type(known[0])(word))])
        except ValueError:
            raise UserError(f"{flag} {word!r} is not known; write some of {','.join(map(str, known))}") from None
    return found


def whole_numbers(text: str, *, flag: str, example: str) -> list[int]:
    """The numbers between commas, each once.

    Raises:
        UserError: it is no list of numbers.
    """
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise UserError(f"{flag} {text!r} is no list of numbers; write for example {example}")
    return list(dict.fromkeys(map(int, text.split(","))))
