"""The engine against plain transformers: tokens and logits byte for byte, at every pool size, evicting all the time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from configs.load import UserError
from evaluation.engine.cache.policies import ONLINE
from evaluation.engine.engine import Engine
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from evaluation.engine.pager import paged_experts_forward
from evaluation.engine.store import reader as reader_module

NEW_TOKENS = 10
Checkpoint = Callable[..., Path]


def prompts(batch: int) -> dict[str, torch.Tensor]:
    """`batch` prompts of different lengths, padded on the left."""
    generator = torch.Generator().manual_seed(5)
    ids_BT = torch.randint(2, 258, (batch, 13), generator=generator)
    mask_BT = torch.ones_like(ids_BT)
    for row in range(1, batch):
        ids_BT[row, : 4 * row], mask_BT[row, : 4 * row] = 1, 0
    return {"input_ids": ids_BT, "attention_mask": mask_BT}


def generate(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences, and the logits of every step."""
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **options}
    output = model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)
    return output.sequences, torch.stack(output.logits)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape, precision and bits; NaN equals NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and bool((a.view(torch.uint8) == b.view(torch.uint8)).all())


def resident(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto", **options})


def slot_budget(folder: Path, slots: int, **options: Any) -> int:
    """Bytes of exactly `slots` slots."""
    with load(folder, EngineOptions("100%", **options)) as (_, engine):
        return slots * engine.demand.slot_bytes


@contextmanager
def loaded(folder: Path, slots: int | None, **options: Any) -> Iterator[tuple[Any, Engine]]:
    budget = "100%" if slots is None else slot_budget(folder, slots, **options)
    with load(folder, EngineOptions(budget, **options)) as (model, engine):
        yield model, engine


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("family", "top_k"), [("qwen2_moe", 3), ("olmoe", 2), ("mixtral", 2)])
@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_and_logits_are_those_of_the_resident_model(
    checkpoint: Checkpoint, family: str, top_k: int, dtype: str, batch: int
) -> None:
    folder, inputs = checkpoint(family, dtype), prompts(batch)
    expected_tokens, expected_logits = generate(resident(folder), inputs)
    for slots in (top_k, top_k + 1, 2 * top_k + 1, None):
        with loaded(folder, slots) as (model, engine):
            assert slots is None or engine.cache.total_slots == slots
            tokens, logits = generate(model, inputs)
            stats = engine.stats()
        assert torch.equal(tokens, expected_tokens), f"{slots} slots"
        assert same_bytes(logits, expected_logits), f"{slots} slots"
        assert slots is None or stats.misses > slots, "experts must have been evicted"


@pytest.mark.parametrize("policy", list(ONLINE))
def test_every_policy_is_exact_with_one_pool_for_each_layer(checkpoint: Checkpoint, policy: str) -> None:
    folder, inputs = checkpoint("qwen2_moe", "float32"), prompts(2)
    expected_tokens, expected_logits = generate(resident(folder), inputs)
    for slots in (3, 5):
        with loaded(folder, 3 * slots, cache_scope="per_layer", cache_policy=policy) as (model, engine):
            assert engine.cache.slots == slots
            tokens, logits = generate(model, inputs)
        assert torch.equal(tokens, expected_tokens)
        assert same_bytes(logits, expected_logits)


def test_the_trace_holds_what_the_routers_chose_heaviest_first(checkpoint: Checkpoint) -> None:
    with torch.no_grad(), loaded(checkpoint("olmoe", "float32"), None, record_trace=True) as (model, engine):
        chosen: list[tuple[torch.Tensor, torch.Tensor]] = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(lambda _, __, output: chosen.append(output[1:]))
            layer.mlp.gate.register_forward_hook(
                lambda _, __, output: (output[0], output[1].flip(1), output[2].flip(1))
            )
        model(prompts(1)["input_ids"])
        trace = engine.trace()
    for layer, (weights_TK, ids_TK) in enumerate(chosen):
        assert (weights_TK[:, :-1] >= weights_TK[:, 1:]).all(), "the router itself gives the heaviest first"
        assert trace.expert_ids[:, layer].tolist() == ids_TK.tolist()


@pytest.mark.parametrize("family", ["phimoe", "qwen3_moe", "deepseek_v2", "gpt_oss", "granitemoe"])
def test_other_families_are_exact_too(checkpoint: Checkpoint, family: str) -> None:
    folder, inputs = checkpoint(family, "float32"), prompts(2)
    expected_tokens, expected_logits = generate(resident(folder), inputs)
    with loaded(folder, 3) as (model, _):
        tokens, logits = generate(model, inputs)
    assert torch.equal(tokens, expected_tokens)
    assert same_bytes(logits, expected_logits)


def test_forced_eviction_between_steps_changes_nothing(checkpoint: Checkpoint) -> None:
    folder, inputs = checkpoint("qwen2_moe", "float32"), prompts(2)
    expected_tokens, expected_logits = generate(resident(folder), inputs)
    with loaded(folder, None) as (model, engine):
        model.register_forward_hook(lambda *_: engine.reset_cache())
        tokens, logits = generate(model, inputs)
        assert engine.stats().hits == 0
    assert torch.equal(tokens, expected_tokens)
    assert same_bytes(logits, expected_logits)


def test_slots_filled_with_rubbish_after_eviction_are_read_again(checkpoint: Checkpoint) -> None:
    folder, inputs = checkpoint("mixtral", "float32"), prompts(1)
    expected_tokens, _ = generate(resident(folder), inputs)
    with loaded(folder, None) as (model, engine):
        generate(model, inputs)
        engine.reset_cache()
        memory = model.model.layers[0].mlp.experts.paged.pager.memory
        for slot in range(engine.cache.total_slots):
            memory.gate_up_HJ(slot).fill_(float("nan"))
            memory.down_IH(slot).fill_(float("nan"))
        tokens, _ = generate(model, inputs)
    assert torch.equal(tokens, expected_tokens)


@pytest.mark.parametrize(("stored", "computed"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_computing_in_another_precision_than_stored_is_exact(
    checkpoint: Checkpoint, stored: str, computed: str
) -> None:
    folder, inputs = checkpoint("olmoe", stored), prompts(2)
    expected_tokens, expected_logits = generate(resident(folder, dtype=computed), inputs)
    with loaded(folder, 3, dtype=computed) as (model, engine):
        tokens, logits = generate(model, inputs)
        assert engine.stats().bytes_read == engine.stats().misses * engine.expert_bytes
    assert torch.equal(tokens, expected_tokens)
    assert same_bytes(logits, expected_logits)


def test_experts_spread_over_shards_are_exact(checkpoint: Checkpoint) -> None:
    folder, inputs = checkpoint("qwen2_moe", "bfloat16", "7KB"), prompts(1)
    assert len(list(folder.glob("*.safetensors"))) > 10
    expected_tokens, expected_logits = generate(resident(folder), inputs)
    with loaded(folder, 5) as (model, _):
        tokens, logits = generate(model, inputs)
    assert torch.equal(tokens, expected_tokens)
    assert same_bytes(logits, expected_logits)


def test_sampling_and_beam_search_are_exact(checkpoint: Checkpoint) -> None:
    folder, inputs = checkpoint("qwen2_moe", "float32"), prompts(1)
    plain = resident(folder)
    with loaded(folder, 4) as (model, _):
        for options in ({"do_sample": True, "top_k": 20}, {"num_beams": 3}):
            torch.manual_seed(3)
            expected_tokens, expected_logits = generate(plain, inputs, **options)
            torch.manual_seed(3)
            tokens, logits = generate(model, inputs, **options)
            assert torch.equal(tokens, expected_tokens)
            assert same_bytes(logits, expected_logits)


def test_activation_is_exact_when_a_matrix_is_split_over_threads_and_groups(checkpoint: Checkpoint) -> None:
    """The vectorised part of the activation ends where the whole matrix says: groups must not move that end."""
    folder = checkpoint("wide", "float32")
    ids_BT = torch.randint(2, 258, (2, 60), generator=torch.Generator().manual_seed(1))
    torch.set_num_threads(2)
    try:
        with torch.no_grad(), loaded(folder, 4) as (model, _):
            expected = resident(folder)(ids_BT).logits
            assert same_bytes(model(ids_BT).logits, expected)
    finally:
        torch.set_num_threads(1)


def test_each_expert_of_a_call_is_read_at_most_once(checkpoint: Checkpoint) -> None:
    ids_BT = prompts(1)["input_ids"].repeat(1, 4)
    with torch.no_grad(), loaded(checkpoint("qwen2_moe"), 3) as (model, engine):
        model(ids_BT)
        stats = engine.stats()
    assert stats.misses == stats.first_touches == stats.accesses
    assert stats.bytes_read == stats.misses * engine.expert_bytes


def test_a_failed_read_leaves_no_expert_behind_that_was_not_read(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, inputs = checkpoint("olmoe"), prompts(1)
    expected_tokens, _ = generate(resident(folder), inputs)
    with loaded(folder, 4) as (model, engine):
        reads, original = 0, reader_module._read

        def failing_read(*args: Any) -> int:
            nonlocal reads
            reads += 1
            if reads == 20:
                raise OSError("injected")
            return original(*args)

        monkeypatch.setattr(reader_module, "_read", failing_read)
        with pytest.raises(UserError, match=r"layer \d expert \d cannot be read from .*: injected"):
            generate(model, inputs)
        assert not engine.cache.resident()
        tokens, _ = generate(model, inputs)
    assert torch.equal(tokens, expected_tokens)


def test_gradients_are_refused(checkpoint: Checkpoint) -> None:
    with loaded(checkpoint("olmoe"), None) as (model, _), pytest.raises(UserError, match="computes no gradients"):
        model(prompts(1)["input_ids"])


def test_only_attached_modules_are_paged(checkpoint: Checkpoint) -> None:
    with loaded(checkpoint("olmoe"), None) as (model, _):
        experts = model.model.layers[0].mlp.experts
        experts.paged = None
        with pytest.raises(AssertionError, match="only experts of a model that `load` returned"):
            paged_experts_forward(experts, torch.zeros(1, 32), torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2))
