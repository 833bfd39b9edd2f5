"""What is worked out from the configuration against what the model really holds."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from evaluation.engine import load
from evaluation.engine.needs import Needs, needs_of

Checkpoint = Callable[..., Path]
FAMILIES = ["qwen2_moe", "olmoe", "mixtral", "phimoe", "qwen3_moe", "deepseek_v2", "gpt_oss", "granitemoe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kv_cache_is_as_large_as_said(checkpoint: Checkpoint, family: str) -> None:
    with torch.no_grad(), load(checkpoint(family), "100%") as (model, engine):
        cache = model(torch.arange(2, 13).unsqueeze(0).repeat(3, 1), use_cache=True).past_key_values
        held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        needs = needs_of(model.config, engine.dtype.itemsize, top_k=engine.demand.top_k, intermediate=1)
    assert 3 * 11 * needs.kv_bytes_per_token == held


def test_needs_grow_as_documented() -> None:
    needs = Needs(layers=4, kv_bytes_per_token=400, row_bytes=1000, mask_bytes=5)
    assert needs.kv_bytes(10) == 10 * (400 + 100)
    one, two = (needs.activation_bytes(rows=rows, context_tokens=7) for rows in (1, 2))
    assert two - one == 1000 + 5 * 7
