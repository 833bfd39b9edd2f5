"""What `results.json` holds, and the check that a file really holds it before anything is drawn from it.

The writer of the file is not here; this is the contract the report reads by. A key the report needs must be there, a
value that was not measured is null, and every number is finite. Keys beyond these are kept and ignored.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.load import UserError

FORMAT_VERSION = 1
BASE = "base"  # the arm that is the untouched model

Results = Mapping[str, Any]
Run = Mapping[str, Any]


@dataclass(frozen=True)
class Nullable:
    """Null, or what `of` says."""

    of: Any


@dataclass(frozen=True)
class Each:
    """An object with any keys, each value as `of` says."""

    of: Any


# float: a finite number or null; str: text or null; object: anything; [x]: a list of x; {...}: these keys.
_INTERVAL = {"low": float, "high": float}
_QUALITY = {
    "tasks": Each({"metric": str, "value": float, "stderr": float, "n": float, "chance": float}),
    "perplexity": Each({"word_perplexity": float, "n": float}),
    "mean_perplexity": float,
}
_DIFFERENCE = {
    "tasks": Each({"difference": float, **_INTERVAL}),
    "perplexity": Each({"relative": float, **_INTERVAL}),
}
_ROUTING = {
    "n_tokens": float,
    "reuse_rate_mean": float,
    "reuse_rate_per_layer": [float],
    "chance_reuse_rate": float,
    "load_entropy_per_layer": [float],
    "load_cv_per_layer": [float],
    "dead_experts_per_layer": [float],
    "nll": float,
}
_REPLAY = {
    "policy": str,
    "cache_scope": str,
    "slots": float,
    "accesses": float,
    "misses": float,
    "misses_without_first_touches": float,
    "policy_regret": float,
}
_LRU_CURVE = {"accesses": float, "misses": [float]}  # with 0, 1, ... slots of each layer, or of the one pool
_PLAN = {
    "division": {
        "budget_bytes": float,
        "resident_bytes": float,
        "buffer_bytes": float,
        "kv_bytes": float,
        "activation_bytes": float,
        "expert_cache_bytes": float,
        "context_tokens": float,
        "slots": float,
    },
    "read_bandwidth": {"bytes_per_second": float},
    "measured": {"compute_ms": float},
}
_DECODE = {
    "expert_cache_bytes": float,
    "demands": float,
    "hit_rate": {"prefill": float, "decode": float},
    "bytes_read_per_token": float,
    "mean_ttft_ms": float,
    "mean_tpot_ms": float,
    "output_throughput": float,
    "n_prompts": float,
    "n_tokens": float,
}
_RUN = {
    "seed": float,
    "history": Nullable([Each(object)]),
    "quality": Nullable(_QUALITY),
    "difference": Nullable(_DIFFERENCE),
    "routing": Nullable(_ROUTING),
    "replay": Nullable([_REPLAY]),
    "lru_curves": Nullable({"per_layer": _LRU_CURVE, "global": _LRU_CURVE}),
    "decode": Nullable([_DECODE]),
}
_RESULTS = {
    "created": str,
    "reproduce": {
        "command": str,
        "commit": str,
        "config": Each(object),
        "machine": Each(object),
        "seconds": Each(float),
    },
    "model": {
        "name": str,
        "n_parameters": float,
        "layers": float,
        "experts": float,
        "top_k": float,
        "expert_bytes": float,
        "token_demand_bytes": float,
        "dtype": str,
    },
    "plans": [_PLAN],
    "arms": Each({"objective": str, "coefficients": Each(object), "runs": [_RUN]}),
}


def read_results(path: str | Path) -> dict[str, Any]:
    """The checked content of a results file.

    Raises:
        UserError: no such file, not UTF-8, not JSON, or not what the report reads.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"results file {path} does not exist; name the results.json of a finished run")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); is it a results.json?"
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON (line {error.lineno}, column {error.colno}: {error.msg}); "
            "it may be cut off: write it again with `remoe run`"
        ) from error
    check_results(content, source=str(path))
    return dict(content)


def check_results(content: Any, *, source: str = "results") -> None:
    """Raises `UserError`, naming the place, unless `content` is what the report reads."""
    if not isinstance(content, dict):
        raise UserError(f"{source} must hold one JSON object, found {_kind(content)}")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{source}: format_version is {version!r}, this report reads {FORMAT_VERSION}; run `remoe run` again"
        )
    _check(content, _RESULTS, source, "")
    arms = content["arms"]
    if BASE not in arms:
        raise UserError(f"{source}: arms has no {BASE!r}, the untouched model that all others are compared with")
    for name, arm in arms.items():
        if not arm["runs"]:
            raise UserError(f"{source}: arms.{name}.runs is empty; leave out an arm that was not run")


def _check(value: Any, spec: Any, source: str, where: str) -> None:
    if isinstance(spec, Nullable):
        if value is not None:
            _check(value, spec.of, source, where)
    elif spec is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and math.isfinite(value)):
            raise _wrong(source, where, "a finite number, or null if it was not measured", value)
    elif spec is str:
        if value is not None and not isinstance(value, str):
            raise _wrong(source, where, "text or null", value)
    elif isinstance(spec, list):
        if not isinstance(value, list):
            raise _wrong(source, where, "a list", value)
        for i, item in enumerate(value):
            _check(item, spec[0], source, f"{where}[{i}]")
    elif isinstance(spec, Each | dict):
        if not isinstance(value, dict):
            raise _wrong(source, where, "an object", value)
        fields = spec if isinstance(spec, dict) else dict.fromkeys(value, spec.of)
        for key, below in fields.items():
            inside = f"{where}.{key}" if where else str(key)
            if key not in value:
                raise UserError(f"{source}: {inside} is missing; write null if it was not measured")
            _check(value[key], below, source, inside)
    else:
        assert spec is object, f"unknown spec {spec!r}"


def _wrong(source: str, where: str, wanted: str, value: Any) -> UserError:
    return UserError(f"{source}: {where} must be {wanted}, found {_kind(value)}")


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {value!r:.40}"
