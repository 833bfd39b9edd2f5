"""Text that is written freely: the untouched model writes what it would write, and distances are those of its predictions."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from evaluation.engine.levers.spec import levers_of
from evaluation.engine.stats import ReadCounts
from evaluation.frontier import generation
from evaluation.frontier.generation import Written, write_on
from evaluation.frontier.steps import CacheKind, cached, stepped
from training.model.loading import load_pretrained

MODEL = str(Path(__file__).parents[3] / "data" / "embedded" / "model")
NEW = 8
LEVER = levers_of("prior:delta=0.2")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return load_pretrained(MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def texts() -> np.ndarray:
    return np.random.default_rng(5).integers(4, 4000, size=(4, 24))


def written(model: PreTrainedModel, texts: np.ndarray, levers: Any = (), **changed: Any) -> Written:
    how: dict[str, Any] = {"new": NEW, "untouched": nullcontext, **changed}
    return write_on(model, texts, levers, CacheKind(8, "decayed"), **how)


@torch.no_grad()
def test_without_a_lever_nothing_is_away_from_the_untouched_model(model: PreTrainedModel, texts: np.ndarray) -> None:
    found = written(model, texts)
    assert np.abs([found.kl_R, found.kl_given_R]).max() < 1e-4
    whole = torch.from_numpy(np.concatenate([texts[:, :-NEW], found.ids_RN], axis=1))
    log_p = model(input_ids=whole).logits.log_softmax(-1)[:, -NEW - 1 : -1]
    losses = -log_p.gather(-1, whole[:, -NEW:, None]).squeeze(-1).sum(1)
    assert found.losses_R == pytest.approx(losses.numpy(), rel=1e-4)
    assert not (found.ids_RN == texts[:, -NEW:]).all()


def test_what_is_written_is_drawn_from_the_predictions_and_is_the_same_for_the_same_seed(
    model: PreTrainedModel, texts: np.ndarray
) -> None:
    same_text = np.repeat(texts[:1], 400, axis=0)
    found = written(model, same_text, new=1)
    with torch.no_grad():
        p = model(input_ids=torch.from_numpy(texts[:1, :-1])).logits[0, -1].softmax(-1).numpy()
    counts = np.bincount(found.ids_RN[:, 0], minlength=len(p))
    likely = np.argsort(-p)[:5]
    assert counts[likely] / 400 == pytest.approx(p[likely], abs=0.08)
    assert counts[p < 1e-6].sum() == 0
    assert (written(model, texts).ids_RN == written(model, texts).ids_RN).all()
    assert (written(model, texts).ids_RN != written(model, texts, seed=1).ids_RN).any()


@torch.no_grad()
def test_distances_are_those_of_predictions_step_by_step(
    model: PreTrainedModel, texts: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = written(model, texts, LEVER)
    for row in range(len(texts)):
        for ids, expected in ((texts[row], found.kl_given_R[row]), (None, found.kl_R[row])):
            whole = np.concatenate([texts[row, :-NEW], found.ids_RN[row]]) if ids is None else ids
            ids_1S = torch.from_numpy(whole)[None]
            log_p = model(input_ids=ids_1S).logits[0].log_softmax(-1)
            with cached(model, 1, LEVER, CacheKind(8, "decayed"), ReadCounts()):
                log_q = {step: logits[0].log_softmax(-1) for step, logits in stepped(model, ids_1S)}
            distance = sum((q.exp() * (q - log_p[step])).sum() for step, q in log_q.items() if step >= 24 - NEW - 1)
            assert float(distance) == pytest.approx(expected, rel=1e-3)
    assert (found.kl_R > 1e-3).all()
    monkeypatch.setattr(generation, "MOST_NUMBERS", 1)
    one_by_one = written(model, texts, LEVER)
    assert (one_by_one.ids_RN == found.ids_RN).all()
    assert one_by_one.kl_R == pytest.approx(found.kl_R, rel=1e-3)
