"""What rewards the content of a cache - the LRU content itself, and misses counted softly - against a simulated cache."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches import PADDING
from tests.training.objective.made_cases import (
    CASES,
    Case,
    E,
    K,
    assert_equal,
    make_case,
    sequences,
    slow_reuse,
)
from training.objective import losses


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


def simulate_lru(events: list[list[int]], slots: int) -> list[set[int]]:
    """What an event-atomic LRU holds before every event; `events` list experts heaviest first.

    All experts of an event are resident together, victims come from outside of it.
    """
    order: list[int] = []  # least recently used first
    before = []
    for event in events:
        before.append(set(order))
        order = [expert for expert in order if expert not in event]
        while len(order) + len(event) > slots:
            order.pop(0)
        order += reversed(event)  # the heaviest is used last
    return before


@pytest.mark.parametrize("slots", [K, 3, 4, E, E + 3])
def test_lru_content_is_that_of_a_simulated_cache_cold_at_every_sequence(case: Case, slots: int) -> None:
    expected = torch.zeros(*case.documents.shape, E, dtype=torch.bool)
    for positions in sequences(case.documents):
        contents = simulate_lru([case.ids[at].tolist() for at in positions], slots)
        for at, content in zip(positions, contents, strict=True):
            expected[at][list(content)] = True
    assert torch.equal(losses.lru_content(case.ids, case.documents, E, slots), expected)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    padding=st.integers(0, 3),
    n_experts=st.integers(3, 7),
    k=st.integers(1, 3),
    extra_slots=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
def test_lru_content_matches_the_simulation_on_any_trace(
    lengths: list[int], padding: int, n_experts: int, k: int, extra_slots: int, seed: int
) -> None:
    documents = torch.tensor([[n for n, length in enumerate(lengths) for _ in range(length)] + [PADDING] * padding])
    draw = torch.Generator().manual_seed(seed)
    ids = torch.rand(*documents.shape, n_experts, generator=draw).topk(k).indices
    found = losses.lru_content(ids, documents, n_experts, k + extra_slots)
    for positions in sequences(documents):
        contents = simulate_lru([ids[at].tolist() for at in positions], k + extra_slots)
        for at, content in zip(positions, contents, strict=True):
            assert set(found[at].nonzero().flatten().tolist()) == content
    assert not found[documents < 0].any()


def test_lru_content_keeps_the_heavier_expert_of_one_event_longer() -> None:
    ids = torch.tensor([[[4, 1], [0, 2], [3, 5]]])
    held = losses.lru_content(ids, torch.zeros(1, 3, dtype=torch.long), E, 3)
    assert held[0, 2].nonzero().flatten().tolist() == [0, 2, 4]


def test_reuse_loss_over_cache_content_is_that_of_the_simulated_cache(case: Case) -> None:
    held = losses.lru_content(case.ids, case.documents, E, 3)

    def content(positions: list[tuple[int, int]], t: int) -> set[int]:
        return simulate_lru([case.ids[at].tolist() for at in positions], 3)[t]

    found = losses.reuse_loss_sum(case.logits.softmax(-1), held, case.documents, K)
    assert_equal(found, slow_reuse(case, content))


def soft_choices(z: list[float], threshold: float, temperature: float) -> list[float]:
    return [1 / (1 + math.exp((threshold - value) / temperature)) for value in z]


def test_the_miss_loss_is_the_share_of_soft_choices_outside_the_cache(case: Case) -> None:
    held, temperature = losses.lru_content(case.ids, case.documents, E, 3), 0.7
    expected = 0.0
    for at in (at for positions in sequences(case.documents) for at in positions):
        z = case.logits[at].tolist()
        chosen = soft_choices(z, sum(sorted(z)[-K - 1 : -K + 1]) / 2, temperature)
        expected += sum(c for c, h in zip(chosen, held[at].tolist(), strict=True) if not h) / K
    assert_equal(losses.miss_loss_sum(case.logits, held, case.documents, K, temperature), expected)


def test_the_gradient_of_the_miss_loss_is_that_of_choices_whose_sum_stays() -> None:
    """Against finite differences, the threshold found anew by bisection after each nudge."""
    z, held, temperature, nudge = [1.3, 0.9, 0.7, 0.2, -0.4, 0.8], [True, False, True, False, False, False], 0.4, 1e-5
    logits = torch.tensor([[z]], dtype=torch.double).requires_grad_()
    losses.miss_loss_sum(logits, torch.tensor([[held]]), torch.zeros(1, 1, dtype=torch.long), K, temperature).backward()
    total = sum(soft_choices(z, sum(sorted(z)[-K - 1 : -K + 1]) / 2, temperature))

    def misses(values: list[float]) -> float:
        low, high = -20.0, 20.0
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(soft_choices(values, middle, temperature)) > total else (low, middle)
        return sum(c for c, h in zip(soft_choices(values, low, temperature), held, strict=True) if not h) / K

    assert logits.grad is not None
    for expert, found in enumerate(logits.grad.flatten().tolist()):
        up, down = ([*z[:expert], z[expert] + step, *z[expert + 1 :]] for step in (nudge, -nudge))
        assert found == pytest.approx((misses(up) - misses(down)) / (2 * nudge), abs=1e-7)


@pytest.mark.parametrize(
    ("held", "rate"), [([0, 0, 0, 0, 0, 0], 1), ([1, 1, 1, 1, 0, 0], 0), ([1, 0, 1, 0, 0, 0], 0.5)]
)
def test_the_miss_loss_moves_close_calls_between_held_and_other_experts_only(held: list[int], rate: float) -> None:
    logits = torch.tensor([[[9.0, 5.1, 4.9, 0.0, -1.0, -9.0]]]).requires_grad_()
    mask = torch.tensor([[held]]).bool()
    found = losses.miss_loss_sum(logits, mask, torch.zeros(1, 1, dtype=torch.long), K, 0.05)
    assert found.item() == pytest.approx(rate, abs=0.1)
    found.backward()
    assert logits.grad is not None
    pushed = logits.grad.flatten().tolist()
    if rate == 0.5:
        assert pushed[1] > 0.1
        assert pushed[2] < -0.1
    assert max(abs(pushed[n]) for n in ((0, 3, 4, 5) if rate == 0.5 else range(6))) < 1e-4
