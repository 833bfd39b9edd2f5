"""The task loss against torch's own cross entropy and KL over whole logits, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.batches import IGNORE_LABEL
from training import token_loss
from training.token_loss import token_sums

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
def test_both_sums_and_their_gradients_are_those_of_torch_however_positions_are_cut(
    labels: Tensor, part_numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_loss, "PART_NUMBERS", part_numbers)
    logits, base = numbers(1), numbers(2)
    found, expected = token_sums(logits, labels, base), plain(logits, labels, base)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    for share in (0.0, 0.3, 1.0):
        ours, theirs = (
            torch.autograd.grad((1 - share) * ce + share * kl, logits, retain_graph=True)[0]
            for ce, kl in (found, expected)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert (ours[labels == IGNORE_LABEL] == 0).all()


def test_nothing_is_learnt_by_the_base(labels: Tensor) -> None:
    logits, base = numbers(1), numbers(2)
    sum(token_sums(logits, labels, base)).backward()
    assert base.grad is None


def test_a_model_is_at_no_distance_from_itself(labels: Tensor) -> None:
    logits = numbers(1)
    sums = token_sums(logits, labels, logits)
    assert sums.distill_kl.item() == pytest.approx(0, abs=1e-6)
    sums.distill_kl.backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6


def test_without_a_base_there_is_no_kl_and_the_gradient_of_the_cross_entropy_alone(labels: Tensor) -> None:
    logits = numbers(1)
    sums = token_sums(logits, labels)
    assert sums.distill_kl == 0
    expected = torch.autograd.grad(plain(logits, labels, logits)[0], logits)[0]
    torch.testing.assert_close(torch.autograd.grad(sum(sums), logits)[0], expected)


def test_sixteen_bit_logits_are_summed_in_float32_and_get_a_gradient_of_their_own_precision(labels: Tensor) -> None:
    logits, base = numbers(1, dtype=torch.bfloat16), numbers(2, dtype=torch.bfloat16)
    sums = token_sums(logits, labels, base)
    for ours, theirs in zip(sums, plain(logits.float(), labels, base.float()), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs)
    sum(sums).backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_only_the_logits_themselves_are_kept_for_the_backward_pass(labels: Tensor) -> None:
    """The trap: cross entropy that keeps float32 log-probabilities of the whole vocabulary runs out of memory."""
    logits, base, kept = numbers(1), numbers(2), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        token_sums(logits, labels, base)
    large = [tensor for tensor in kept if tensor.numel() >= logits.numel()]
    assert {tensor.data_ptr() for tensor in large} == {logits.data_ptr(), base.data_ptr()}


def test_no_label_at_all_is_a_sum_of_nothing() -> None:
    logits = numbers(1)
    sums = token_sums(logits, torch.full((B, S), IGNORE_LABEL), numbers(2))
    assert sums == (0, 0)
    sum(sums).backward()
    assert (logits.grad == 0).all()
