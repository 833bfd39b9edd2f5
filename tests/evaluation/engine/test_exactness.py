"""The engine's promise at length: tokens and logits of the resident model, byte for byte, however it is used."""

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from evaluation.engine.cache.policies import ONLINE
from evaluation.engine.cache.pool import SCOPES
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions

Checkpoint = Callable[..., Path]
FAMILIES = ["qwen2_moe", "olmoe", "mixtral", "phimoe", "qwen3_moe", "deepseek_v2", "gpt_oss", "granitemoe", "wide"]
DTYPES = ["bfloat16", "float32"]


def prompts(batch: int, tokens: int, seed: int) -> dict[str, torch.Tensor]:
    """Prompts of different lengths, padded on the left."""
    ids_BT = torch.randint(2, 258, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    mask_BT = torch.ones_like(ids_BT)
    for row in range(1, batch):
        padding = row * tokens // (batch + 1)
        ids_BT[row, :padding], mask_BT[row, :padding] = 1, 0
    return {"input_ids": ids_BT, "attention_mask": mask_BT}


def generate(model: Any, inputs: dict[str, torch.Tensor], new_tokens: int, **options: Any) -> list[torch.Tensor]:
    """Sequences, and the logits of every step; what is sampled depends on nothing but the inputs."""
    torch.manual_seed(11)
    output = model.generate(
        **inputs, max_new_tokens=new_tokens, return_dict_in_generate=True, output_logits=True, pad_token_id=1,
        **{"do_sample": False, **options},
    )  # fmt: skip
    return [output.sequences, torch.stack(output.logits)]


def same_bytes(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(
        a.dtype == b.dtype and a.shape == b.shape and bool((a.view(torch.uint8) == b.view(torch.uint8)).all())
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_256_tokens_at_five_budgets_under_every_policy_and_scope(
    checkpoint: Checkpoint, family: str, exhaustive: bool
) -> None:
    """Budgets take turns, so that all of them and every policy in both scopes are met; with --exhaustive, every pair."""
    folder, inputs = checkpoint(family, "float32"), prompts(1, 20, 7)
    expected = generate(AutoModelForCausalLM.from_pretrained(folder), inputs, 256)
    with load(folder, EngineOptions("100%")) as (_, engine):
        demand = engine.demand
    shares = (0.0, 0.15, 0.3, 0.6, 1.0)
    kinds = itertools.product(ONLINE, SCOPES)
    cases = itertools.product(kinds, shares) if exhaustive else zip(kinds, itertools.cycle(shares), strict=False)
    for (policy, scope), share in cases:
        pools = 1 if scope == "global" else demand.layers
        least, most = demand.top_k * pools, demand.all_experts
        slots = least + int(share * (most - least))
        options = EngineOptions(slots * demand.slot_bytes, cache_policy=policy, cache_scope=scope)
        with load(folder, options) as (model, _):
            assert same_bytes(generate(model, inputs, 256), expected), f"{policy}, {scope}, {slots} slots"


@pytest.mark.slow
def test_200_random_configurations(checkpoint: Checkpoint) -> None:
    @cache
    def resident(family: str, dtype: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(checkpoint(family, dtype), dtype="auto")

    @settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(
        family=st.sampled_from(FAMILIES), dtype=st.sampled_from(DTYPES), scope=st.sampled_from(SCOPES),
        policy=st.sampled_from(list(ONLINE)), share=st.floats(0, 1),
        batch=st.integers(1, 3), tokens=st.integers(1, 40), seed=st.integers(0, 5), in_flight=st.integers(1, 9),
        threads=st.integers(1, 2), forget=st.booleans(), prefetch=st.integers(0, 3),
        how=st.sampled_from([{}, {"do_sample": True, "top_k": 20}, {"num_beams": 2}]),
    )  # fmt: skip
    def check(
        family: str, dtype: str, scope: str, policy: str, share: float, batch: int, tokens: int, seed: int,
        in_flight: int, threads: int, forget: bool, prefetch: int, how: dict[str, Any],
    ) -> None:  # fmt: skip
        folder, inputs = checkpoint(family, dtype), prompts(batch, tokens, seed)
        with load(folder, EngineOptions("100%")) as (_, engine):
            demand = engine.demand
        least = demand.top_k * (1 if scope == "global" else demand.layers)
        slots = least + int(share * (demand.all_experts - least))
        torch.set_num_threads(threads)
        try:
            expected = generate(resident(family, dtype), inputs, 6, **how)
            options = EngineOptions(
                slots * demand.slot_bytes,
                cache_policy=policy,
                cache_scope=scope,
                reads_in_flight=in_flight,
                prefetch=prefetch,
            )
            with load(folder, options) as (model, engine):
                if forget:
                    model.register_forward_hook(lambda *_: engine.reset_cache())
                assert same_bytes(generate(model, inputs, 6, **how), expected)
        finally:
            torch.set_num_threads(1)

    check()
