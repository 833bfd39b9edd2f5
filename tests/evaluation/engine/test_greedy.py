"""`decode`: plain greedy tokens, one time per token, counters of this request alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from configs.load import UserError
from evaluation.engine.greedy import decode
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions

Checkpoint = Callable[..., Path]
PROMPT = [7, 90, 33, 120, 8]


def test_tokens_are_those_of_plain_greedy_decoding_and_every_token_has_its_time(checkpoint: Checkpoint) -> None:
    folder = checkpoint("qwen2_moe")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    prompt_BT = torch.tensor([PROMPT])
    expected = plain.generate(
        prompt_BT, attention_mask=torch.ones_like(prompt_BT), max_new_tokens=9, do_sample=False
    )[0, 5:].tolist()  # fmt: skip
    with load(folder, EngineOptions("30%", record_trace=True)) as (model, engine):
        first = decode(model, engine, prompt_ids=PROMPT, max_new_tokens=9)
        second = decode(model, engine, prompt_ids=PROMPT, max_new_tokens=9)
        trace = engine.trace()
    assert first.token_ids == second.token_ids == expected
    assert len(first.timing.token_seconds) == 9
    assert list(first.timing.token_seconds) == sorted(first.timing.token_seconds)
    assert first.stats.misses == second.stats.misses > 0, "each request starts cold"
    assert first.stats.tokens == {"prefill": 5, "decode": 8}
    assert sorted(set(trace.request_id.tolist())) == [0, 1]


def test_decoding_ends_at_the_models_end_of_text(checkpoint: Checkpoint) -> None:
    with load(checkpoint("olmoe"), EngineOptions("100%")) as (model, engine):
        tokens = decode(model, engine, prompt_ids=PROMPT, max_new_tokens=6).token_ids
        model.generation_config.eos_token_id = tokens[2]
        assert (
            decode(model, engine, prompt_ids=PROMPT, max_new_tokens=6).token_ids
            == tokens[: tokens.index(tokens[2]) + 1]
        )


def test_nothing_to_decode_is_refused(checkpoint: Checkpoint) -> None:
    with load(checkpoint("olmoe"), EngineOptions("100%")) as (model, engine):
        with pytest.raises(UserError, match="the prompt has no tokens"):
            decode(model, engine, prompt_ids=[], max_new_tokens=1)
        with pytest.raises(UserError, match="max_new_tokens is 0; it must be at least 1"):
            decode(model, engine, prompt_ids=PROMPT, max_new_tokens=0)
