"""Presets, coefficients and ramps: what is checked before anything is computed, and what a table of terms must hold."""

from dataclasses import asdict, fields
from typing import Any

import pytest

from training.objective.terms import PRESETS, TERMS, ObjectiveArguments, objective_settings, ramp, weights_at

COEFFICIENTS = ("router_kl_coef", "reuse_coef", "smooth_coef", "lag_coef", "working_set_coef")


def test_the_remoe_preset_has_the_published_coefficients() -> None:
    args = ObjectiveArguments()
    assert args.objective == "remoe"
    assert [getattr(args, key) for key in COEFFICIENTS] == [0.45, 0.2, 0.05, 0.05, 0.01]
    assert args.distill_coef == args.miss_coef == 0
    assert args.lags == [1, 2, 4, 8, 16]
    assert args.working_set_window == 16
    assert (args.reuse_warmup_steps, args.consistency_warmup_steps) == (400, 800)
    assert args.router_aux_loss_coef == 0


def test_there_is_a_test_for_every_preset() -> None:
    assert set(PRESETS) == {
        "ce_only", "remoe", "remoe_no_trust", "remoe_no_reuse", "remoe_no_consistency", "cache", "cache_miss",
        "melinoe", "in_the_loop", "local",
    }  # fmt: skip


def test_a_coefficient_that_is_written_wins_over_the_preset() -> None:
    args = ObjectiveArguments(objective="ce_only", reuse_coef=0.7)
    assert args.reuse_coef == 0.7
    assert args.router_kl_coef == 0.0


def test_an_unknown_objective_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"objective='remo' is not known; choose one of ce_only, remoe, .*cache"):
        ObjectiveArguments(objective="remo")


def test_a_negative_coefficient_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lag_coef=-0\.1: write a number of at least 0"):
        ObjectiveArguments(lag_coef=-0.1)


@pytest.mark.parametrize("values", [{"lags": [1, 0]}, {"cache_slots": [0]}, {"working_set_window": 0}])
def test_sizes_below_one_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="write a number of at least 1"):
        ObjectiveArguments(**values)


@pytest.mark.parametrize(("wrong", "words"), [(1.0, "must be below 1"), (-0.1, "write a number of at least 0")])
def test_a_share_of_distillation_that_cannot_be_is_refused(wrong: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ObjectiveArguments(objective="ce_only", distill_coef=wrong)


def test_ramps_are_linear_from_zero() -> None:
    assert [ramp(step, 4) for step in (0, 1, 2, 4, 9)] == [0, 0.25, 0.5, 1, 1]
    assert ramp(0, 0) == 1


def test_every_coefficient_belongs_to_a_term_and_every_row_names_fields_that_are_there() -> None:
    known = {key.name for key in fields(ObjectiveArguments)}
    named = {term.coefficient for term in TERMS} | {"distill_coef"}
    assert {key for key in known if key.endswith("_coef")} == named
    for term in TERMS:
        assert {term.coefficient, term.ramp or "objective", *term.settings} <= known


def test_weights_are_coefficients_times_their_ramps() -> None:
    args = ObjectiveArguments(miss_coef=0.5, router_aux_loss_coef=0.3)
    assert weights_at(args, 200) == {
        "reuse_loss": 0.5 * 0.2, "smooth_loss": 0.25 * 0.05, "lag_loss": 0.25 * 0.05, "working_set_loss": 0.25 * 0.01,
        "miss_loss": 0.5 * 0.5, "soft_cache_loss": 0.0, "rank_loss": 0.0, "trust_kl": 0.45, "load_balance_loss": 0.3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("ce_only", {}),
        (
            "cache_miss",
            {
                "distill_coef": 0.9, "miss_coef": 0.25, "miss_temperature": 0.25, "cache_slots": [8], "router_kl_coef": 0.1,
                "reuse_warmup_steps": 400,
            },
        ),
        (
            "in_the_loop",
            {
                "distill_coef": 0.9, "miss_coef": 0.08, "miss_temperature": 0.02, "cache_slots": [8], "lever_delta": 0.06,
                "cache_policy": "decayed", "candidate_experts": 4,
                "router_kl_coef": 0.02, "reuse_warmup_steps": 400,
            },
        ),
        ("cache", {"reuse_coef": 0.2, "cache_slots": [8], "router_kl_coef": 0.45, "reuse_warmup_steps": 400}),
        ("remoe_no_consistency", {"reuse_coef": 0.2, "router_kl_coef": 0.45, "reuse_warmup_steps": 400}),
        (
            "remoe_no_reuse",
            {
                "smooth_coef": 0.05, "lag_coef": 0.05, "lags": [1, 2, 4, 8, 16], "working_set_coef": 0.01,
                "working_set_window": 16, "router_kl_coef": 0.45, "consistency_warmup_steps": 800,
            },
        ),
    ],
)  # fmt: skip
def test_the_settings_of_an_objective_are_the_keys_that_change_it(objective: str, expected: dict[str, Any]) -> None:
    config = {**asdict(ObjectiveArguments(objective=objective)), "max_steps": 5}
    assert objective_settings(config) == expected
