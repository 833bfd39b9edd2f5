"""Texts read in steps: the losses of one pass where no lever acts, the loads of a replay, and with one those of the engine."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from configs.load import UserError
from evaluation.engine.cache.policies import ONLINE
from evaluation.engine.cache.replay import replay, requests_of
from evaluation.engine.levers.prior import Prior
from evaluation.engine.levers.spec import levers_of
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from evaluation.frontier import steps as steps_module
from evaluation.frontier.steps import CacheKind, read_in_steps
from evaluation.tracing import teacher_forced_trace
from training.model.loading import load_pretrained
from training.model.routers import find_routers

MODEL = str(Path(__file__).parents[3] / "data" / "embedded" / "model")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return load_pretrained(MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def texts() -> np.ndarray:
    return np.random.default_rng(5).integers(4, 4000, size=(5, 24))


@pytest.mark.parametrize("policy", ["lru", "decayed"])
@pytest.mark.parametrize("scope", ["per_layer", "global"])
def test_without_a_lever_losses_are_those_of_one_pass_and_loads_those_of_the_replay(
    policy: str, scope: str, model: PreTrainedModel, texts: np.ndarray
) -> None:
    found = read_in_steps(model, texts, (), CacheKind(8, policy, scope))
    trace, losses_R = teacher_forced_trace(model, list(texts), max_length=24)
    assert found.losses_R == pytest.approx(losses_R, rel=1e-4)
    kept = trace.where(
        np.arange(trace.tokens) % 24 < 23
    )  # the last token of a text is not read: nothing comes after it
    for row in range(5):
        of_row = kept.where(kept.request_id == row)
        slots = 8 * (4 if scope == "global" else 1)
        replayed = replay(of_row, cache_scope=scope, requests=requests_of(of_row), policy=policy, slots=slots)
        assert found.loads_R[row] == replayed.misses
        assert found.accesses_R[row] == 23 * 4 * 4
    assert (found.swapped, found.lost_weight) == (0, 0.0)
    assert not any(router._forward_hooks for router in find_routers(model).values()), "the model is left as it was"


@pytest.mark.parametrize("lever", ["prior:delta=0.05", "prior:space=logits,delta=0.2,keep=1", "drop:below=0.1"])
def test_with_a_lever_it_is_the_engine_that_is_shown(lever: str, texts: np.ndarray) -> None:
    """The same text fed to the paged model token by token, with caches as large; there the first token is a prompt."""
    found = read_in_steps(load_pretrained(MODEL, dtype=torch.float32), texts[:1], levers_of(lever), CacheKind(8))
    slot_bytes = _slot_bytes()
    options: dict[str, Any] = {"cache_policy": "lru", "cache_scope": "per_layer", "dtype": "float32", "warn": False}
    with (
        load(MODEL, EngineOptions(8 * 4 * slot_bytes, lever=f"{lever},prefill=true", **options)) as (paged, engine),
        torch.no_grad(),
    ):
        assert engine.cache.slots == 8
        past, loss, ids = None, 0.0, torch.from_numpy(texts[:1])
        for step in range(23):
            outputs: Any = paged(input_ids=ids[:, step : step + 1], past_key_values=past, use_cache=True)
            past = outputs.past_key_values
            loss += float(torch.nn.functional.cross_entropy(outputs.logits[:, -1], ids[:, step + 1]))
        stats = engine.stats()
    assert loss == pytest.approx(found.losses_R[0], rel=1e-5)
    assert stats.misses == found.loads_R[0]
    of_first_token = found.swapped - stats.swapped  # from an empty cache, which only dropping takes note of
    assert stats.swapped > 0
    assert (of_first_token > 0) == lever.startswith("drop")
    assert found.lost_weight >= stats.lost_weight > 0


def _slot_bytes() -> int:
    with load(MODEL, EngineOptions("100%", dtype="float32", warn=False)) as (_, engine):
        return engine.demand.slot_bytes


def test_texts_do_not_see_each_others_caches_however_many_are_read_at_once(
    model: PreTrainedModel, texts: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    lever = [Prior(delta=0.05)]
    together = read_in_steps(model, texts, lever, CacheKind(6))
    monkeypatch.setattr(steps_module, "MOST_TOKENS", 48)
    apart = read_in_steps(model, texts, lever, CacheKind(6))
    assert apart.losses_R == pytest.approx(together.losses_R, rel=1e-5)
    assert (apart.loads_R == together.loads_R).all()
    assert apart.swapped == together.swapped > 0


def test_a_stronger_prior_loads_less_and_changes_more(model: PreTrainedModel, texts: np.ndarray) -> None:
    loads, swapped = [], []
    for delta in (0.0, 0.02, 0.1, 0.5):
        found = read_in_steps(model, texts, [Prior(delta=delta)], CacheKind(8))
        loads.append(int(found.loads_R.sum()))
        swapped.append(found.swapped)
    assert sorted(loads, reverse=True) == loads
    assert sorted(swapped) == swapped
    assert swapped[0] == 0


def test_a_lever_for_another_number_of_layers_is_refused_and_the_model_left_alone(model: PreTrainedModel) -> None:
    with pytest.raises(UserError, match=re.escape("delta has 3 numbers, the model 4 layers")):
        read_in_steps(model, np.ones((2, 4), dtype=int), [Prior(delta=(0.1, 0.1, 0.1))], CacheKind(8))
    assert not any(router._forward_hooks for router in find_routers(model).values())
    assert set(ONLINE) >= {"lru", "decayed"}
