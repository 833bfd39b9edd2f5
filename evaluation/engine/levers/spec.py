"""Levers in a line, as flags and configurations take them: `prior:space=probability,delta=0.04+drop:below=0.02`."""

import difflib
from dataclasses import fields
from typing import Any

from pydantic import ValidationError

from configs.load import UserError
from evaluation.engine.levers.drop import Drop
from evaluation.engine.levers.prior import Prior

KNOWN: dict[str, type[Prior] | type[Drop]] = {"prior": Prior, "drop": Drop}
EXAMPLE = "prior:space=probability,delta=0.04"


def levers_of(text: str) -> tuple[Prior | Drop, ...]:
    """The levers that a line names, which act one after the other; between keys `;` may stand for a comma.

    Raises:
        UserError: a name, a key or a value that is not known; or something after dropping, which leaves fewer experts.
    """
    levers = tuple(_lever(part.strip()) for part in text.split("+"))
    if any(isinstance(lever, Drop) for lever in levers[:-1]):
        raise UserError(
            f"lever {text!r}: what drop leaves out no other lever can choose again; write drop last, and once"
        )
    return levers


def _lever(text: str) -> Prior | Drop:
    name, _, rest = text.partition(":")
    if name not in KNOWN:
        near = difflib.get_close_matches(name, KNOWN, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(KNOWN)}"
        raise UserError(f"lever {name!r} is not known; {hint} Write for example {EXAMPLE}")
    values: dict[str, Any] = {}
    for pair in filter(None, rest.replace(";", ",").split(",")):
        key, is_pair, value = (part.strip() for part in pair.partition("="))
        known = [field.name for field in fields(KNOWN[name])]
        if not is_pair or key not in known or key in values:
            what = "comes twice" if key in values else "is no key of it"
            raise UserError(f"lever {name}: {pair!r} {what}; write {name}:KEY=VALUE,... with {', '.join(known)}")
        values[key] = tuple(value.split("/")) if "/" in value else value
    try:
        return KNOWN[name](**values)
    except ValidationError as error:
        told = error.errors()
        key = str(told[0]["loc"][0])
        first = next(
            (one for one in told if "tuple" in str(one["loc"]) and isinstance(values.get(key), tuple)), told[0]
        )
        given = f"{key}={rest_of(values.get(key))}" if key in values else f"no {key}"
        raise UserError(f"lever {name}: {given}: {first['msg']}; write for example {EXAMPLE}") from error


def rest_of(value: Any) -> str:
    """A value as it was written."""
    return "/".join(value) if isinstance(value, tuple) else str(value)
