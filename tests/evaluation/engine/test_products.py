"""Products as transformers' `batched_mm` computes them, on the processor; `grouped_mm` is what all other tests compare with."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions

Checkpoint = Callable[..., Path]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v2", "gpt_oss", "granitemoe"])
@pytest.mark.parametrize("slots", [3, 1000])
@torch.no_grad()
def test_batched_products_give_the_logits_of_batched_mm(
    checkpoint: Checkpoint, family: str, dtype: str, slots: int
) -> None:
    folder = checkpoint(family, dtype)
    resident = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    resident.set_experts_implementation("batched_mm")
    with load(folder, EngineOptions("100%")) as (_, sized):
        budget = min(slots * sized.demand.slot_bytes, sized.pool_bytes)
    ids_BT = torch.randint(2, 258, (2, 9), generator=torch.Generator().manual_seed(1))
    with load(folder, EngineOptions(budget)) as (model, engine):
        for tokens in (9, 1):
            with engine._pager.batched_products():
                found = model(ids_BT[:, :tokens]).logits
            assert torch.equal(found, resident(ids_BT[:, :tokens]).logits)
        assert not engine._pager._batched
