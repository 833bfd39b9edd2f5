"""The only configuration loader: dataclass defaults < one YAML < `key=value` overrides.

Strict on purpose: an unknown key, a missing file or a value of the wrong type is a `UserError` that says what to
write instead. What a key means is documented beside the code that reads it, in the dataclass that is passed in.
"""

import ast
import difflib
import inspect
import os
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from itertools import takewhile
from pathlib import Path
from textwrap import dedent
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


class UserError(ValueError):
    """Something the user can fix: the message names the value, why it is wrong and what to write instead."""


def load(schema: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Build `schema` (a dataclass) from its defaults, then the YAML at `path`, then `key=value` overrides.

    A `UserError` names a YAML that cannot be read, an unknown key, a wrong type, or a value that `schema` refuses.
    """
    resolved = OmegaConf.structured(schema)
    if path is not None:
        resolved = _merge(resolved, _read_yaml(Path(path)), source=str(path))
    for override in overrides:
        if "=" not in override:
            raise UserError(f"override {override!r} has no '='; write it as key=value, for example max_steps=100")
        if override.endswith("="):  # a shell variable that is not set, for example
            raise UserError(f"override {override!r} has no value; write {override}null to unset the key")
        resolved = _merge(resolved, _read_override(override), source=f"override {override!r}")
    _expand_home(resolved)
    try:
        missing = sorted(str(key) for key in OmegaConf.missing_keys(resolved))
        if missing:
            raise ValueError(f"no value for {', '.join(missing)}; set it in the YAML or as key=value")
        return cast(T, OmegaConf.to_object(resolved))
    except OmegaConfBaseException as error:  # a ${reference} to nothing, for example
        raise UserError(f"{path or schema.__name__}: {_first_line(error)}") from error
    except ValueError as error:  # from here or from __post_init__
        raise UserError(f"{path or schema.__name__}: {error}") from error


def keys_help(schema: type[Any]) -> str:
    """For `--help`: a line for every key of a dataclass, its default and the comment that stands beside it."""
    return "\nkeys of the config and their defaults:\n" + "\n".join(_key_lines(schema, prefix=""))


def _key_lines(schema: type[Any], *, prefix: str) -> Iterator[str]:
    comments = field_comments(schema)
    for key in fields(schema):
        if isinstance(key.type, type) and is_dataclass(key.type):
            yield from _key_lines(key.type, prefix=f"{prefix}{key.name}.")
            continue
        default: Any = key.default if key.default_factory is MISSING else key.default_factory()
        shown = "null" if default is None else str(default).replace("???", "(required)")
        yield f"  {f'{prefix}{key.name}={shown}':<44} {comments[key.name]}".rstrip()


def field_comments(schema: type[Any]) -> dict[str, str]:
    """Field -> the comment behind it or, if there is none, the comment lines directly above it."""
    comments = {}
    for cls in reversed([cls for cls in schema.__mro__ if is_dataclass(cls)]):
        lines = dedent(inspect.getsource(cls)).splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                behind = lines[(node.end_lineno or 0) - 1].encode()[node.end_col_offset :].decode()
                behind = behind.replace("# fmt: skip", "").strip()
                above = takewhile(lambda line: line.startswith("#"), map(str.strip, reversed(lines[: node.lineno - 1])))
                found = [behind] if behind else [*reversed(list(above))]
                comments[node.target.id] = " ".join(line.removeprefix("#").strip() for line in found)
    return comments


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else "; shipped configs are under configs/"
        raise UserError(f"config file {path} does not exist{hint}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = yaml.safe_load(text)
        if isinstance(content, dict):
            return cast(DictConfig, OmegaConf.create(text))  # which refuses a key that is written twice
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        raise UserError(f"{path}{line} is not valid YAML: {getattr(error, 'problem', None) or error}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_first_line(error)}") from error
    raise UserError(f"{path} must hold `key: value` lines, found {type(content).__name__}")


def _read_override(override: str) -> DictConfig:
    try:
        return OmegaConf.from_dotlist([override])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"override {override!r} is not valid YAML: {_first_line(error)}") from error


def _expand_home(config: DictConfig) -> None:
    """A text that begins with ~/ is a path in the home folder, as in a shell, which does not see it behind key=."""
    keys: list[Any] = list(config)
    for key in keys:
        if OmegaConf.is_missing(config, key) or OmegaConf.is_interpolation(config, key):
            continue
        if isinstance(config[key], DictConfig):
            _expand_home(config[key])
        elif isinstance(config[key], str) and config[key].startswith("~/"):
            config[key] = os.path.expanduser(config[key])


def _merge(base: DictConfig, layer: DictConfig, *, source: str) -> DictConfig:
    _check_keys(base, layer, source=source, prefix="")
    try:
        return cast(DictConfig, OmegaConf.merge(base, layer))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise UserError(f"{source}: {key}: {_first_line(error)}") from error


def _check_keys(base: DictConfig, layer: DictConfig, *, source: str, prefix: str) -> None:
    """Unknown keys, nested ones too, with the nearest known key as a suggestion."""
    known = [str(key) for key in base]
    for key in map(str, layer):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(sorted(known))}"
            raise UserError(f"{source}: unknown key {prefix}{key}; {hint}")
        below, here = layer._get_node(key), base._get_node(key)
        if isinstance(below, DictConfig) and isinstance(here, DictConfig) and OmegaConf.get_type(here) is not dict:
            _check_keys(here, below, source=source, prefix=f"{prefix}{key}.")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
