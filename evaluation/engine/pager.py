"""The paged experts function: what transformers calls in place of its own, so that expert weights come from slots.

It computes what `transformers.integrations.moe.grouped_mm_experts_forward` (5.23) computes, in the same order and on
matrices of the same shape, because the last bits depend on both: rows sorted by expert id, one product per expert over
all its rows, the activation over the whole matrix (its vectorised part ends where the whole matrix says, not where a
group of experts does), then the sum over a token's experts in routing order.
Axes: T tokens, K chosen, R = T K rows, H hidden, J = 2 x intermediate (gate, then up).
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from configs.load import UserError
from evaluation.engine.accounting import DECODE, PREFILL, ReadCounts
from evaluation.engine.cache import ExpertCache, Service, event_order
from evaluation.engine.policies import Key
from evaluation.engine.route_trace import TraceRecorder
from evaluation.engine.slot_memory import SlotMemory
from evaluation.engine.store import ROLES, ExpertStore

IMPLEMENTATION = "remoe_paged"


class Pager:
    """Serves the calls of all MoE layers of one model: looks up, reads what is missing, computes.

    Args:
        layer_ids: the checkpoint's number of each MoE layer, by position.
        recorder: where the routing goes, if it is recorded.
    """

    def __init__(
        self,
        store: ExpertStore,
        cache: ExpertCache,
        *,
        memory: SlotMemory,
        layer_ids: list[int],
        recorder: TraceRecorder | None,
    ) -> None:
        self._store, self._cache, self._memory = store, cache, memory
        self._layer_ids, self._recorder = layer_ids, recorder
        self._phase: int | None = None
        self.reads = ReadCounts()

    def begin_call(self, *, rows: int, is_decode: bool) -> None:
        """A forward call of the model starts: `rows` token rows, one per sequence if it is a decode call."""
        self._phase = DECODE if is_decode else PREFILL
        self.reads.tokens[self._phase] += rows
        if self._recorder is not None:
            self._recorder.begin_call(self._phase)

    def forward(
        self,
        experts: nn.Module,
        layer: int,
        *,
        hidden_TH: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
    ) -> torch.Tensor:
        """Output TH of the experts of `layer` (position among the MoE layers).

        Raises:
            UserError: gradients are asked for, or an expert cannot be read.
        """
        assert self._phase is not None, "experts were called outside a call of the model that `load` returned"
        if torch.is_grad_enabled() and hidden_TH.requires_grad:
            raise UserError(
                "a paged model computes no gradients; call it under torch.no_grad() or torch.inference_mode()"
            )
        ranked_TK = _heaviest_first(expert_ids_TK, weights_TK)
        if self._recorder is not None:
            self._recorder.add_layer(ranked_TK)
        event = [(layer, expert) for expert in event_order(ranked_TK)]
        rows = _Rows.of(expert_ids_TK)
        hidden_RH = hidden_TH[rows.order_R // expert_ids_TK.shape[1]].to(self._memory.dtype)
        try:
            work = _Work(experts, self._memory, rows, hidden_RH)
            out_RH = self._compute(work, self._cache.serve(layer, event, phase=self._phase))
        except BaseException:
            self._cache.reset()  # slots may lack what the cache believes is in them
            raise
        return _combine(out_RH, rows.order_R, weights_TK).to(hidden_TH.dtype)

    def _compute(self, work: "_Work", service: Service) -> torch.Tensor:
        """Output of every row, whatever order the experts come in."""
        if service.leaving:  # done with first: what comes is read into their slots
            work.up(service.leaving)
            work.activate()
            work.down(service.leaving)
        work.up(service.staying)
        for key, slot in service.coming.items():
            self._read(key, slot)
            work.up({key: slot})
        spare = self._memory.spare_slot
        for key in service.passing:  # in two parts, so that one activation does for all of them
            self._read(key, spare, roles=("gate", "up"))
            work.up({key: spare})
        work.activate()
        work.down(service.staying | service.coming)
        for key in service.passing:
            self._read(key, spare, roles=("down",))
            work.down({key: spare})
        return work.out_RH

    def _read(self, key: Key, slot: int, *, roles: Sequence[str] = ROLES) -> None:
        assert self._phase is not None
        layer, expert = key
        start = time.perf_counter()
        read_bytes = self._memory.fill(slot, self._store, self._layer_ids[layer], expert, roles=roles)
        self.reads.bytes_read[self._phase] += read_bytes
        self.reads.stall_seconds[self._phase] += time.perf_counter() - start


class _Work:
    """The products of one event; the activation runs over the matrix of all rows, see above."""

    def __init__(self, experts: nn.Module, memory: SlotMemory, rows: "_Rows", hidden_RH: torch.Tensor) -> None:
        self._activation: Any = experts._apply_gate
        self._memory, self._rows, self._hidden_RH = memory, rows, hidden_RH
        self._gate_up_RJ = hidden_RH.new_zeros(len(hidden_RH), memory.gate_up_columns)
        self.out_RH = torch.empty_like(hidden_RH)

    def up(self, placed: Mapping[Key, int]) -> None:
        """Gate and up projection of the rows of these experts, which lie in these slots."""
        for (_, expert), slot in placed.items():
            part = self._rows.of_expert[expert]
            torch.mm(self._hidden_RH[part], self._memory.gate_up_JH(slot).T, out=self._gate_up_RJ[part])

    def activate(self) -> None:
        self._activated_RI = self._activation(self._gate_up_RJ)

    def down(self, placed: Mapping[Key, int]) -> None:
        """Down projection, after `up` and `activate`."""
        for (_, expert), slot in placed.items():
            part = self._rows.of_expert[expert]
            torch.mm(self._activated_RI[part], self._memory.down_HI(slot).T, out=self.out_RH[part])


@dataclass(frozen=True)
class PagedLayer:
    """What an experts module carries instead of weights."""

    pager: Pager
    layer: int


def attach(experts: nn.Module, paged: PagedLayer) -> None:
    """Let `experts` be served by a pager, once the model's experts implementation is `IMPLEMENTATION`."""
    experts.paged = paged  # type: ignore[assignment]


def register() -> None:
    """Make `IMPLEMENTATION` known to transformers; doing it again changes nothing."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, paged_experts_forward)


def paged_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The function in transformers' experts interface; the arguments have its names."""
    paged = self.paged
    assert isinstance(paged, PagedLayer), "only modules that `attach` was called on are paged"
    return paged.pager.forward(
        self, paged.layer, hidden_TH=hidden_states, expert_ids_TK=top_k_index, weights_TK=top_k_weights
    )


@dataclass(frozen=True)
class _Rows:
    """Token-expert pairs sorted by expert id, as the resident implementation sorts them."""

    order_R: torch.Tensor  # sorted position -> pair
    of_expert: dict[int, slice]  # sorted positions of each expert

    @classmethod
    def of(cls, expert_ids_TK: torch.Tensor) -> "_Rows":
        sorted_ids_R, order_R = torch.sort(expert_ids_TK.reshape(-1))
        ids, starts = np.unique(sorted_ids_R.numpy(), return_index=True)
        ends = [*starts[1:].tolist(), len(order_R)]
        return cls(order_R, {e: slice(a, b) for e, a, b in zip(ids.tolist(), starts.tolist(), ends, strict=True)})


def _heaviest_first(expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> npt.NDArray[np.integer]:
    """Expert ids by descending router weight; equal weights keep the router's order."""
    order_TK = np.argsort(-weights_TK.detach().float().numpy(), axis=1, kind="stable")
    return np.take_along_axis(expert_ids_TK.numpy(), order_TK, axis=1)


def _combine(out_RH: torch.Tensor, order_R: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """Weight the rows, put them back into routing order and add up each token's."""
    weighted_RH = out_RH * weights_TK.reshape(-1)[order_R].unsqueeze(-1)
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(len(order_R))
    return weighted_RH[inverse_R].view(*weights_TK.shape, -1).sum(dim=1)
