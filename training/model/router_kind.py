"""What kind of router a family has, told by what a copy of it with random weights does; never by a list of names.

Every router of transformers gives (logits, weights of the chosen experts, their ids). Asked of the copy: on which of its
parameters the logits depend (those train; correction biases only shift the choice and stay frozen), by which function
logits become weights, and whether the largest logits are always the ones that are chosen.
Letters: T tokens, E experts, K chosen.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from configs.load import UserError

PROBE_TOKENS = 128
TOLERANCE = 1e-4


class RouterKind(NamedTuple):
    """How a router works.

    Attributes:
        scoring: `softmax` or `sigmoid` of the logits; P_t is proportional to it.
        trained: names of the parameters inside the router that the logits depend on.
        takes_largest: whether the experts with the largest logits are chosen, whatever biases or groups there are.
    """

    scoring: str
    trained: tuple[str, ...]
    takes_largest: bool

    def log_scores(self, logits: Tensor) -> Tensor:
        """Float32 log scores, whose softmax over the experts is P_t."""
        return logits.float() if self.scoring == "softmax" else logsigmoid(logits.float())

    def __str__(self) -> str:
        choice = "largest chosen" if self.takes_largest else "choice by groups or a correction bias"
        return f"{self.scoring} of logits, {choice}, {' and '.join(self.trained)} of each train"


def kind_of(router: nn.Module, *, hidden_size: int) -> RouterKind:
    """The kind of a router module, which is left as it is.

    Raises:
        UserError: weights of experts follow neither from a softmax of the logits nor from a sigmoid.
    """
    with torch.inference_mode(False), torch.enable_grad():  # whoever asks may have switched gradients off
        probe = _randomised(router)
        draw = torch.Generator().manual_seed(1)
        outputs = probe.forward(torch.randn(PROBE_TOKENS, hidden_size, generator=draw))  # without hooks
        named = dict(probe.named_parameters())
        gradients = torch.autograd.grad(outputs[0].sum(), list(named.values()), allow_unused=True)
    logits_TE, weights_TK, ids_TK = (tensor.detach() for tensor in outputs)
    scoring = _scoring(logits_TE.float(), weights_TK.float(), ids_TK)
    if scoring is None:
        raise UserError(
            f"{type(router).__name__} weighs experts neither by a softmax nor by a sigmoid of its logits: which "
            "probabilities its objective should be made of is not known; such routers cannot be trained here"
        )
    largest_TK = logits_TE.topk(ids_TK.shape[1], dim=-1).indices
    return RouterKind(
        scoring=scoring,
        trained=tuple(name for name, gradient in zip(named, gradients, strict=True) if gradient is not None),
        takes_largest=bool((largest_TK.sort(-1).values == ids_TK.sort(-1).values).all()),
    )


def _randomised(router: nn.Module) -> nn.Module:
    """A copy on the CPU in float32 that decides as in inference, with biases large enough to change choices."""
    probe = copy.deepcopy(router).to("cpu", torch.float32).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*probe.parameters(), *probe.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=draw) / max(1, tensor.shape[-1] ** 0.5))
    return probe.requires_grad_(True)


def _scoring(logits_TE: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> str | None:
    """Which function of the logits the weights are proportional to; None if neither."""
    chosen_TK = logits_TE.gather(-1, ids_TK)
    shares_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    if torch.allclose(shares_TK, chosen_TK.softmax(-1), atol=TOLERANCE):
        return "softmax"
    if torch.allclose(shares_TK, logsigmoid(chosen_TK).softmax(-1), atol=TOLERANCE):
        return "sigmoid"
    # a softmax over the closest calls alone, as SparseMixer's (arXiv 2409.12136): 1 / w is a sum over the m largest
    descending_TE = logits_TE.sort(-1, descending=True).values
    sums_TE = (descending_TE - descending_TE[:, :1]).exp().cumsum(-1)
    first_T1 = weights_TK.gather(-1, chosen_TK.argmax(-1, keepdim=True))
    return "softmax" if ((1 / first_T1 - sums_TE).abs().amin(-1) < TOLERANCE).all() else None
