"""What every command shares: flags that are fields of a dataclass, and one message with exit code 2 for a user's mistake."""

import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from inspect import cleandoc
from itertools import pairwise
from typing import TypeVar

import tyro
from tyro._errors import InstantiationFailure, ParseErrorEvent, on_parse_error

from configs.load import UserError

T = TypeVar("T")
Main = Callable[[Sequence[str] | None], None]
OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


def parse(schema: type[T], argv: Sequence[str] | None, *, prog: str, epilog: str = "") -> T:
    """The command line `argv` (None: this process's) as a dataclass.

    Help is made of the dataclass's docstring and of the comments beside its fields. Overrides (`key=value`) may stand
    anywhere on the line.

    Raises:
        UserError: a value that the dataclass refuses.
        SystemExit: help was asked for, or the line is not understood (2, with a message on stderr).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "overrides" in getattr(schema, "__dataclass_fields__", {}):
        words = _overrides_first(words)
    with on_parse_error(_raise_what_the_dataclass_said):
        return tyro.cli(
            schema, prog=prog, args=words, description=f"{cleandoc(schema.__doc__ or '')}\n{epilog}".rstrip(),
            config=(tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes,
                    tyro.conf.PositionalMetavarFromFieldName),
        )  # fmt: skip


def _overrides_first(words: list[str]) -> list[str]:
    """The line with all overrides together, behind the first word or at the end; what follows a flag is its value."""
    overrides, others = list[str](), list[str]()
    for before, word in pairwise(["", *words]):
        is_override = OVERRIDE.match(word) and not before.startswith("--")
        (overrides if is_override else others).append(word)
    place = 1 if others and not others[0].startswith("-") else len(others)
    return [*others[:place], *overrides, *others[place:]]


def _raise_what_the_dataclass_said(event: ParseErrorEvent) -> None:
    if isinstance(event, InstantiationFailure):
        raise UserError(event.message)


def run(main: Main, argv: Sequence[str] | None = None) -> int:
    """Call `main(argv)` and return the exit code: 0, 2 for a `UserError` or a full disk, 130 when interrupted,
    141 when whoever reads the output has left (`| head`)."""
    _make_streams_writable()
    try:
        main(argv)
        sys.stdout.flush()
    except UserError as error:
        return _fail(str(error), 2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at the end
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        return _fail(
            f"the disk is full{where}; free some space and run the same command again: what was saved before is intact",
            2,
        )
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return 0


def _make_streams_writable() -> None:
    """Output that is closed goes nowhere; what its encoding cannot say (ASCII, in many containers) is escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)  # a library's message may have several lines
    return code
