"""The routing of given text, teacher-forced: what a model chooses when every token is the text's own.

Traces of decoding are the engine's (`record_trace`); what a cache makes of either is worked out in `engine/cache/`.
Letters: B batch, S sequence, R requests, T tokens, L layers, K chosen.
"""

import base64
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel

from configs.load import UserError
from evaluation.engine.cache.trace import RouteTrace
from evaluation.engine.engine import Engine
from evaluation.engine.memory.division import Call
from evaluation.quality.batches import Answers, batches_that_fit, process_index
from evaluation.quality.log_probabilities import log_probabilities
from training.model.routers import RouterObserver


@torch.no_grad()
def teacher_forced_trace(
    model: PreTrainedModel, documents: Sequence[np.ndarray], *, max_length: int, batch_size: int = 8,
    expert_bytes: int | None = None, progress: str | None = None, engine: Engine | None = None,
    answers: Answers | None = None,
) -> tuple[RouteTrace, np.ndarray]:  # fmt: skip
    """Routing of every token of `documents` (token ids), each cut into requests of at most `max_length` tokens.

    Args:
        engine: pages the experts of `model`: then a batch may be smaller, so that it fits the memory budget.
        answers: where what was found of a batch is kept; None: nowhere.

    Returns:
        The trace, and the cross entropy of every request in nats, summed over its tokens but the first.

    Raises:
        UserError: no document has two tokens.
    """
    pieces = (d[i : i + max_length] for d in documents for i in range(0, len(d), max_length))
    requests = [piece for piece in pieces if len(piece) >= 2]
    if not requests:
        raise UserError(
            f"no text of two tokens to trace among {len(documents)}; give more text or a larger --max-length"
        )
    observer, longest = RouterObserver(model), max(map(len, requests))

    def call_of(batch: int, _: np.ndarray) -> Call:
        return Call(batch, batch * longest, longest, keeps=False)

    batches = list(batches_that_fit(requests, call_of, engine=engine, most=batch_size))
    bar = tqdm(
        total=len(requests), desc=progress, disable=progress is None or process_index() > 0, unit="request", leave=False
    )
    found = (answers or Answers()).of(
        [["routing and losses", [request.tolist() for request in batch]] for batch in batches],
        lambda place: _traced(model, observer, batches[place]),
        engine=engine,
        answered=lambda place: bar.update(len(batches[place])),
    )
    bar.close()
    observer.close()
    expert_ids = np.concatenate([_unpacked(packed) for _, _, packed in found])
    layer_ids = tuple(_layer_number(name) for name in observer.names)
    trace = RouteTrace(
        expert_ids=expert_ids,
        phase=np.ones(len(expert_ids), dtype=np.uint8),
        request_id=np.repeat(np.arange(len(requests)), [len(request) for request in requests]),
        call=np.arange(len(expert_ids)),
        num_experts=found[0][1],
        layer_ids=layer_ids,
        expert_bytes=expert_bytes,
        model=str(model.name_or_path),
    )
    return trace, np.concatenate([losses for losses, _, _ in found])


def mean_loss(trace: RouteTrace, losses_R: np.ndarray) -> float:
    """Nats per predicted token."""
    return float(losses_R.sum()) / (trace.tokens - len(losses_R))


def _traced(
    model: PreTrainedModel, observer: RouterObserver, batch: Sequence[np.ndarray]
) -> tuple[list[float], int, Any]:
    """Each request's loss in nats, how many experts there are, those of every token as JSON."""
    ids_BS = pad_sequence([torch.from_numpy(request.astype(np.int64)) for request in batch], batch_first=True)
    starts = range(0, ids_BS.numel(), ids_BS.shape[1])
    spots = [torch.arange(start, start + len(row) - 1) for start, row in zip(starts, batch, strict=True)]
    targets = torch.from_numpy(np.concatenate([request[1:] for request in batch]).astype(np.int64))
    with observer.recording(*ids_BS.shape) as routings:
        log_p = log_probabilities(model, ids_BS, torch.cat(spots), targets)[0].double()
    ids_BSLK = torch.stack([routing.ids_BSK for routing in routings], dim=2).to("cpu", torch.int16).numpy()
    chosen_TLK = np.concatenate([ids_BSLK[row, : len(request)] for row, request in enumerate(batch)])
    losses = [-float(of_row.sum()) for of_row in log_p.split([len(row) - 1 for row in batch])]
    return (
        losses,
        routings[0].logits_BSE.shape[-1],
        [chosen_TLK.shape, base64.b64encode(zlib.compress(chosen_TLK.tobytes())).decode()],
    )


def _unpacked(packed: Any) -> np.ndarray:
    shape, text = packed
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.int16).reshape(shape)


def _layer_number(router_name: str) -> int:
    """The 3 of `model.layers.3.mlp.gate`."""
    return next(int(part) for part in router_name.split(".") if part.isdigit())
