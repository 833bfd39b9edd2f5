"""Several evaluations of one model as one; refused where they measured different things."""

from collections.abc import Mapping
from typing import Any

from configs.load import UserError
from evaluation.results import BASE, ArmResults, Results

SAME_MODEL = ("n_parameters", "layers", "experts", "top_k", "expert_bytes", "dtype")
SAME_SETTINGS = ("dtype", "quality", "routing", "replay")
"""Sections of the configuration that decide what is measured; how it is decoded, and where, may differ."""
WHERE = ("offline", "batch_size", "confirm_run_unsafe_code", "include_path")
"""Keys in them that change no number on purpose."""
SAME_LOSS = 0.01
"""How far apart the losses of the untouched model on the same text may be, in nats, on different machines."""


def merged(evaluations: Mapping[str, Results]) -> Results:
    """All arms in one, as `label: arm`; the base is that of the first.

    Turns of decoding were taken within one evaluation, so of the others only the mean times are kept.

    Args:
        evaluations: by their labels, which the report shows.

    Raises:
        UserError: they are of different models, or measured different things; says which.
    """
    (first_label, first), *others = evaluations.items()
    arms: dict[str, ArmResults] = {BASE: first.arms[BASE]}
    for label, results in evaluations.items():
        if results is not first:
            _check_same(first_label, first, label, results)
        for name, arm in results.arms.items():
            if name == BASE and results is first:
                continue
            runs = arm.runs if results is first else [_without_turns(run) for run in arm.runs]
            arms[f"{label}: {name}"] = arm.model_copy(update={"runs": runs})
    made = first.reproduce.model_copy(
        update={
            "command": " and ".join(str(results.reproduce.command) for results in evaluations.values()),
            "machine": {label: _machine(results) for label, results in evaluations.items()},
            "seconds": {},
        }
    )
    plans = [plan for results in evaluations.values() for plan in results.plans] if not others else []
    return first.model_copy(update={"arms": arms, "reproduce": made, "plans": plans, "machine_load": None})


def _without_turns(run: Any) -> Any:
    rows = [row.model_copy(update={"ttft_ms": None, "tpot_ms": None}) for row in run.decode or []]
    return run.model_copy(update={"decode": rows})


def _machine(results: Results) -> str:
    facts = results.reproduce.machine
    return ", ".join(str(facts[key]) for key in ("cpu", "cores", "memory_gib", "torch") if key in facts)


def _check_same(first_label: str, first: Results, label: str, other: Results) -> None:
    for key in SAME_MODEL:
        _check_equal(f"the model's {key}", first_label, getattr(first.model, key), label, getattr(other.model, key))
    settings, others = (dict(_flat(_measured(results))) for results in (first, other))
    for key in dict.fromkeys([*settings, *others]):
        _check_equal(key, first_label, settings.get(key), label, others.get(key))
    losses = [
        next((run.routing.nll for run in results.arms[BASE].runs if run.routing), None) for results in (first, other)
    ]
    if None not in losses and abs(losses[0] - losses[1]) > SAME_LOSS:  # type: ignore[operator]
        raise UserError(
            f"the untouched model has {losses[0]:.3f} nats a token in {first_label} and {losses[1]:.3f} in {label}: these "
            "are not the same weights or not the same text"
        )


def _measured(results: Results) -> dict[str, Any]:
    config = results.reproduce.config
    config = config.get("evaluation", config)
    return {key: config.get(key) for key in SAME_SETTINGS}


def _flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [] if name.split(".")[-1] in WHERE else [(name, value)]
    return [pair for key, inner in value.items() for pair in _flat(inner, f"{name}.{key}" if name else str(key))]


def _check_equal(what: str, first_label: str, one: Any, label: str, other: Any) -> None:
    if one != other:
        raise UserError(
            f"{what} is {one!r:.60} in {first_label} and {other!r:.60} in {label}: they measured different things; evaluate "
            "again with the same"
        )
