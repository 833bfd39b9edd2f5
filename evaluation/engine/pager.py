"""The paged experts function: what transformers calls in place of its own, so that expert weights come from slots.

It computes what `transformers.integrations.moe.grouped_mm_experts_forward` (5.23) computes, in the same order and on
matrices of the same shape, because the last bits depend on both: rows sorted by expert id, one product per expert over
all its rows, then the sum over a token's experts in routing order. Experts are computed in whatever order they land.
Axes: T tokens, K chosen, R = T K rows, H hidden, J = 2 x intermediate (gate, then up).
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from configs.load import UserError
from evaluation.engine.accounting import DECODE, PREFILL, ReadCounts
from evaluation.engine.cache import ExpertCache, Service, event_order
from evaluation.engine.device import CPU
from evaluation.engine.flight import Flight
from evaluation.engine.policies import Key
from evaluation.engine.prefetch import Prefetch
from evaluation.engine.reader import Reader
from evaluation.engine.route_trace import TraceRecorder
from evaluation.engine.slot_memory import SlotMemory

IMPLEMENTATION = "remoe_paged"
VECTOR = 64
"""Numbers that torch's element-wise loops take at once: two registers of 512 bits, in 16-bit precision."""
COMBINED_TOKENS = 64
"""Tokens whose weighted rows exist at once, in the wider precision of the weights."""
THREAD_GRAIN = 32768
"""Numbers below which torch does not give an element-wise operation to several threads (at::internal::GRAIN_SIZE)."""


class Pager:
    """Serves the calls of all MoE layers of one model: looks up, reads what is missing, computes.

    Args:
        layer_ids: the checkpoint's number of each MoE layer, by position.
        recorder: where the routing goes, if it is recorded.
    """

    def __init__(
        self,
        cache: ExpertCache,
        *,
        memory: SlotMemory,
        reader: Reader,
        layer_ids: list[int],
        recorder: TraceRecorder | None,
    ) -> None:
        self.prefetch: Prefetch | None = None
        self._cache, self._memory, self._reader = cache, memory, reader
        self._layer_ids, self.recorder = layer_ids, recorder
        self._phase: int | None = None
        self._began_seconds = 0.0
        self.reads = ReadCounts()

    def begin_call(self, *, rows: int, is_decode: bool) -> None:
        """A forward call of the model starts: `rows` token rows, one per sequence if it is a decode call."""
        self._phase = DECODE if is_decode else PREFILL
        self.reads.tokens[self._phase] += rows
        if self.recorder is not None:
            self.recorder.begin_call(self._phase)
        self._began_seconds = time.perf_counter()

    def end_call(self) -> None:
        """The call is over."""
        assert self._phase is not None
        self.reads.seconds[self._phase] += time.perf_counter() - self._began_seconds

    @property
    def is_decode(self) -> bool:
        """Whether the running call is one more token of known sequences."""
        return self._phase == DECODE

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
        if self.recorder is not None:
            self.recorder.add_layer(ranked_TK)
        event = [(layer, expert) for expert in event_order(ranked_TK)]
        rows = _Rows.of(expert_ids_TK)
        hidden_RH = hidden_TH[rows.order_R // expert_ids_TK.shape[1]].to(self._memory.dtype)
        work = _Work(experts, self._memory, rows, hidden_RH)
        try:
            service = self._cache.serve(layer, event, phase=self._phase)
            prefetch = self.prefetch if self.is_decode else None
            read_ahead = prefetch.take if prefetch else None
            with Flight(self._memory, self._reader, layer_id=self._layer_ids[layer], read_ahead=read_ahead) as flight:
                guess = partial(prefetch.guess, layer, hidden_TH) if prefetch else None
                (_compute if work.rows_are_independent() else _compute_in_two_parts)(work, service, flight, guess)
        except BaseException:
            self._cache.reset()  # slots may lack what the cache believes is in them
            raise
        self._count(flight)
        return _combine(work.out_RH, rows.order_R, weights_TK).to(hidden_TH.dtype)

    def _count(self, flight: Flight) -> None:
        assert self._phase is not None
        self.reads.bytes_read[self._phase] += flight.bytes_read
        self.reads.device_bytes_read[self._phase] += flight.device_bytes
        self.reads.stall_seconds[self._phase] += flight.stall_seconds


def _compute(work: "_Work", service: Service, flight: Flight, guess: Callable[[], None] | None) -> None:
    """Everything that is missing is on its way while what is resident is computed; each is used as it lands."""
    taken = {slot: key for key, slot in service.coming.items() if slot in service.leaving.values()}
    flight.start({key: slot for key, slot in service.coming.items() if slot not in taken})
    flight.start(dict.fromkeys(service.passing))
    if guess:
        guess()
    for key, slot in service.leaving.items():
        work.whole(key, slot)
        if slot in taken:
            flight.start({taken[slot]: slot})
    for key, slot in service.staying.items():
        work.whole(key, slot)
    for key, slot in flight.landings():
        work.whole(key, slot)


def _compute_in_two_parts(work: "_Work", service: Service, flight: Flight, guess: Callable[[], None] | None) -> None:
    """The same with one activation over all rows: what passes through is read in two parts, before and after it."""
    if service.leaving:  # done with first: what comes is read into their slots
        work.up(service.leaving)
        work.activate()
        work.down(service.leaving)
    flight.start(service.coming)
    flight.start(dict.fromkeys(service.passing), roles=work.memory.roles_before_activation)
    if guess:
        guess()
    work.up(service.staying)
    for key, slot in flight.landings():
        work.up({key: slot})
    work.activate()
    flight.start(dict.fromkeys(service.passing), roles=("down",))
    work.down(service.staying | service.coming)
    for key, slot in flight.landings():
        work.down({key: slot})


class _Work:
    """The products of one event."""

    def __init__(self, experts: nn.Module, memory: SlotMemory, rows: "_Rows", hidden_RH: torch.Tensor) -> None:
        self._experts: Any = experts
        self._activation: Any = self._experts._apply_gate
        self.memory, self._rows, self._hidden_RH = memory, rows, hidden_RH
        self._gate_up_RJ = hidden_RH.new_empty(len(hidden_RH), memory.gate_up_columns)
        self.out_RH = torch.empty_like(hidden_RH)

    def rows_are_independent(self) -> bool:
        """Whether the activation gives a row the same bits alone as in the matrix of all rows.

        Its vectorised loop leaves the rest of a run of numbers to a scalar one that rounds differently (silu in fp32),
        and a run ends where the matrix or a thread's share of it does. Without such rests every row stands alone, and
        on an accelerator, which has no such loop.
        """
        if self.out_RH.device.type != CPU.type:
            return True
        columns = self.memory.gate_up_columns // 2
        counts = {len(self._hidden_RH), *(part.stop - part.start for part in self._rows.of_expert.values())}
        return all(_share_of_a_thread(rows * columns) % VECTOR == 0 for rows in counts) and columns % VECTOR == 0

    def whole(self, key: Key, slot: int) -> None:
        """Everything for the rows of this expert, which lies in this slot."""
        part = self._rows.of_expert[key[1]]
        self._up(part, key[1], slot)
        self._down(part, key[1], slot, self._activation(self._gate_up_RJ[part]))

    def up(self, placed: Mapping[Key, int]) -> None:
        """Gate and up projection of the rows of these experts, which lie in these slots."""
        for (_, expert), slot in placed.items():
            self._up(self._rows.of_expert[expert], expert, slot)

    def activate(self) -> None:
        """The activation over the matrix of all rows; rows that are not computed yet give rubbish."""
        self._activated_RI = self._activation(self._gate_up_RJ)

    def down(self, placed: Mapping[Key, int]) -> None:
        """Down projection, after `up` and `activate`."""
        for (_, expert), slot in placed.items():
            part = self._rows.of_expert[expert]
            self._down(part, expert, slot, self._activated_RI[part])

    def _up(self, part: slice, expert: int, slot: int) -> None:
        out = _product(self._hidden_RH[part], self.memory.gate_up_HJ(slot), out=self._gate_up_RJ[part])
        if self._experts.has_bias:
            out.add_(self._experts.gate_up_proj_bias[expert])

    def _down(self, part: slice, expert: int, slot: int, activated_RI: torch.Tensor) -> None:
        out = _product(activated_RI, self.memory.down_IH(slot), out=self.out_RH[part])
        self.memory.used(slot)
        if self._experts.has_bias:
            out.add_(self._experts.down_proj_bias[expert])


def _product(rows: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """`rows @ weight` into `out`, which it returns, by the kernel that the resident model's products go through."""
    if out.device.type == CPU.type:
        return torch.mm(rows, weight, out=out)
    end = torch.full((1,), len(rows), dtype=torch.int32, device=out.device)
    return out.copy_(torch.nn.functional.grouped_mm(rows, weight[None], offs=end))


def _share_of_a_thread(numbers: int) -> int:
    """How many of a matrix's numbers torch gives to one thread in an element-wise operation (ATen/Parallel.h)."""
    threads = min(torch.get_num_threads(), math.ceil(numbers / THREAD_GRAIN))
    return math.ceil(numbers / threads)


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
        ids, starts = np.unique(sorted_ids_R.cpu().numpy(), return_index=True)
        ends = [*starts[1:].tolist(), len(order_R)]
        return cls(order_R, {e: slice(a, b) for e, a, b in zip(ids.tolist(), starts.tolist(), ends, strict=True)})


def _heaviest_first(expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> npt.NDArray[np.integer]:
    """Expert ids by descending router weight; equal weights keep the router's order."""
    order_TK = np.argsort(-weights_TK.detach().float().cpu().numpy(), axis=1, kind="stable")
    return np.take_along_axis(expert_ids_TK.cpu().numpy(), order_TK, axis=1)


def _combine(out_RH: torch.Tensor, order_R: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """Weight the rows, put them back into routing order and add up each token's; some tokens after the other."""
    tokens, top_k = weights_TK.shape
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    sums = []
    for first in range(0, tokens, COMBINED_TOKENS):
        weights_tK = weights_TK[first : first + COMBINED_TOKENS]
        rows_rH = out_RH[place_R[first * top_k : (first + COMBINED_TOKENS) * top_k]]
        sums.append((rows_rH * weights_tK.reshape(-1, 1)).view(*weights_tK.shape, -1).sum(dim=1))
    return torch.cat(sums)
