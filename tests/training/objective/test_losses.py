"""Every loss against a slow reference that walks over positions one by one, following the paper's words."""

import math

import pytest
import torch
from torch import Tensor

from data.batches import IGNORE_LABEL, PADDING
from tests.training.objective.made_cases import (
    CASES,
    LAGS,
    WINDOW,
    Case,
    E,
    K,
    V,
    assert_equal,
    kl,
    make_case,
    sequences,
    slow_reuse,
    softmax,
)
from training.objective import losses
from training.objective.token_loss import token_sums


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


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


def test_reuse_loss_rewards_mass_on_the_previous_tokens_choice(case: Case) -> None:
    held = losses.previous_choice(case.ids, case.documents, E)
    found = losses.reuse_loss_sum(case.logits.softmax(-1), held, case.documents, K)
    assert_equal(found, slow_reuse(case, lambda positions, t: set(case.ids[positions[t - 1]].tolist())))


@pytest.mark.parametrize("lag", LAGS)
def test_symmetric_kl_is_half_of_both_over_pairs_inside_a_sequence(case: Case, lag: int) -> None:
    expected = 0.0
    for positions in sequences(case.documents):
        for t in range(lag, len(positions)):
            later, earlier = softmax(case.logits[positions[t]]), softmax(case.logits[positions[t - lag]])
            expected += 0.5 * (kl(later, earlier) + kl(earlier, later))
    assert_equal(
        losses.symmetric_kl_sums(case.logits.softmax(-1), case.logits.log_softmax(-1), case.documents, [lag])[0],
        expected,
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
        **dict(
            zip(
                [f"lag_{lag}" for lag in LAGS],
                losses.symmetric_kl_sums(probs, log_probs, case.documents, LAGS),
                strict=True,
            )
        ),
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
    losses.symmetric_kl_sums(logits.softmax(-1), logits.log_softmax(-1), case.documents, [lag])[0].backward()
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


def test_the_gradient_of_the_symmetric_kl_goes_to_both_positions_as_autograd_says() -> None:
    documents = torch.tensor([[0] * 5 + [1] * 4, [2] * 7 + [-1] * 2])
    logits = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    probs, log_probs = logits.softmax(-1), logits.log_softmax(-1)
    lags, weights = [1, 3, 9, 20], torch.tensor([3.0, 0.5, 7.0, 1.0])  # the last two fit nowhere
    plain = [
        0.5 * ((probs[:, lag:] - probs[:, :-lag]) * (log_probs[:, lag:] - log_probs[:, :-lag])).sum(-1)
        [losses.same_document(documents, lag)[:, lag:]].sum()
        for lag in lags
    ]  # fmt: skip
    found = losses.symmetric_kl_sums(probs, log_probs, documents, lags)
    torch.testing.assert_close(found, torch.stack(plain))
    ours, theirs = (
        torch.autograd.grad((weights * sums).sum(), logits, retain_graph=True)[0]
        for sums in (found, torch.stack(plain))
    )
    torch.testing.assert_close(ours, theirs)


DECAY = 0.8


def slow_soft_cache(case: Case, slots: int) -> dict[tuple[int, int], list[float]]:
    """MELINOE's cache before every position, by its recurrence."""
    held = {}
    for positions in sequences(case.documents):
        cache, total = [0.0] * E, 0.0
        for at in positions:
            held[at] = cache
            requests = [float(expert in case.ids[at].tolist()) for expert in range(E)]
            after = DECAY * total + K / slots
            cache = [(DECAY * total * c + r) / after for c, r in zip(cache, requests, strict=True)]
            total = after
    return held


@pytest.mark.parametrize("slots", [2, 4])
def test_a_soft_cache_follows_melinoes_recurrence_and_what_it_lacks_is_summed(case: Case, slots: int) -> None:
    requests = torch.zeros_like(case.logits).scatter_(-1, case.ids, 1.0)
    found = losses.soft_cache(requests, case.documents, slots=slots, top_k=K, decay=DECAY)
    expected = slow_soft_cache(case, slots)
    for at, cache in expected.items():
        torch.testing.assert_close(found[at], torch.tensor(cache))
    missing = sum(1 - expected[at][expert] for at in expected for expert in case.ids[at].tolist())
    assert_equal(losses.soft_request_sum(requests, found, case.documents), missing)


def test_what_a_soft_cache_lacks_pulls_at_earlier_requests_too() -> None:
    case = make_case([[6]])
    probs = case.logits.softmax(-1).requires_grad_()
    requests = torch.zeros_like(case.logits).scatter_(-1, case.ids, 1.0) + probs - probs.detach()
    cache = losses.soft_cache(requests, case.documents, slots=4, top_k=K, decay=DECAY)
    last = (requests[0, 5].detach() * (1 - cache[0, 5])).sum()
    (gradient,) = torch.autograd.grad(last, probs)
    wanted = requests[0, 5].detach() > 0
    assert (gradient[0, :5, wanted] < 0).all()
    assert (gradient[0, :5, ~wanted] == 0).all()
    assert (gradient[0, 5] == 0).all()


def test_rank_margins_are_of_pairs_as_the_original_router_orders_them(case: Case) -> None:
    expected = 0.0
    for positions in sequences(case.documents):
        for at in positions:
            p, reference = softmax(case.logits[at]), case.reference[at].tolist()
            pairs = [(i, j) for i in range(E) for j in range(E) if reference[i] > reference[j]]
            expected += sum(max(0.0, 0.1 - (p[i] - p[j])) for i, j in pairs) / len(pairs)
    assert_equal(losses.margin_rank_sum(case.logits.softmax(-1), case.reference, case.documents, margin=0.1), expected)
