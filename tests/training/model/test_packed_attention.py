"""Attention in parts against transformers' own, for any mask, and inside whole models."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from training.model import packed_attention
from training.model.loading import ModelArguments, build_model
from training.model.packed_attention import IMPLEMENTATION, packed_attention_forward, register

HEADS, KEY_HEADS, WIDTH = 4, 2, 8
ATTENTION: Any = SimpleNamespace(num_key_value_groups=HEADS // KEY_HEADS, is_causal=True)


def documents_mask(rows: list[list[int]]) -> Tensor:
    """[B, 1, S, S]: a position sees what is before it in its own document."""
    ids_BS = torch.tensor([[number for number, n in enumerate(lengths) for _ in range(n)] for lengths in rows])
    same_BSS = ids_BS[:, :, None] == ids_BS[:, None, :]
    return (same_BSS & torch.ones(same_BSS.shape[1:], dtype=torch.bool).tril())[:, None]


def projections(rows: int, length: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(length)
    heads = (HEADS, KEY_HEADS, KEY_HEADS)
    return [torch.randn(rows, n, length, WIDTH, generator=draw).requires_grad_() for n in heads]


def outcome(forward: Any, mask_B1SS: Tensor | None, rows: int, length: int) -> list[Tensor]:
    """What comes out, and the gradients of query, key and value."""
    tensors = projections(rows, length)
    out, _ = forward(ATTENTION, *tensors, mask_B1SS, scaling=0.3)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), tensors)]


def both_agree(mask_B1SS: Tensor) -> None:
    rows, _, length, _ = mask_B1SS.shape
    ours, theirs = (outcome(f, mask_B1SS, rows, length) for f in (packed_attention_forward, sdpa_attention_forward))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_attention, "MOST_QUERIES", 5)
    monkeypatch.setattr(packed_attention, "FEWEST_QUERIES", 2)


@pytest.mark.parametrize("rows", [[[17]], [[1, 1, 1, 14], [9, 8]], [[3, 4, 10], [17], [16, 1]]])
def test_documents_of_any_length_attend_as_under_their_mask(rows: list[list[int]], small_parts: None) -> None:
    both_agree(documents_mask(rows))


@pytest.mark.parametrize("window", [1, 3, 6])
def test_a_sliding_window_is_kept(window: int, small_parts: None) -> None:
    mask = documents_mask([[6, 11]])
    both_agree(mask & torch.ones(17, 17, dtype=torch.bool).triu(1 - window))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_mask_that_shows_every_query_something(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 13))
    seen = data.draw(st.lists(st.booleans(), min_size=2 * length * length, max_size=2 * length * length))
    mask = torch.tensor(seen).view(2, 1, length, length) | torch.eye(length, dtype=torch.bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_attention, "MOST_QUERIES", data.draw(st.integers(1, 6)))
        patch.setattr(packed_attention, "FEWEST_QUERIES", data.draw(st.integers(1, 6)))
        both_agree(mask)


def test_padding_that_sees_nothing_does_not_disturb_the_rest(small_parts: None) -> None:
    mask = documents_mask([[9, 8]])
    mask[0, 0, 12:] = False
    ours, theirs = (outcome(f, mask, 1, 17)[0] for f in (packed_attention_forward, sdpa_attention_forward))
    torch.testing.assert_close(ours[:, :12], theirs[:, :12])


@pytest.mark.parametrize(("lengths", "most"), [([512], 0.7), ([200, 312], 0.6), ([100] * 5 + [12], 0.22)])
def test_pairs_that_the_mask_rules_out_are_not_computed(
    lengths: list[int], most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = 0

    def counted(module: Any, query: Tensor, key: Tensor, *rest: Any, **kwargs: Any) -> Any:
        nonlocal pairs
        pairs += query.shape[0] * query.shape[2] * key.shape[2]
        return sdpa_attention_forward(module, query, key, *rest, **kwargs)

    monkeypatch.setattr(packed_attention, "sdpa_attention_forward", counted)
    outcome(packed_attention_forward, documents_mask([lengths]), 1, 512)
    assert sum(n * (n + 1) // 2 for n in lengths) < pairs < most * 512**2


def test_a_mask_is_cut_once_and_forgotten_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cuts = []
    cut = packed_attention._parts

    def counted(*args: Any) -> Any:
        cuts.append(args)
        return cut(*args)

    monkeypatch.setattr(packed_attention, "_parts", counted)
    held, mask = len(packed_attention._PARTS), documents_mask([[9, 8]])
    for _ in range(3):
        outcome(packed_attention_forward, mask, 1, 17)
    assert len(cuts) == 1
    cuts.clear()
    del mask
    assert len(packed_attention._PARTS) == held


def test_other_masks_are_left_to_transformers() -> None:
    additive = torch.zeros(1, 1, 17, 17).masked_fill(~documents_mask([[9, 8]]), -torch.inf)
    per_head = documents_mask([[9, 8]]).expand(1, HEADS, 17, 17)
    for mask, rows in ((None, 2), (additive, 1), (per_head, 1), (documents_mask([[9, 8]]), 2)):
        ours, theirs = (outcome(f, mask, rows, 17) for f in (packed_attention_forward, sdpa_attention_forward))
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe", "mixtral", "qwen3_moe", "deepseek_v2"])
@pytest.mark.parametrize("is_packed", [True, False])
def test_a_model_computes_the_same(
    family: str, is_packed: bool, tiny_model: Callable[..., Any], small_parts: None
) -> None:
    register()
    ids = torch.randint(1, 250, (2, 12), generator=torch.Generator().manual_seed(5))
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4], list(range(12))]) if is_packed else None
    outcomes = []
    for implementation in (IMPLEMENTATION, "sdpa"):
        model = tiny_model(family).train()
        model.set_attn_implementation(implementation)
        loss = model(input_ids=ids, labels=ids, position_ids=positions, use_cache=False).loss
        outcomes.append([loss.detach(), *torch.autograd.grad(loss, model.get_input_embeddings().weight)])
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("trainable", ["routers", "all"])
def test_training_attends_through_it(trainable: str, model_dir: Callable[..., Any]) -> None:
    model = build_model(ModelArguments(model_name_or_path=str(model_dir()), trainable=trainable), seed=0)
    assert model.config._attn_implementation == IMPLEMENTATION
