"""Cache-aware routing: residents are preferred, weights stay the router's own, and it never happens unasked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.load import UserError
from evaluation.engine.cache_prior import Preference, Weighing, _weighing
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions

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
    return Preference(Weighing(normalised), lambda: resident, lambda: is_decode, strength=strength, keep=keep)


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


class Router(torch.nn.Module):
    """Chooses 3 of 6 experts; `weigh` makes weights of the logits and the choice."""

    def __init__(self, weigh: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.gate, self.weigh = torch.nn.Linear(8, 6), weigh

    def forward(self, hidden_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = self.gate(hidden_TH)
        ids = logits.topk(3).indices
        return logits, self.weigh(logits, ids), ids


@pytest.mark.parametrize("weighing", [Weighing(False), Weighing(True), Weighing(True, 2.5), Weighing(False, 16.0)])
def test_how_a_router_weighs_is_found_out(weighing: Weighing) -> None:
    found = _weighing(Router(weighing.weights), 8)
    assert (found.normalised, found.scale) == (weighing.normalised, pytest.approx(weighing.scale))


def test_weights_of_an_unknown_kind_are_refused() -> None:
    with pytest.raises(UserError, match="Router weighs experts in a way a cache prior does not know"):
        _weighing(Router(lambda logits, ids: logits.sigmoid().gather(1, ids)), 8)
