"""The routing of given text, teacher-forced: what a model chooses when every token is the text's own.

Traces of decoding are the engine's (`record_trace`); what a cache makes of either is worked out in `engine/cache/`.
Letters: B batch, S sequence, T tokens, L layers, K chosen, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel

from configs.load import UserError
from data.batches import IGNORE_LABEL
from evaluation.engine.cache.trace import RouteTrace
from training.model.routers import RouterObserver
from training.objective.token_loss import token_sums


@torch.no_grad()
def teacher_forced_trace(
    model: PreTrainedModel, documents: Sequence[np.ndarray], *, max_length: int, batch_size: int = 8,
    expert_bytes: int | None = None, progress: str | None = None,
) -> tuple[RouteTrace, float]:  # fmt: skip
    """Routing of every token of `documents` (token ids), each cut into requests of at most `max_length` tokens.

    Returns:
        The trace, and the mean cross entropy in nats per predicted token.

    Raises:
        UserError: no document has two tokens.
    """
    pieces = (d[i : i + max_length] for d in documents for i in range(0, len(d), max_length))
    requests = [piece for piece in pieces if len(piece) >= 2]
    if not requests:
        raise UserError(
            f"no text of two tokens to trace among {len(documents)}; give more text or a larger --max-length"
        )
    observer, chosen_TLK, nll, predicted = RouterObserver(model), [], 0.0, 0
    shown = {"desc": progress, "disable": progress is None, "unit": "batch", "leave": False}
    for start in tqdm(range(0, len(requests), batch_size), **shown):
        batch = requests[start : start + batch_size]
        ids_BS, labels_BS = _padded(batch)
        with observer.recording(*ids_BS.shape) as routings:
            logits_BSV = model(input_ids=ids_BS.to(model.device), use_cache=False).logits
        nll += float(token_sums(logits_BSV, labels_BS.to(model.device)).cross_entropy)
        predicted += int((labels_BS != IGNORE_LABEL).sum())
        ids_BSLK = torch.stack([routing.ids_BSK for routing in routings], dim=2).to("cpu", torch.int16).numpy()
        chosen_TLK += [ids_BSLK[row, : len(request)] for row, request in enumerate(batch)]
    observer.close()
    expert_ids = np.concatenate(chosen_TLK)
    trace = RouteTrace(
        expert_ids=expert_ids,
        phase=np.ones(len(expert_ids), dtype=np.uint8),
        request_id=np.repeat(np.arange(len(requests)), [len(request) for request in requests]),
        call=np.arange(len(expert_ids)),
        num_experts=routings[0].logits_BSE.shape[-1],
        layer_ids=tuple(_layer_number(name) for name in observer.names),
        expert_bytes=expert_bytes,
        model=str(model.name_or_path),
    )
    return trace, nll / predicted


def _padded(requests: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and what each is to predict, [B, S]; padding on the right is invisible to causal attention."""
    ids = [torch.from_numpy(request.astype(np.int64)) for request in requests]
    labels_BS = pad_sequence([row[1:] for row in ids], batch_first=True, padding_value=IGNORE_LABEL)
    return pad_sequence(ids, batch_first=True), pad(labels_BS, (0, 1), value=IGNORE_LABEL)


def _layer_number(router_name: str) -> int:
    """The 3 of `model.layers.3.mlp.gate`."""
    return next(int(part) for part in router_name.split(".") if part.isdigit())
