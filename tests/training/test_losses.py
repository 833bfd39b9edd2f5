"""Every loss against a slow reference that walks over positions one by one, following the paper's words."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data.batches import IGNORE_LABEL, PADDING
from training import losses
from training.token_loss import token_sums

E, K, V = 6, 2, 11
LAGS = (1, 2, 4, 50)
WINDOW = 3


class Case(NamedTuple):
    logits: Tensor  # [B, S, E]
    reference: Tensor  # [B, S, E]
    ids: Tensor  # [B, S, K], heaviest first
    documents: Tensor  # [B, S]
    labels: Tensor  # [B, S]
    logits_vocabulary: Tensor  # [B, S, V]


def make_case(rows: list[list[int]], seed: int = 0) -> Case:
    """`rows` are the lengths of the sequences of every row; a negative one is so much padding."""
    draw = torch.Generator().manual_seed(seed)
    documents = [
        [PADDING if length < 0 else 10 * row + n for n, length in enumerate(lengths) for _ in range(abs(length))]
        for row, lengths in enumerate(rows)
    ]
    document_ids = torch.tensor(documents)
    shape = document_ids.shape
    logits, reference = (2 * torch.randn(*shape, E, generator=draw) for _ in range(2))
    labels = torch.randint(V, shape, generator=draw)
    labels[torch.rand(shape, generator=draw) < 0.3] = IGNORE_LABEL
    labels[document_ids < 0] = IGNORE_LABEL
    ids = logits.topk(K).indices
    return Case(logits, reference, ids, document_ids, labels, torch.randn(*shape, V, generator=draw))


CASES = {
    "several documents a row": [[5, 7], [9, 3]],
    "sequences of one token": [[1, 1, 9, 1], [12]],
    "padding at the end": [[5, 3, -4], [11, -1]],
    "a row of padding": [[-8], [4, 4]],
    "one row, shorter than every long lag": [[3]],
    "no pair at all": [[1, 1], [1, -1]],
    "windows fit exactly": [[3, 6], [9]],
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


def sequences(documents: Tensor) -> Iterator[list[tuple[int, int]]]:
    """The positions (row, column) of every sequence, padding left out."""
    for row, ids in enumerate(documents.tolist()):
        for document in dict.fromkeys(ids):
            if document != PADDING:
                yield [(row, column) for column, other in enumerate(ids) if other == document]


def softmax(values: Tensor) -> list[float]:
    exponents = [math.exp(value) for value in values.double().tolist()]
    return [exponent / sum(exponents) for exponent in exponents]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def assert_equal(found: Tensor, expected: float) -> None:
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.double), rtol=2e-5, atol=2e-5)


def test_trust_kl_is_summed_over_valid_positions(case: Case) -> None:
    expected = sum(
        kl(softmax(case.logits[at]), softmax(case.reference[at]))
        for positions in sequences(case.documents)
        for at in positions
    )
    found = losses.trust_kl_sum(
        case.logits.softmax(-1), case.logits.log_softmax(-1), case.reference.log_softmax(-1), case.documents
    )
    assert_equal(found, expected)


def slow_reuse(case: Case, reusable: Callable[[list[tuple[int, int]], int], set[int]]) -> float:
    """-log of the mean over t >= 2 of (1/K) * sum of P_t over the reusable set, summed over sequences."""
    total = 0.0
    for positions in sequences(case.documents):
        masses = [
            sum(softmax(case.logits[positions[t]])[expert] for expert in reusable(positions, t)) / K
            for t in range(1, len(positions))
        ]
        if masses:
            total -= math.log(sum(masses) / len(masses) + 1e-8)
    return total


def test_reuse_loss_rewards_mass_on_the_previous_tokens_choice(case: Case) -> None:
    held = losses.previous_choice(case.ids, case.documents, E)
    found = losses.reuse_loss_sum(case.logits.softmax(-1), held, case.documents, K)
    assert_equal(found, slow_reuse(case, lambda positions, t: set(case.ids[positions[t - 1]].tolist())))


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


@pytest.mark.parametrize("lag", LAGS)
def test_symmetric_kl_is_half_of_both_over_pairs_inside_a_sequence(case: Case, lag: int) -> None:
    expected = 0.0
    for positions in sequences(case.documents):
        for t in range(lag, len(positions)):
            later, earlier = softmax(case.logits[positions[t]]), softmax(case.logits[positions[t - lag]])
            expected += 0.5 * (kl(later, earlier) + kl(earlier, later))
    assert_equal(
        losses.symmetric_kl_sum(case.logits.softmax(-1), case.logits.log_softmax(-1), case.documents, lag), expected
    )


@pytest.mark.parametrize("window", [1, WINDOW, 40])
def test_working_set_entropy_runs_over_full_windows_of_a_sequence(case: Case, window: int) -> None:
    expected = 0.0
    for positions in sequences(case.documents):
        for start in range(0, len(positions) - window + 1, window):
            rows = [softmax(case.logits[at]) for at in positions[start : start + window]]
            mean = [sum(column) / window for column in zip(*rows, strict=True)]
            expected -= sum(p * math.log(p + 1e-8) for p in mean)
    assert_equal(losses.working_set_sum(case.logits.softmax(-1), case.documents, window), expected)


def test_load_balance_is_the_product_of_load_and_probability(case: Case) -> None:
    valid = [at for positions in sequences(case.documents) for at in positions]
    load = [sum(expert in case.ids[at].tolist() for at in valid) / (K * len(valid)) for expert in range(E)]
    probability = [sum(softmax(case.logits[at])[expert] for at in valid) / len(valid) for expert in range(E)]
    expected = E * sum(a * b for a, b in zip(load, probability, strict=True)) * len(valid)
    assert_equal(losses.load_balance_sum(case.logits.softmax(-1), case.ids, case.documents), expected)


def test_load_balance_is_one_per_position_when_experts_are_used_evenly() -> None:
    ids = torch.tensor([[[0, 1], [2, 3], [4, 5]]])
    found = losses.load_balance_sum(torch.full((1, 3, E), 1 / E), ids, torch.zeros(1, 3, dtype=torch.long))
    assert_equal(found, 3.0)


def test_counts_are_the_numbers_of_items_of_the_sums(case: Case) -> None:
    lengths = [len(positions) for positions in sequences(case.documents)]
    expected = {
        "tokens": int((case.labels != IGNORE_LABEL).sum()),
        "positions": sum(lengths),
        "sequences": sum(length > 1 for length in lengths),
        "windows": sum(length // WINDOW for length in lengths),
        **{f"pairs_{lag}": sum(max(0, length - lag) for length in lengths) for lag in LAGS},
    }
    found = losses.counts(case.documents, case.labels, lags=LAGS, window=WINDOW)
    assert {key: value.item() for key, value in found.items()} == expected
    assert all(value.dtype == torch.double for value in found.values())


def test_pairs_of_lag_one_are_counted_even_if_lag_one_is_not_asked_for() -> None:
    case = make_case([[4]])
    assert losses.counts(case.documents, case.labels, lags=[2], window=WINDOW)["pairs_1"] == 3


def every_sum(case: Case) -> dict[str, Tensor]:
    probs, log_probs = case.logits.softmax(-1), case.logits.log_softmax(-1)
    return {
        "ce": token_sums(case.logits_vocabulary, case.labels).loss,
        "trust": losses.trust_kl_sum(log_probs.exp(), log_probs, case.reference.log_softmax(-1), case.documents),
        "reuse": losses.reuse_loss_sum(probs, losses.previous_choice(case.ids, case.documents, E), case.documents, K),
        "cache": losses.reuse_loss_sum(probs, losses.lru_content(case.ids, case.documents, E, 3), case.documents, K),
        "miss": losses.miss_loss_sum(
            case.logits, losses.lru_content(case.ids, case.documents, E, 3), case.documents, K, 0.5
        ),
        "windows": losses.working_set_sum(probs, case.documents, WINDOW),
        **{f"lag_{lag}": losses.symmetric_kl_sum(probs, log_probs, case.documents, lag) for lag in LAGS},
        **losses.counts(case.documents, case.labels, lags=LAGS, window=WINDOW),
    }


def test_sums_and_counts_of_single_rows_add_up_to_those_of_the_batch() -> None:
    case = make_case([[5, 7], [9, -3], [1, 11], [-12]])
    whole = every_sum(case)
    parts = [every_sum(Case(*(tensor[row : row + 1] for tensor in case))) for row in range(4)]
    for key, value in whole.items():
        torch.testing.assert_close(torch.stack([part[key] for part in parts]).sum(), value, rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing() -> None:
    case = make_case([[5, 4]])
    draw = torch.Generator().manual_seed(9)
    padded = Case(
        *(torch.cat([t, torch.randn(1, 3, t.shape[-1], generator=draw)], 1) for t in case[:2]),
        torch.cat([case.ids, torch.tensor([[[1, 2], [3, 4], [5, 0]]])], 1),
        torch.cat([case.documents, torch.full((1, 3), PADDING)], 1),
        torch.cat([case.labels, torch.full((1, 3), IGNORE_LABEL)], 1),
        torch.cat([case.logits_vocabulary, torch.randn(1, 3, V, generator=draw)], 1),
    )
    for (key, value), other in zip(every_sum(case).items(), every_sum(padded).values(), strict=True):
        torch.testing.assert_close(other, value, msg=key)


def test_no_gradient_reaches_the_reference_of_the_trust_term() -> None:
    case = make_case([[6]])
    logits, reference = case.logits.requires_grad_(), case.reference.requires_grad_()
    losses.trust_kl_sum(
        logits.softmax(-1), logits.log_softmax(-1), reference.log_softmax(-1), case.documents
    ).backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0
    assert reference.grad is None


@pytest.mark.parametrize("lag", [1, 3])
def test_both_sides_of_the_symmetric_kl_get_a_gradient(lag: int) -> None:
    case = make_case([[lag + 1]])
    logits = case.logits.requires_grad_()
    losses.symmetric_kl_sum(logits.softmax(-1), logits.log_softmax(-1), case.documents, lag).backward()
    assert logits.grad is not None
    assert logits.grad[0, 0].abs().sum() > 1e-4
    assert logits.grad[0, lag].abs().sum() > 1e-4


def test_the_reuse_reward_gives_no_gradient_to_the_token_whose_choice_is_the_set() -> None:
    case = make_case([[2]])
    logits = case.logits.requires_grad_()
    held = losses.previous_choice(logits.topk(K).indices, case.documents, E)
    assert not held.requires_grad
    losses.reuse_loss_sum(logits.softmax(-1), held, case.documents, K).backward()
    assert logits.grad is not None
    assert logits.grad[0, 0].abs().sum() == 0
    assert logits.grad[0, 1].abs().sum() > 0


def test_the_reuse_loss_of_a_sequence_that_always_chooses_the_same_is_near_its_minimum() -> None:
    logits = torch.zeros(1, 5, E)
    logits[..., :K] = 30.0
    documents = torch.zeros(1, 5, dtype=torch.long)
    held = losses.previous_choice(logits.topk(K).indices, documents, E)
    assert_equal(losses.reuse_loss_sum(logits.softmax(-1), held, documents, K), math.log(K))


def test_sequence_index_numbers_runs_and_restarts_with_every_row() -> None:
    documents = torch.tensor([[3, 3, 5], [5, 5, PADDING]])
    assert losses.sequence_index(documents).tolist() == [[0, 0, 1], [2, 2, 3]]


@pytest.mark.parametrize("lag", [1, 3])
def test_the_gradient_of_the_symmetric_kl_goes_to_both_positions_as_autograd_says(lag: int) -> None:
    documents = torch.tensor([[0] * 5 + [1] * 4, [2] * 7 + [-1] * 2])
    logits = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    probs, log_probs = logits.softmax(-1), logits.log_softmax(-1)
    change, log_change = probs[:, lag:] - probs[:, :-lag], log_probs[:, lag:] - log_probs[:, :-lag]
    plain = 0.5 * (change * log_change).sum(-1)[losses.same_document(documents, lag)[:, lag:]].sum()
    found = losses.symmetric_kl_sum(probs, log_probs, documents, lag)
    torch.testing.assert_close(found, plain)
    ours, theirs = (torch.autograd.grad(3 * loss, logits, retain_graph=True)[0] for loss in (found, plain))
    torch.testing.assert_close(ours, theirs)
