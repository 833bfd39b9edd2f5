"""What is worked out from the configuration against what the model really holds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evaluation.engine.loading import load
from evaluation.engine.memory.needs import SLACK_BYTES, Needs, needs_of
from evaluation.engine.options import EngineOptions

Checkpoint = Callable[..., Path]
FAMILIES = ["qwen2_moe", "olmoe", "mixtral", "phimoe", "qwen3_moe", "deepseek_v2", "gpt_oss", "granitemoe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kv_cache_is_as_large_as_said(checkpoint: Checkpoint, family: str) -> None:
    with torch.no_grad(), load(checkpoint(family), EngineOptions("100%")) as (model, engine):
        cache = model(torch.arange(2, 13).unsqueeze(0).repeat(3, 1), use_cache=True).past_key_values
        held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        needs = needs_of(model.config, engine.dtype.itemsize, top_k=engine.demand.top_k, intermediate=1)
    assert 3 * 11 * needs.kv_bytes_per_token == held


def storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class PeakBytes(TorchDispatchMode):
    """Counts the memory of all tensors that operations make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages((args, kwargs))}
        for storage in storages(out):
            if storage._cdata not in given:  # else a view, or written in place
                self._held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))
        return out


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("family", [*FAMILIES, "wide"])
def test_a_prompt_holds_no_more_than_said(checkpoint: Checkpoint, family: str, threads: int) -> None:
    """Without the slack, which is for what is not a tensor."""
    batch, tokens = 2, 100
    torch.set_num_threads(threads)
    with load(checkpoint(family), EngineOptions("100%")) as (model, engine):
        ids_BT = torch.arange(2, 2 + tokens).repeat(batch, 1)
        intermediate = engine._store.format.intermediate
        needs = needs_of(model.config, engine.dtype.itemsize, top_k=engine.demand.top_k, intermediate=intermediate)
        generate: Any = model.generate
        with PeakBytes() as found:
            generate(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=2, pad_token_id=1)
    torch.set_num_threads(1)
    said = needs.kv_bytes(batch * tokens) + needs.activation_bytes(rows=batch * tokens, context_tokens=tokens)
    assert found.peak <= said - SLACK_BYTES + 2**16
    assert found.peak > 0.4 * (said - SLACK_BYTES)


def test_needs_grow_as_documented() -> None:
    needs = Needs(layers=4, kv_bytes_per_token=400, row_bytes=1000, mask_bytes=5)
    assert needs.kv_bytes(10) == 10 * (400 + 100)
    one, two = (needs.activation_bytes(rows=rows, context_tokens=7) for rows in (1, 2))
    assert two - one == 1000 + 5 * 7
