"""The task loss against torch's own cross entropy and KL over whole logits, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.batches import IGNORE_LABEL
from training.objective import token_loss
from training.objective.token_loss import token_sums

B, S, V = 3, 5, 11


def numbers(seed: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(B, S, V, generator=draw)).to(dtype).requires_grad_()


@pytest.fixture
def labels() -> Tensor:
    labels = torch.randint(V, (B, S), generator=torch.Generator().manual_seed(9))
    labels[0, 1] = labels[2, 4] = labels[1] = IGNORE_LABEL
    return labels


def plain(logits: Tensor, labels: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORE_LABEL)
    has_label = labels != IGNORE_LABEL
    ours, bases = logits[has_label].log_softmax(-1), base.detach()[has_label].log_softmax(-1)
    return cross_entropy, F.kl_div(ours, bases, reduction="sum", log_target=True)


@pytest.mark.parametrize("part_numbers", [1, 4 * V, 2**19])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_both_sums_and_their_gradients_are_those_of_torch_however_positions_are_cut(
    labels: Tensor, part_numbers: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_loss, "PART_NUMBERS", part_numbers)
    logits, base = numbers(1), numbers(2)
    found, expected = token_sums(logits, labels, base, weights=(1 - share, share)), plain(logits, labels, base)
    for ours, theirs in zip(found[1:], expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    total = (1 - share) * expected[0] + share * expected[1]
    torch.testing.assert_close(found.loss, total)
    ours, theirs = (torch.autograd.grad(2.5 * loss, logits)[0] for loss in (found.loss, total))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert (ours[labels == IGNORE_LABEL] == 0).all()


@pytest.mark.parametrize("part_positions", [1, 4, 128])
@pytest.mark.parametrize("with_base", [True, False])
def test_hidden_states_through_a_head_in_parts_are_logits_as_a_whole(
    labels: Tensor, part_positions: int, with_base: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_loss, "PART_NUMBERS", 1)
    monkeypatch.setattr(token_loss, "PART_POSITIONS", part_positions)
    head = torch.nn.Linear(7, V).requires_grad_(False)
    hidden, base = (torch.randn(B, S, 7, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in (1, 2))
    calls: list[int] = []

    def counted(hidden_tX: Tensor) -> Tensor:
        calls.append(len(hidden_tX))
        return head(hidden_tX)

    found = token_sums(hidden, labels, base if with_base else None, head=counted, weights=(0.4, 0.6))
    cross_entropy, kl = plain(head(hidden), labels, head(base))
    expected = 0.4 * cross_entropy + (0.6 * kl if with_base else 0.0)
    torch.testing.assert_close(found.loss, expected)
    ours, theirs = (torch.autograd.grad(loss, hidden)[0] for loss in (found.loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert max(calls) <= part_positions, "never more than a part"


def test_nothing_is_learnt_by_the_base(labels: Tensor) -> None:
    logits, base = numbers(1), numbers(2)
    token_sums(logits, labels, base, weights=(0.5, 0.5)).loss.backward()
    assert base.grad is None


def test_a_model_is_at_no_distance_from_itself(labels: Tensor) -> None:
    logits = numbers(1)
    sums = token_sums(logits, labels, logits, weights=(0.0, 1.0))
    assert sums.distill_kl.item() == pytest.approx(0, abs=1e-6)
    sums.loss.backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6


def test_without_a_base_there_is_no_kl_and_the_gradient_of_the_cross_entropy_alone(labels: Tensor) -> None:
    logits = numbers(1)
    sums = token_sums(logits, labels, weights=(1.0, 5.0))
    assert sums.distill_kl == 0
    expected = torch.autograd.grad(plain(logits, labels, logits)[0], logits)[0]
    torch.testing.assert_close(torch.autograd.grad(sums.loss, logits)[0], expected)


def test_without_gradients_there_are_only_sums(labels: Tensor) -> None:
    with torch.no_grad():
        sums = token_sums(numbers(1), labels)
    assert not sums.loss.requires_grad
    torch.testing.assert_close(sums.cross_entropy, plain(numbers(1), labels, numbers(1))[0].detach())


def test_sixteen_bit_logits_are_summed_in_float32_and_get_a_gradient_of_their_own_precision(labels: Tensor) -> None:
    logits, base = numbers(1, dtype=torch.bfloat16), numbers(2, dtype=torch.bfloat16)
    sums = token_sums(logits, labels, base, weights=(0.5, 0.5))
    for ours, theirs in zip(sums[1:], plain(logits.float(), labels, base.float()), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs)
    sums.loss.backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_of_a_whole_vocabulary_nothing_is_kept_for_the_backward_pass(labels: Tensor) -> None:
    """The trap: cross entropy that keeps logits and their log-probabilities of large vocabularies runs out of memory."""
    head, kept = torch.nn.Linear(7, 1000).requires_grad_(False), []
    hidden = torch.randn(B, S, 7).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        token_sums(hidden, labels, hidden, head=head, weights=(0.5, 0.5))
    outside = [tensor for tensor in kept if tensor.grad_fn is None]
    assert hidden.numel() in [tensor.numel() for tensor in outside]
    assert max(tensor.numel() for tensor in outside) < B * S * 1000


def test_no_label_at_all_is_a_sum_of_nothing() -> None:
    logits = numbers(1)
    sums = token_sums(logits, torch.full((B, S), IGNORE_LABEL), numbers(2), weights=(0.5, 0.5))
    assert sums == (0, 0, 0)
    sums.loss.backward()
    assert (logits.grad == 0).all()


def test_parts_are_large_where_an_accelerator_has_to_be_kept_busy() -> None:
    labels_T = torch.zeros(5000, dtype=torch.long, device="meta")
    logits_TV, hidden_TX = (torch.empty(5000, size, device="meta") for size in (2**17, 8))

    def head(hidden_tX: Tensor) -> Tensor:
        return hidden_tX.new_empty(len(hidden_tX), 2**17)

    found = [part.stop - part.start for part in token_loss._parts(logits_TV, labels_T, token_loss._as_it_is)]
    assert set(found) == {1024}
    assert {part.stop - part.start for part in token_loss._parts(hidden_TX, labels_T, head)} == {2048}
    assert {part.stop - part.start for part in token_loss._parts(torch.zeros(1, 8), labels_T, head)} == {128}
