"""The routing trace: which experts every token chose in every layer, without weights.

In a teacher-forced trace every token is its own call and its phase is decode. No torch here, so that a replay starts at
once; files: `trace_formats.py`. Axes: T tokens, L MoE layers, K experts chosen.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.load import UserError

TENSORS = ("expert_ids", "phase", "request_id", "call")
TOGETHER = 1024  # tokens checked in one go
MOST_EXPERTS = 2**15  # of a layer: counts are kept for each, and one wild number would ask for terabytes


@dataclass(frozen=True, eq=False)
class RouteTrace:
    """A checked trace.

    Raises:
        UserError: empty, axes that do not fit together, ids out of range or repeated, calls or requests that are not
            contiguous.
    """

    expert_ids: npt.NDArray[np.integer]  # TLK, heaviest router weight first
    phase: npt.NDArray[np.integer]  # T: a position in `PHASES`
    request_id: npt.NDArray[np.integer]  # T
    call: npt.NDArray[np.integer]  # T: the forward call a token was in; its tokens reach a layer as one event
    num_experts: int
    layer_ids: tuple[int, ...]  # of the MoE layers, as the checkpoint numbers them
    expert_bytes: int | None = None  # of one expert on disk
    model: str = ""

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise UserError(f"routing trace: {problem}")

    @property
    def tokens(self) -> int:
        return len(self.expert_ids)

    @property
    def layers(self) -> int:
        return self.expert_ids.shape[1]

    @property
    def top_k(self) -> int:
        return self.expert_ids.shape[2]

    @property
    def expert_uses(self) -> npt.NDArray[np.int64]:
        """[layer, expert]: how many tokens chose it."""
        uses_LE = np.zeros((self.layers, self.num_experts), np.int64)
        for layer in range(self.layers):
            uses_LE[layer] = np.bincount(self.expert_ids[:, layer].ravel(), minlength=self.num_experts)
        return uses_LE

    def where(self, kept_T: npt.NDArray[np.bool_]) -> "RouteTrace":
        """The tokens for which `kept_T` is true, their calls and requests as they are numbered here."""
        return replace(self, **{name: getattr(self, name)[kept_T] for name in TENSORS})

    def as_one_request(self) -> "RouteTrace":
        """The same tokens with a cache that is not emptied between requests."""
        return replace(self, request_id=np.zeros_like(self.request_id))


def _problem(trace: RouteTrace) -> str | None:
    ids, tokens = trace.expert_ids, len(trace.expert_ids)
    if ids.ndim != 3:
        return f"expert_ids must be [tokens, layers, top_k], found shape {list(ids.shape)}"
    if 0 in ids.shape:
        return f"it is empty: expert_ids has shape {list(ids.shape)}"
    for name in TENSORS:
        if not np.issubdtype(getattr(trace, name).dtype, np.integer):
            return f"{name} must hold integers, found {getattr(trace, name).dtype}"
    for name in ("phase", "request_id", "call"):
        if getattr(trace, name).shape != (tokens,):
            return f"{name} has shape {list(getattr(trace, name).shape)}, expert_ids has {tokens} tokens"
    if trace.num_experts > MOST_EXPERTS:
        return f"there would be {trace.num_experts} experts in a layer, more than any model has: that is no expert's number"
    if trace.expert_bytes is not None and trace.expert_bytes <= 0:
        return f"an expert of {trace.expert_bytes} bytes"
    if len(trace.layer_ids) != ids.shape[1]:
        return f"{len(trace.layer_ids)} layer ids for {ids.shape[1]} layers"
    if ids.min() < 0 or ids.max() >= trace.num_experts:
        return f"expert ids from {ids.min()} to {ids.max()}, but there are {trace.num_experts} experts"
    token = _first_with_repeats(ids)
    if token is not None:
        return f"token {token} chose an expert twice in one layer; the experts of a token in a layer must be distinct"
    if trace.phase.min() < 0 or trace.phase.max() > 1:
        return "phase holds values other than 0 (prefill) and 1 (decode)"
    return _order_problem(trace)


def _first_with_repeats(ids_TLK: npt.NDArray[np.integer]) -> int | None:
    for start in range(0, len(ids_TLK), TOGETHER):
        sorted_TLK = np.sort(ids_TLK[start : start + TOGETHER], axis=2)
        repeats_T = (sorted_TLK[..., 1:] == sorted_TLK[..., :-1]).any(axis=(1, 2))
        if repeats_T.any():
            return start + int(repeats_T.argmax())
    return None


def _order_problem(trace: RouteTrace) -> str | None:
    if (np.diff(trace.call.astype(np.int64)) < 0).any():
        return "call goes down: tokens must be in the order they were computed"
    same_call = trace.call[1:] == trace.call[:-1]
    for name in ("phase", "request_id"):
        values = getattr(trace, name)
        if (same_call & (values[1:] != values[:-1])).any():
            return f"tokens of one call differ in {name}"
    starts = np.flatnonzero(np.r_[True, trace.request_id[1:] != trace.request_id[:-1]])
    if len(np.unique(trace.request_id[starts])) != len(starts):
        return "a request comes back after another one began: keep the tokens of a request together"
    return None


class TraceRecorder:
    """Collects the routing of a live engine, call by call; `trace` makes a `RouteTrace` of what is complete."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._calls: list[tuple[int, int, npt.NDArray[np.integer]]] = []  # request, phase, ids TLK
        self._request, self._phase = 0, 0
        self._pending: list[npt.NDArray[np.integer]] = []  # ids TK of the layers of the running call

    def begin_request(self) -> None:
        """What follows belongs to a new request."""
        if self._calls and self._calls[-1][0] == self._request:
            self._request += 1

    def keep_last(self, requests: int) -> bool:
        """Forget all calls but those of the last requests, this many; return whether there are any."""
        kept = sorted({request for request, _, _ in self._calls})[-requests:]
        self._calls = [call for call in self._calls if kept and call[0] >= kept[0]]
        return bool(kept)

    def begin_call(self, phase: int) -> None:
        """A forward call starts; one that did not reach its last layer is dropped."""
        self._phase, self._pending = phase, []

    def add_layer(self, expert_ids_TK: npt.NDArray[np.integer]) -> None:
        """The next MoE layer's choices, heaviest router weight first."""
        self._pending.append(expert_ids_TK.astype(np.int16))
        if len(self._pending) == self._layers:
            self._calls.append((self._request, self._phase, np.stack(self._pending, axis=1)))
            self._pending = []

    def trace(self, **facts: Any) -> RouteTrace:
        """Everything recorded so far, with the other fields of `RouteTrace`; `UserError` if that is nothing."""
        if not self._calls:
            raise UserError("nothing was recorded yet: generate something before asking for the routing trace")
        lengths = [len(ids_TLK) for _, _, ids_TLK in self._calls]
        return RouteTrace(
            expert_ids=np.concatenate([ids_TLK for _, _, ids_TLK in self._calls]),
            phase=np.repeat([phase for _, phase, _ in self._calls], lengths),
            request_id=np.repeat([request for request, _, _ in self._calls], lengths),
            call=np.repeat(np.arange(len(self._calls)), lengths),
            **facts,
        )
