"""The task loss: next-token cross entropy, and the KL to the base's own predictions, in one pass over the logits.

With vocabularies of 100,000 tokens the logits are the largest tensor of a step. Autograd would keep log-probabilities,
probabilities and float32 copies of them; here some positions at a time are worked on, and the only thing made that is as
large as the logits is their gradient. Letters: T = B S positions, V vocabulary, t positions of one part.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from data.batches import IGNORE_LABEL

PART_NUMBERS = 2**19
"""Logits worked on together: few enough to stay in a processor's cache, enough to outweigh the calls."""


class TokenSums(NamedTuple):
    """Sums over the positions that have a label, in nats, float32 scalars."""

    cross_entropy: Tensor  # L_CE: -log p of the label
    distill_kl: Tensor  # KL(p_base || p) (knowledge distillation, arXiv 1503.02531); 0 without a base


def token_sums(logits_BSV: Tensor, labels_BS: Tensor, base_logits_BSV: Tensor | None = None) -> TokenSums:
    """Cross entropy with the labels, and KL from the base's predictions to ours; no gradient goes to the base."""
    base_logits_TV = None if base_logits_BSV is None else base_logits_BSV.detach().flatten(0, 1)
    return TokenSums(*_TokenSums.apply(logits_BSV.flatten(0, 1), labels_BS.flatten(), base_logits_TV))


class _TokenSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor, base_logits_TV: Tensor | None) -> tuple[Tensor, Tensor]:
        nll_T, kl_T = (torch.zeros(len(labels_T), device=logits_TV.device) for _ in range(2))
        log_norms_2T = torch.zeros(2, len(labels_T), device=logits_TV.device)  # ours, the base's
        for part in _parts(logits_TV):
            log_p_tV = _log_probabilities(logits_TV, part, log_norms_2T[0])
            nll_T[part] = -log_p_tV.gather(1, labels_T[part, None].clamp(min=0)).squeeze(1)
            if base_logits_TV is not None:
                log_q_tV = _log_probabilities(base_logits_TV, part, log_norms_2T[1])
                difference_tV = log_p_tV.neg_().add_(log_q_tV)
                kl_T[part] = difference_tV.mul_(log_q_tV.exp_()).sum(1)
        ctx.save_for_backward(logits_TV, labels_T, base_logits_TV, log_norms_2T)
        has_label_T = labels_T != IGNORE_LABEL
        return nll_T[has_label_T].sum(), kl_T[has_label_T].sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """With p ours, q the base's and y the label as probabilities: of L_CE p - y, of the KL p - q."""
        logits_TV, labels_T, base_logits_TV, log_norms_2T = ctx.saved_tensors
        of_cross_entropy, of_kl = grads if base_logits_TV is not None else (grads[0], torch.zeros_like(grads[1]))
        grad_TV = torch.empty_like(logits_TV)
        for part in _parts(logits_TV):
            grad_tV = _probabilities(logits_TV, part, log_norms_2T[0]).mul_(of_cross_entropy + of_kl)
            if base_logits_TV is not None:
                grad_tV.sub_(_probabilities(base_logits_TV, part, log_norms_2T[1]).mul_(of_kl))
            labels_t1 = labels_T[part, None]
            grad_tV.scatter_add_(1, labels_t1.clamp(min=0), -of_cross_entropy.expand(labels_t1.shape))
            grad_TV[part] = grad_tV.masked_fill_(labels_t1 == IGNORE_LABEL, 0.0)
        return grad_TV, None, None


def _parts(logits_TV: Tensor) -> Iterator[slice]:
    positions, vocabulary = logits_TV.shape
    size = max(1, PART_NUMBERS // vocabulary)
    return (slice(first, first + size) for first in range(0, positions, size))


def _log_probabilities(logits_TV: Tensor, part: slice, log_norm_T: Tensor) -> Tensor:
    """[t, V] in float32, to be written over; notes the normalisation in `log_norm_T`."""
    logits_tV = logits_TV[part].float()
    log_norm_T[part] = logits_tV.logsumexp(1)
    return logits_tV - log_norm_T[part, None]


def _probabilities(logits_TV: Tensor, part: slice, log_norm_T: Tensor) -> Tensor:
    """[t, V] in float32, to be written over."""
    return (logits_TV[part].float() - log_norm_T[part, None]).exp_()
