"""Conversations with kept keys and values say, bit for bit, what they say without; memory is shared with the experts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM
from transformers.generation.streamers import BaseStreamer

from configs.load import UserError
from evaluation.engine.loading import load
from evaluation.engine.memory.prefix_cache import PrefixCache
from evaluation.engine.options import EngineOptions
from evaluation.engine.sessions.conversations import Conversations
from tests.evaluation.engine.memory.made_budgets import budget_for

Checkpoint = Callable[..., Path]
BLOCK = 4
MANY = 2**30
OPTIONS: dict[str, Any] = {
    "max_new_tokens": 5,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}


def prompts() -> list[torch.Tensor]:
    """Three conversations of three turns that take turns; two of them begin the same. Lengths meet and miss blocks."""
    draw = torch.Generator().manual_seed(3)
    begin = torch.randint(2, 258, (1, 9), generator=draw)
    texts = [begin, torch.cat([begin, torch.tensor([[5, 6, 7]])], 1), torch.randint(2, 258, (1, 13), generator=draw)]
    asked = []
    for _ in range(3):
        for i, text in enumerate(texts):
            asked.append(text)
            texts[i] = torch.cat([text, torch.randint(2, 258, (1, 7), generator=draw)], 1)
    return asked


def said(generate: Callable[..., Any], asked: list[torch.Tensor]) -> list[tuple[list[int], torch.Tensor]]:
    outputs = [generate(prompt_BT, **OPTIONS) for prompt_BT in asked]
    return [(output.sequences[0].tolist(), torch.stack(output.logits)) for output in outputs]


def same(one: list[tuple[list[int], torch.Tensor]], other: list[tuple[list[int], torch.Tensor]]) -> bool:
    return all(a == b and torch.equal(p, q) for (a, p), (b, q) in zip(one, other, strict=True))


def resident(folder: Path) -> Callable[..., Any]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return lambda ids_BT, **options: model.generate(
        input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), prefill_chunk_size=BLOCK, **options
    )


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2"])
@pytest.mark.parametrize("held_blocks", [0, 1, 5, 1000])
def test_what_is_said_is_what_the_resident_model_says(checkpoint: Checkpoint, family: str, held_blocks: int) -> None:
    folder, asked = checkpoint(family), prompts()
    expected = said(resident(folder), asked)
    with load(folder, EngineOptions("30%")) as (model, engine):
        kept = engine.keep_prefixes(MANY)
        chat = Conversations(model, kept, block_tokens=BLOCK)
        chat.generate(asked[0], **OPTIONS)
        assert kept.block_bytes is not None
        kept.resize(held_blocks * kept.block_bytes)
        found = chat.found_tokens
        assert same(said(chat.generate, asked), expected)
        assert kept.held_bytes <= held_blocks * kept.block_bytes
    saved = chat.found_tokens - found
    assert saved == 0 if held_blocks == 0 else saved > 0
    assert chat.found_tokens + chat.computed_tokens == asked[0].shape[1] + sum(p.shape[1] for p in asked)
    if held_blocks == 1000:  # everything but the first use of each block; at least one token is always computed
        blocks = {tuple(p[0, :end].tolist()) for p in asked for end in range(BLOCK, p.shape[1] + 1, BLOCK)}
        uses = sum((p.shape[1] - 1) // BLOCK for p in asked)
        last = {tuple(p[0].tolist()) for p in asked if p.shape[1] % BLOCK == 0}
        first = {tuple(asked[0][0, :end].tolist()) for end in (4, 8)}
        assert saved == BLOCK * (uses - len(blocks - last - first))


def test_of_a_prompt_that_is_held_whole_the_last_block_is_computed_again(checkpoint: Checkpoint) -> None:
    folder, prompt_BT = checkpoint("olmoe"), prompts()[1]
    assert prompt_BT.shape[1] == 3 * BLOCK
    expected = said(resident(folder), [prompt_BT] * 2)
    with load(folder, EngineOptions("30%")) as (model, engine):
        chat = Conversations(model, engine.keep_prefixes(MANY), block_tokens=BLOCK)
        assert same(said(chat.generate, [prompt_BT] * 2), expected)
        assert chat.found_tokens == 2 * BLOCK


def test_a_request_that_is_broken_off_leaves_whole_blocks_and_nothing_wrong(checkpoint: Checkpoint) -> None:
    class Hangup(BaseStreamer):
        def __init__(self) -> None:
            self.left = 3

        def put(self, value: torch.Tensor) -> None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

        def end(self) -> None:
            raise AssertionError("never reached")

    folder, prompt_BT = checkpoint("olmoe"), prompts()[2]
    expected = said(resident(folder), [prompt_BT])
    with load(folder, EngineOptions("30%")) as (model, engine):
        chat = Conversations(model, engine.keep_prefixes(MANY), block_tokens=BLOCK)
        with pytest.raises(KeyboardInterrupt):
            chat.generate(prompt_BT, streamer=Hangup(), **OPTIONS)
        assert same(said(chat.generate, [prompt_BT]), expected)
        assert chat.found_tokens == 12


def test_an_unreadable_expert_leaves_nothing_wrong(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, prompt_BT = checkpoint("olmoe"), prompts()[2]
    expected = said(resident(folder), [prompt_BT])
    with load(folder, EngineOptions("30%")) as (model, engine):
        chat = Conversations(model, engine.keep_prefixes(MANY), block_tokens=BLOCK)
        forward, calls = engine._pager.forward, 0

        def fail_in_the_second_block(*args: Any, **options: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == 4:  # its second layer
                raise UserError("cannot be read")
            return forward(*args, **options)

        monkeypatch.setattr(engine._pager, "forward", fail_in_the_second_block)
        with pytest.raises(UserError, match="cannot be read"):
            chat.generate(prompt_BT, **OPTIONS)
        assert same(said(chat.generate, [prompt_BT]), expected)
        assert chat.found_tokens == BLOCK, "the first block was whole"


def test_slots_give_way_to_kept_blocks_and_both_to_a_long_request(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = checkpoint("qwen2_moe"), prompts()
    expected = said(resident(folder), asked)
    budget_bytes = budget_for(folder, experts=20, context_tokens=40)
    with load(folder, EngineOptions(memory_budget=budget_bytes, context_tokens=40)) as (model, engine):
        assert engine.division is not None
        whole = engine.cache.total_slots
        kept = engine.keep_prefixes(MANY)
        chat = Conversations(model, kept, block_tokens=BLOCK)
        smallest = engine.division.smallest_slots
        assert same(said(chat.generate, asked), expected)
        taken = (whole - engine.cache.total_slots) * engine.division.slot_bytes
        assert 0 < kept.held_bytes <= taken
        assert engine.cache.total_slots > smallest
        spare = engine.division.spare_bytes(engine._call)
        asked_for, chat_needs = kept.held_bytes, engine.division.needs.kv_bytes_per_token
        assert not engine._room_for_kept(spare + 1), "the fewest slots stay"
        assert engine._room_for_kept(spare)
        assert engine.cache.total_slots == smallest
        kept.resize(0)
        assert asked_for > chat_needs
        assert same(said(chat.generate, asked), expected)
        assert engine.cache.total_slots > smallest, "slots come back"


def test_a_model_that_forgets_has_no_prefix_cache() -> None:
    config = Gemma2Config(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, sliding_window=4,
    )  # fmt: skip
    with pytest.raises(UserError, match="a gemma2 model keeps DynamicSlidingWindowLayer of a context"):
        Conversations(Gemma2ForCausalLM(config), PrefixCache(MANY))


def test_blocks_of_no_tokens_are_refused(checkpoint: Checkpoint) -> None:
    with (
        load(checkpoint("olmoe"), EngineOptions("100%")) as (model, engine),
        pytest.raises(UserError, match="blocks of 0 tokens"),
    ):
        Conversations(model, engine.keep_prefixes(0), block_tokens=0)
