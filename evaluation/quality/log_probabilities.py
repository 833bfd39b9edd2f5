"""Log-probabilities of given tokens, for quality and for teacher-forced traces.

Letters: B sequences, S positions of the longest, H width, n positions whose logits are made at once, V vocabulary, X H or V.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from training.sharding.layerwise import input_device, is_sharded

LOGIT_BYTES = 24 * 2**20
"""What logits that are made at once and their log-probabilities may take."""


@torch.no_grad()  # not inference_mode: buffers that torch shards with would be of no use outside of it
def log_probabilities(model: PreTrainedModel, ids_BS: Tensor, spots: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token as the one after its spot, in nats, and whether it is the likeliest there.

    Logits are made of these spots only, some at a time; a sharded model, which can only be called whole, makes all. The log
    is taken in float32, whatever the model's precision: in bfloat16 -40 nats would have steps of a quarter.

    Args:
        ids_BS: padded on the right.
        spots: positions among the B S of `ids_BS`; one for each of `tokens`.
    """
    device, is_whole = input_device(model), not is_sharded(model)
    has_decoder = is_whole and model.base_model is not model  # a few families do not say what their decoder is called
    asked: Any = model.base_model if has_decoder else model
    outputs = asked(input_ids=ids_BS.to(device), use_cache=False, return_dict=True)
    places, place_of = spots.unique(return_inverse=True)
    made_BSX = outputs.last_hidden_state if has_decoder else outputs.logits
    made_nX = made_BSX.flatten(0, 1)[places.to(device)]
    log_p, is_best = torch.empty(len(tokens)), torch.empty(len(tokens), dtype=torch.bool)
    at_once = max(1, LOGIT_BYTES // (12 * model.config.get_text_config().vocab_size))  # logits, float32, and its log
    for start in range(0, len(places), at_once):
        part_nX = made_nX[start : start + at_once]
        logits_nV = _logits(model, outputs, part_nX) if has_decoder else part_nX
        here = ((place_of >= start) & (place_of < start + at_once)).nonzero().flatten()
        at, token = (place_of[here] - start).to(device), tokens[here].to(device)
        is_best[here] = (logits_nV.argmax(-1)[at] == token).cpu()
        log_p[here] = logits_nV.float().log_softmax(-1)[at, token].cpu()
    return log_p, is_best


class _HasRun(nn.Module):
    """In the place of a decoder whose outputs are known."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self._outputs = outputs

    def forward(self, *_: Any, **__: Any) -> Any:
        return self._outputs


def _logits(model: PreTrainedModel, outputs: Any, hidden_nH: Tensor) -> Tensor:
    """[n, V]: what `model` itself makes of these hidden states, with all that its family does behind its head."""
    decoder, name = model.base_model, model.base_model_prefix
    setattr(model, name, _HasRun(type(outputs)(last_hidden_state=hidden_nH[None])))
    try:
        ids_1n = torch.zeros(1, len(hidden_nH), dtype=torch.long, device=hidden_nH.device)
        return cast(Tensor, model(input_ids=ids_1n, use_cache=False, return_dict=True).logits[0])
    finally:
        setattr(model, name, decoder)
