"""Tasks in steps: without a lever the harness's own answers, with one every request from a cache of its own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configs.load import UserError
from evaluation.engine.levers.spec import levers_of
from evaluation.frontier.steps import CacheKind
from evaluation.frontier.task_scores import StepLM
from evaluation.quality.batches import Answers
from evaluation.quality.scores import Scores, run_tasks, scores_of
from evaluation.quality.tasks import QualityArguments, load_tasks
from training.model.loading import load_pretrained, load_tokenizer

ROOT = Path(__file__).parents[3]
MODEL = str(ROOT / "data" / "embedded" / "model")
ARGS = QualityArguments(tasks=["arithmetic", "headword", "perplexity_code"], limit=4, offline=True)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return load_pretrained(MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(MODEL)


def in_steps(model: Any, tokenizer: Any, lever: str | None, args: QualityArguments = ARGS, **changed: Any) -> Scores:
    lm = StepLM(model, tokenizer, levers_of(lever) if lever else (), CacheKind(8), Answers())
    lm._most = changed.get("most")
    return scores_of(lm, tokenizer, args, load_tasks(args))


def test_without_a_lever_answers_are_those_of_whole_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    expected, found = run_tasks(model, tokenizer, ARGS), in_steps(model, tokenizer, None)
    assert expected.keys() == found.keys()
    for name in expected:
        assert found[name].values == pytest.approx(expected[name].values, rel=1e-4), name


def test_a_lever_acts_on_every_token_and_requests_do_not_see_each_others_caches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    plain, strong = in_steps(model, tokenizer, None), in_steps(model, tokenizer, "prior:delta=0.5")
    assert not np.allclose(plain["perplexity_code"].values, strong["perplexity_code"].values, rtol=1e-3)
    alone = in_steps(model, tokenizer, "prior:delta=0.5", most=1)
    for name in alone:
        assert alone[name].values == pytest.approx(strong[name].values, rel=1e-4), name


def test_sampling_is_refused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    sampled = QualityArguments(tasks=["arithmetic"], limit=2, offline=True, gen_kwargs={"do_sample": True})
    with pytest.raises(UserError, match="answered by greedy decoding"):
        in_steps(model, tokenizer, None, sampled)
