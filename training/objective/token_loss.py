"""The task loss: next-token cross entropy, and the KL to the base's own predictions, some positions at a time.

With vocabularies of 100,000 tokens the logits are the largest tensor of a step, and autograd would keep log-probabilities,
probabilities and float32 copies of them. Here a part of the positions goes from hidden states through the head to
losses and to the gradient of the hidden states before the next part's turn, so neither logits nor their gradient ever
exist as a whole. Where there is no head to apply, what comes in are logits, and only their gradient is made.
Letters: T = B S positions, X numbers of a position: hidden states, or logits, V vocabulary, t positions of one part.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from data.batches import IGNORE_LABEL

PART_NUMBERS = 2**20
"""Logits worked on together on the CPU: few enough to stay in its cache, enough to outweigh the calls ..."""
PART_POSITIONS = 128
"""... but at least that many positions, so that a head multiplies a matrix and no single rows."""
ACCELERATOR_PART_NUMBERS, ACCELERATOR_PART_POSITIONS = 2**27, 2048
"""The same on an accelerator, which has to be kept busy: float32 logits of 512 MiB, and a head that is read few times."""

Head = Callable[[Tensor], Tensor]


class TokenSums(NamedTuple):
    """Sums over the positions that have a label, float32 scalars."""

    loss: Tensor  # weighted sum of both, with gradient
    cross_entropy: Tensor  # L_CE: -log p of the label, in nats
    distill_kl: Tensor  # KL(p_base || p) (knowledge distillation, arXiv 1503.02531), in nats; 0 without a base


def token_sums(
    outputs_BSX: Tensor, labels_BS: Tensor, base_outputs_BSX: Tensor | None = None, *, head: Head | None = None,
    weights: tuple[float | Tensor, float | Tensor] = (1.0, 0.0),
) -> TokenSums:  # fmt: skip
    """Cross entropy with the labels, KL from the base's predictions to ours, and their sum with these weights.

    Args:
        outputs_BSX: the model's logits, or with `head` its last hidden states; only they get a gradient.
        base_outputs_BSX: those of the base; None: there is no KL.
        head: makes logits [t, V] of hidden states [t, X]; its own weights do not train.
        weights: what cross entropy and KL are multiplied by in `loss`.
    """
    base_outputs_TX = None if base_outputs_BSX is None else base_outputs_BSX.detach().flatten(0, 1)
    outputs_TX = outputs_BSX.flatten(0, 1)
    return TokenSums(*_TokenSums.apply(outputs_TX, labels_BS.flatten(), base_outputs_TX, head or _as_it_is, weights))


def _as_it_is(logits_tV: Tensor) -> Tensor:
    return logits_tV


class _TokenSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, outputs_TX: Tensor, labels_T: Tensor, base_outputs_TX: Tensor | None, head: Head,
        weights: tuple[float | Tensor, float | Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        cross_entropy, kl = (torch.zeros((), device=outputs_TX.device) for _ in range(2))
        needs_gradient = ctx.needs_input_grad[0]
        grad_TX = torch.empty_like(outputs_TX) if needs_gradient else None
        for part in _parts(outputs_TX, labels_T, head):
            with torch.set_grad_enabled(needs_gradient and head is not _as_it_is):
                outputs_tX = outputs_TX[part].detach().requires_grad_(torch.is_grad_enabled())
                logits_tV = head(outputs_tX)
            log_p_tV = logits_tV.detach().float().log_softmax(-1)
            has_label_t1 = (labels_T[part] != IGNORE_LABEL).unsqueeze(-1)
            labels_t1 = labels_T[part].clamp(min=0).unsqueeze(-1)
            cross_entropy -= log_p_tV.gather(1, labels_t1).masked_fill_(~has_label_t1, 0.0).sum()
            log_q_tV = None if base_outputs_TX is None else head(base_outputs_TX[part]).float().log_softmax(-1)
            if log_q_tV is not None:
                kl += ((log_q_tV - log_p_tV).mul_(log_q_tV.exp()).sum(1, keepdim=True) * has_label_t1).sum()
            if grad_TX is None:
                continue
            grad_tV = _gradient(log_p_tV, labels_t1, log_q_tV, *(weight * has_label_t1.float() for weight in weights))
            if head is _as_it_is:
                grad_TX[part] = grad_tV
            else:
                (grad_TX[part],) = torch.autograd.grad(logits_tV, outputs_tX, grad_tV.to(logits_tV.dtype))
        ctx.save_for_backward(grad_TX)
        ctx.mark_non_differentiable(cross_entropy, kl)
        loss = weights[0] * cross_entropy + (weights[1] * kl if base_outputs_TX is not None else 0.0)
        return loss.float(), cross_entropy, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad_TX,) = ctx.saved_tensors
        return grad_TX * grad.to(grad_TX.dtype), None, None, None, None


def _gradient(
    log_p_tV: Tensor, labels_t1: Tensor, log_q_tV: Tensor | None, of_cross_entropy_t1: Tensor, of_kl_t1: Tensor
) -> Tensor:
    """The gradient of the logits, p - y for L_CE and p - q for the KL: p ours, q the base's, y the label; overwrites both."""
    if log_q_tV is None:
        grad_tV = log_p_tV.exp_().mul_(of_cross_entropy_t1)
    else:
        grad_tV = log_p_tV.exp_().mul_(of_cross_entropy_t1 + of_kl_t1).sub_(log_q_tV.exp_().mul_(of_kl_t1))
    return grad_tV.scatter_add_(1, labels_t1, -of_cross_entropy_t1)


def _parts(outputs_TX: Tensor, labels_T: Tensor, head: Head) -> Iterator[slice]:
    """Slices of positions that are worked on together; a head is tried once to see how many logits it makes."""
    vocabulary, fewest = outputs_TX.shape[1], 1
    if head is not _as_it_is:
        fewest = part_size(outputs_TX.device)[1]
        with torch.no_grad():
            vocabulary = head(outputs_TX[:1]).shape[1]
    size = max(fewest, part_size(outputs_TX.device)[0] // vocabulary)
    return (slice(first, first + size) for first in range(0, len(labels_T), size))


def part_size(device: torch.device) -> tuple[int, int]:
    """How many logits are worked on together, and of how many positions at least, where a head makes them."""
    if device.type == "cpu":
        return PART_NUMBERS, PART_POSITIONS
    return ACCELERATOR_PART_NUMBERS, ACCELERATOR_PART_POSITIONS
