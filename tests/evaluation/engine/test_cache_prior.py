"""Cache-aware routing: residents are preferred, weights stay the router's own, and it never happens unasked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.load import UserError
from evaluation.engine.cache_prior import Preference, attach_cache_prior
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from training.model.router_kind import Weighing
from training.model.routers import find_routers

Checkpoint = Callable[..., Path]


def generate(model: Any, new_tokens: int = 24) -> torch.Tensor:
    ids_BT = torch.randint(2, 258, (1, 9), generator=torch.Generator().manual_seed(4))
    output: torch.Tensor = model.generate(
        input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=new_tokens, do_sample=False
    )
    return output


@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe", "mixtral"])
def test_strength_0_changes_nothing_and_a_strong_prior_saves_reads(checkpoint: Checkpoint, family: str) -> None:
    folder, tokens, misses, exact = checkpoint(family), {}, {}, {}
    for strength in (None, 0.0, 0.5):
        prior: dict[str, Any] = {} if strength is None else {"cache_prior": strength, "cache_prior_keep": 0}
        with load(folder, EngineOptions("50%", cache_scope="per_layer", **prior)) as (model, engine):
            tokens[strength] = generate(model)
            misses[strength], exact[strength] = engine.stats().misses_by_phase["decode"], engine.is_exact
    assert torch.equal(tokens[None], tokens[0.0])
    assert misses[None] == misses[0.0]
    assert misses[0.5] < 0.7 * misses[None]
    assert exact == {None: True, 0.0: False, 0.5: False}


def preference(
    strength: float, keep: int, resident: list[int], *, is_decode: bool = True, normalised: bool = False
) -> Preference:
    weighing = Weighing("softmax", normalised)
    return Preference(weighing, lambda: resident, lambda: is_decode, strength=strength, keep=keep)


Z = torch.tensor([[4.0, 3.0, 2.0, 1.5, 0.0, -4.0]])  # spread 8


def routed(hook: Preference, *, normalised: bool = False) -> tuple[list[int], torch.Tensor]:
    probs, ids = Z.softmax(-1), torch.tensor([[0, 1, 2]])
    weights = probs.gather(1, ids)
    if normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    logits, new_weights, new_ids = hook(torch.nn.Identity(), None, (Z, weights, ids))
    assert torch.equal(logits, Z)
    return new_ids[0].tolist(), new_weights[0]


@pytest.mark.parametrize("normalised", [False, True])
def test_residents_within_the_bonus_come_in_with_the_weights_of_their_own_logits(normalised: bool) -> None:
    ids, weights = routed(preference(0.1, 1, [3, 5], normalised=normalised), normalised=normalised)
    assert ids == [0, 1, 3], "2.0 leaves for 1.5 + 0.8; expert 5 is too far away"
    expected = Z.softmax(-1)[0, [0, 1, 3]]
    assert torch.allclose(weights, expected / expected.sum() if normalised else expected)


def test_the_routers_own_best_cannot_be_displaced() -> None:
    for keep, ids in ((0, {3, 4, 5}), (1, {0, 3, 4}), (2, {0, 1, 3}), (3, {0, 1, 2})):
        assert set(routed(preference(10.0, keep, [3, 4, 5]))[0]) == ids


def test_prompts_are_routed_as_always() -> None:
    assert routed(preference(10.0, 0, [3, 4, 5], is_decode=False))[0] == [0, 1, 2]


def test_the_spread_is_the_mean_over_the_tokens_so_far() -> None:
    hook = preference(0.1, 0, [3])
    flat = torch.full((3, 6), 0.1)
    hook(torch.nn.Identity(), None, (flat, flat[:, :3].softmax(-1), torch.tensor([[0, 1, 2]] * 3)))
    assert routed(hook)[0] == [0, 1, 2], "the mean spread is 2, the bonus 0.2, the gap 0.5"


def changed_routers(model: Any, change: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
    for router in find_routers(model).values():
        router.forward = lambda hidden_TH, forward=router.forward: change(*forward(hidden_TH))


@torch.no_grad()
def test_a_sigmoid_router_prefers_residents_too(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("olmoe")
    changed_routers(model, lambda z_TE, _, ids_TK: (z_TE, z_TE.sigmoid().gather(1, ids_TK), ids_TK))
    attach_cache_prior(model, strength=10.0, keep=0, resident=lambda _: [2, 5], is_decode=lambda: True)
    for router in find_routers(model).values():
        logits_TE, weights_TK, ids_TK = router(torch.randn(7, 16, generator=torch.Generator().manual_seed(3)))
        assert {tuple(sorted(ids)) for ids in ids_TK.tolist()} == {(2, 5)}
        torch.testing.assert_close(weights_TK, logits_TE.sigmoid().gather(1, ids_TK))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda z, w, ids: (z, w.sqrt(), ids), "Router weighs experts neither by a softmax nor by a sigmoid"),
        (lambda z, w, ids: (z, w + w.mean(), ids), "Router weighs experts neither by a softmax nor by a sigmoid"),
        (
            lambda z, _, ids: (z, (z.gather(1, ids).softmax(-1)) * z.abs().sum(-1, keepdim=True), ids),
            "Router weighs experts in a way that a cache prior does not know",
        ),
        (
            lambda z, w, ids: (z, z.softmax(-1).gather(1, (ids + 1) % 8), (ids + 1) % 8),
            "Router chooses experts in a way that a cache prior does not know",
        ),
    ],
)
def test_routers_that_choose_or_weigh_in_other_ways_are_refused(
    change: Any, words: str, tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model("olmoe")
    changed_routers(model, change)
    with pytest.raises(UserError, match=words):
        attach_cache_prior(model, strength=0.1, keep=1, resident=lambda _: [], is_decode=lambda: True)
