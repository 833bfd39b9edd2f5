"""What levers and routers cost in freely generated text, where every token is read that was written under them.

A price that is found on given text says nothing of text that goes astray. So the second half of every text is written
anew, token by token from the same caches, and judged by the untouched model without a lever. Random numbers are those of the
text and position, the same for all: two models write the same until their predictions differ by enough.
Letters: R texts, S tokens of each, N of them new, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from evaluation.engine.levers.drop import Drop
from evaluation.engine.levers.prior import Prior
from evaluation.engine.stats import ReadCounts
from evaluation.frontier.steps import CacheKind, cached, stepped

MOST_NUMBERS = 2**25
"""Predictions that are held at once."""


class Written(NamedTuple):
    """What was found of every text, in their order.

    Attributes:
        ids_RN: what was written.
        losses_R: negative log-likelihood of it under the untouched model, in nats.
        kl_R: nats by which predictions are away from the untouched model's, summed over what was written: KL(own, untouched).
        kl_given_R: the same where the text's own tokens are read in the place of those that were written.
    """

    ids_RN: npt.NDArray[np.int64]
    losses_R: npt.NDArray[np.float64]
    kl_R: npt.NDArray[np.float64]
    kl_given_R: npt.NDArray[np.float64]


@torch.no_grad()
def write_on(
    model: PreTrainedModel, texts_RS: npt.NDArray[np.integer], levers: Sequence[Prior | Drop], cache: CacheKind, *,
    new: int, untouched: Callable[[], AbstractContextManager[None]], seed: int = 0,
) -> Written:  # fmt: skip
    """Write the last `new` tokens of every text anew, by sampling; inside `untouched()` the model has its own routers."""
    vocabulary = model.config.get_text_config().vocab_size
    together = max(1, MOST_NUMBERS // (new * vocabulary))
    draws_RN = torch.from_numpy(np.random.default_rng(seed).random((len(texts_RS), new)))
    parts = []
    for start in range(0, len(texts_RS), together):
        ids_RS = torch.from_numpy(texts_RS[start : start + together].astype(np.int64))
        own = [
            _predictions(model, ids_RS, levers, cache, new=new, draws_RN=draws)
            for draws in (draws_RN[start : start + together], None)
        ]
        with untouched():
            parts.append([_judged(model, written_RS, log_q_RNV, new=new) for written_RS, log_q_RNV in own])
    ids, losses, kl = (np.concatenate([part[0][n] for part in parts]) for n in range(3))
    return Written(ids, losses, kl, np.concatenate([part[1][2] for part in parts]))


def _predictions(
    model: PreTrainedModel, given_RS: Tensor, levers: Sequence[Prior | Drop], kind: CacheKind, *, new: int,
    draws_RN: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Texts [R, S], their last `new` tokens drawn from the model's predictions if there are draws, and these predictions."""
    ids_RS, first = given_RS.clone().to(model.device), given_RS.shape[1] - new
    log_q: list[Tensor] = []
    with cached(model, len(ids_RS), levers, kind, ReadCounts()):
        for step, logits_RV in stepped(model, ids_RS):
            if step + 1 < first:
                continue
            log_q.append(logits_RV.float().log_softmax(-1))
            if draws_RN is not None:
                below_RV = log_q[-1].double().exp().cumsum(-1)
                drawn_R1 = draws_RN[:, step + 1 - first, None].to(below_RV) * below_RV[:, -1:]
                ids_RS[:, step + 1] = torch.searchsorted(below_RV, drawn_R1, right=True).squeeze(1)
    return ids_RS, torch.stack(log_q, 1)


def _judged(
    model: PreTrainedModel, ids_RS: Tensor, log_q_RNV: Tensor, *, new: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The new tokens, their loss under `model`, and how far predictions are away from its own."""
    logits_RNV = model(input_ids=ids_RS, use_cache=False).logits[:, -new - 1 : -1]
    log_p_RNV = logits_RNV.float().log_softmax(-1)
    losses_RN = nn.functional.nll_loss(log_p_RNV.flatten(0, 1), ids_RS[:, -new:].flatten(), reduction="none")
    kl_RN = nn.functional.kl_div(log_p_RNV, log_q_RNV, log_target=True, reduction="none").sum(-1)
    losses_R = losses_RN.view(len(ids_RS), new).double().sum(1)
    return ids_RS[:, -new:].cpu().numpy(), losses_R.cpu().numpy(), kl_RN.double().sum(1).cpu().numpy()
