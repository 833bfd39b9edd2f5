"""The paged experts function: what transformers calls in place of its own, so that expert weights come from slots.

What is resident is computed while the rest is read, and each expert as it lands; `products.py` says how, bit for bit.
Axes: T tokens, K chosen, H hidden.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from configs.load import UserError
from evaluation.engine.cache.counts import DECODE, PREFILL
from evaluation.engine.cache.pool import ExpertCache, Service, event_order
from evaluation.engine.cache.trace import TraceRecorder
from evaluation.engine.flight import Flight
from evaluation.engine.prefetch import Prefetch
from evaluation.engine.products import BatchedProducts, GroupedProducts, Products
from evaluation.engine.slot_memory import SlotMemory
from evaluation.engine.stats import ReadCounts
from evaluation.engine.store.reader import Reader

IMPLEMENTATION = "remoe_paged"


@dataclass(eq=False)
class Pager:
    """Serves the calls of all MoE layers of one model: looks up, reads what is missing, computes."""

    cache: ExpertCache
    memory: SlotMemory
    reader: Reader
    layer_ids: Sequence[int]  # the checkpoint's number of each MoE layer, by position
    reads: ReadCounts
    recorder: TraceRecorder | None  # where the routing goes, if it is recorded
    prefetch: Prefetch | None  # reads ahead, if that is asked for
    _batched: bool = False
    _phase: int | None = None
    _began_seconds: float = 0.0
    _read_seconds: float = 0.0

    def begin_call(self, *, rows: int, is_decode: bool) -> None:
        """A forward call of the model starts: `rows` token rows, one per sequence if it is a decode call."""
        self._phase = DECODE if is_decode else PREFILL
        self.reads.tokens[self._phase] += rows
        if self.recorder is not None:
            self.recorder.begin_call(self._phase)
        self._began_seconds, self._read_seconds = time.perf_counter(), self.reader.clock.seconds()

    def end_call(self) -> None:
        """The call is over."""
        assert self._phase is not None
        self.reads.seconds[self._phase] += time.perf_counter() - self._began_seconds
        self.reads.reading_seconds[self._phase] += self.reader.clock.seconds() - self._read_seconds
        if self.prefetch is not None and self.is_decode:
            self.prefetch.call_done()

    @contextmanager
    def batched_products(self) -> Iterator[None]:
        """Inside, what the resident model computes with batched products is computed so; see `products.py`."""
        self._batched = True
        try:
            yield
        finally:
            self._batched = False

    @property
    def is_decode(self) -> bool:
        """Whether the running call is one more token of known sequences."""
        return self._phase == DECODE

    def forward(
        self, experts: nn.Module, layer: int, *, hidden_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor
    ) -> Tensor:
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
        kind = BatchedProducts if self._batched else GroupedProducts
        products = kind(experts, self.memory, hidden_TH, expert_ids_TK)
        try:
            service = self.cache.serve(layer, event, phase=self._phase)
            prefetch = self.prefetch if self.is_decode else None
            with Flight(self.memory, self.reader, layer_id=self.layer_ids[layer], prefetch=prefetch) as flight:
                guess = partial(prefetch.guess, layer, hidden_TH) if prefetch else None
                if isinstance(products, GroupedProducts) and not products.rows_are_independent():
                    _compute_in_two_parts(products, service, flight, guess)
                else:
                    _compute(products, service, flight, guess)
        except BaseException:
            self.cache.reset()  # slots may lack what the cache believes is in them
            raise
        self._count(flight)
        return products.combined(weights_TK).to(hidden_TH.dtype)

    def _count(self, flight: Flight) -> None:
        assert self._phase is not None
        self.reads.bytes_read[self._phase] += flight.bytes_read
        self.reads.device_bytes_read[self._phase] += flight.device_bytes
        self.reads.stall_seconds[self._phase] += flight.stall_seconds


def _compute(products: Products, service: Service, flight: Flight, guess: Callable[[], None] | None) -> None:
    """Everything that is missing is on its way while what is resident is computed; each is used as it lands."""
    taken = {slot: key for key, slot in service.coming.items() if slot in service.leaving.values()}
    flight.start({key: slot for key, slot in service.coming.items() if slot not in taken})
    flight.start(dict.fromkeys(service.passing))
    if guess:
        guess()
    for key, slot in service.leaving.items():
        products.whole({key: slot})
        if slot in taken:
            flight.start({taken[slot]: slot})
    products.whole(service.staying)
    for landed in flight.landings():
        products.whole(landed)


def _compute_in_two_parts(
    products: GroupedProducts, service: Service, flight: Flight, guess: Callable[[], None] | None
) -> None:
    """Do the same with one activation over all rows: what passes through is read in two parts, before and after it."""
    if service.leaving:  # done with first: what comes is read into their slots
        products.up(service.leaving)
        products.activate()
        products.down(service.leaving)
    flight.start(service.coming)
    flight.start(dict.fromkeys(service.passing), matrix="gate_up")
    if guess:
        guess()
    products.up(service.staying)
    for landed in flight.landings():
        products.up(landed)
    products.activate()
    flight.start(dict.fromkeys(service.passing), matrix="down")
    products.down(service.staying | service.coming)
    for landed in flight.landings():
        products.down(landed)


@dataclass(frozen=True)
class PagedLayer:
    """What an experts module carries instead of weights, as `paged`."""

    pager: Pager
    layer: int


def paged_experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The function in transformers' experts interface; the arguments have its names."""
    paged = self.paged
    assert isinstance(paged, PagedLayer), "only experts of a model that `load` returned are paged"
    return paged.pager.forward(
        self, paged.layer, hidden_TH=hidden_states, expert_ids_TK=top_k_index, weights_TK=top_k_weights
    )


def _heaviest_first(expert_ids_TK: Tensor, weights_TK: Tensor) -> npt.NDArray[np.integer]:
    """Expert ids by descending router weight; equal weights keep the router's order."""
    order_TK = np.argsort(-weights_TK.detach().float().cpu().numpy(), axis=1, kind="stable")
    return expert_ids_TK.cpu().numpy()[np.arange(len(order_TK))[:, None], order_TK]
