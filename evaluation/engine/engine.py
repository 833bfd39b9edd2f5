"""The engine: the paging side of a loaded model. `loading.py` makes it; `pager.py` does the work."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from configs.load import UserError
from evaluation.engine.cache.counts import CacheCounts
from evaluation.engine.cache.pool import ExpertCache
from evaluation.engine.cache.trace import RouteTrace, TraceRecorder
from evaluation.engine.cache_prior import CachePrior, attach_cache_prior
from evaluation.engine.device import CPU
from evaluation.engine.memory.demand import Demand
from evaluation.engine.memory.division import Division, passing_slots
from evaluation.engine.memory.prefix_cache import PrefixCache
from evaluation.engine.pager import IMPLEMENTATION, PagedLayer, Pager, attach, register
from evaluation.engine.prefetch import SLOTS_PER_GUESS, Prefetch
from evaluation.engine.resident import experts_modules
from evaluation.engine.slot_memory import SlotMemory
from evaluation.engine.stats import EngineStats, ReadCounts, engine_stats
from evaluation.engine.store.experts import ExpertStore
from evaluation.engine.store.reader import Reader
from training.model.routers import find_routers


class Engine:
    """The paging side of a loaded model: its size, its counters, its cache.

    Attributes:
        demand: layers, experts, top_k and the bytes of a slot.
        dtype: the precision that is computed in.
        cache: slots and who is in them.
        is_exact: whether outputs are those of the resident model; False with a cache prior.
        division: what a memory budget is divided into; None if only experts have one.
        kept: keys and values of earlier prompts, which share the budget with the experts; None if none are kept.
    """

    def __init__(
        self,
        store: ExpertStore,
        cache: ExpertCache,
        *,
        demand: Demand,
        dtype: torch.dtype,
        division: Division | None = None,
    ) -> None:
        self.demand, self.dtype, self.cache, self.division = demand, dtype, cache, division
        self._store = store
        self.is_exact = True
        self.kept: PrefixCache | None = None
        self._call = {"batch": 1, "rows": 1, "context_tokens": 1}
        self._recorder: TraceRecorder | None = None
        self._pager: Pager | None = None
        self._reader: Reader | None = None

    @property
    def pool_bytes(self) -> int:
        """Memory of all slots."""
        return self.cache.total_slots * self.demand.slot_bytes

    @property
    def token_demand_bytes(self) -> int:
        """Slot memory of all experts that one token uses in all layers."""
        return self.demand.token_experts * self.demand.slot_bytes

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert on disk: what a miss reads."""
        return self._store.shape.expert_bytes

    @property
    def buffer_bytes(self) -> int:
        """Memory for experts on top of the pool: the slots of those that do not stay."""
        return self._memory.passing_bytes

    def attach(self, model: PreTrainedModel, reader: Reader, *, record_trace: bool, prefetch: int = 0) -> None:
        """Page the experts of `model`; called once, by `load`. `prefetch`: so many of a layer read ahead."""
        self._reader = reader
        modules = experts_modules(model, self._store)
        layer_ids = [layer for layer, _ in modules]
        assert len(layer_ids) == self.demand.layers, f"experts in layers {layer_ids}, {self.demand.layers} were planned"
        self._layer_ids = tuple(layer_ids)
        self._recorder = TraceRecorder(len(layer_ids)) if record_trace else None
        slots = self.cache.total_slots
        passing = passing_slots(slots, reader.reads_in_flight)
        self._memory = SlotMemory(
            self._store, slots, self.dtype, passing=passing, ahead=SLOTS_PER_GUESS * prefetch, device=model.device
        )
        if self.division is not None:  # kernels are counted and few are kept; trying would leave hundreds otherwise
            self._memory.fill_rows()
        pager = self._pager = Pager(
            self.cache, memory=self._memory, reader=reader, layer_ids=layer_ids, recorder=self._recorder
        )
        if prefetch:
            pager.prefetch = Prefetch(
                list(find_routers(model).values()), self._memory, reader, experts=prefetch, layer_ids=layer_ids,
                resident=self.cache.resident_experts, counts=lambda: pager.reads,
            )  # fmt: skip
        for position, (_, experts) in enumerate(modules):
            attach(experts, PagedLayer(self._pager, position))
        register()
        model.set_experts_implementation(IMPLEMENTATION)
        if model.device.type != CPU.type:  # what `generate` (5.23) does to `grouped_mm` there, it shall do to us
            model._optimize_model_for_decode = self._pager.batched_products  # type: ignore[assignment]
        model.base_model.register_forward_pre_hook(self._begin_call, with_kwargs=True)
        model.base_model.register_forward_hook(self._end_call)

    def changed_shards(self) -> list[Path]:
        """Files of the checkpoint that were changed in place since loading; whatever needs them fails."""
        assert self._reader is not None, "shards of an engine that serves no model"
        return self._reader.changed_shards()

    def keep_prefixes(self, capacity_bytes: int) -> PrefixCache:
        """Keep keys and values of prompts, at most so many bytes; under a memory budget experts give way to them."""
        self.kept = PrefixCache(capacity_bytes, make_room=self._room_for_kept)
        return self.kept

    def prefer_residents(self, model: PreTrainedModel, prior: CachePrior) -> None:
        """Route with a cache prior from now on: outputs are no longer those of the resident model."""
        pager = self._pager
        assert pager is not None, "a prior for an engine that serves no model"
        attach_cache_prior(model, prior, resident=self.cache.resident_experts, is_decode=lambda: pager.is_decode)
        self.is_exact = False

    def stats(self) -> EngineStats:
        """Counters since `load` or the last `reset_stats`."""
        assert self._pager is not None, "stats of an engine that serves no model"
        return engine_stats(self.cache.counts, self._pager.reads)

    def reset_stats(self) -> None:
        """Set all counters to zero; the cache keeps its content."""
        assert self._pager is not None, "reset of an engine that serves no model"
        self.cache.counts = CacheCounts(self.cache.layers)
        self._pager.reads = ReadCounts()

    def reset_cache(self) -> None:
        """Empty the cache: what follows is a new request with a cold start, in the trace too. Counters go on."""
        self.cache.reset()
        if self._recorder is not None:
            self._recorder.begin_request()

    def trace(self) -> RouteTrace:
        """The routing of everything computed since `load`.

        Raises:
            UserError: it was not recorded, or nothing was computed yet.
        """
        if self._recorder is None:
            raise UserError("the routing was not recorded; load the model with record_trace=True")
        return self._recorder.trace(
            num_experts=self.demand.num_experts,
            layer_ids=self._layer_ids,
            expert_bytes=self.expert_bytes,
            model=str(self._store.model_dir),
        )

    def record_routing(self) -> None:
        """Record the routing from now on, if it is not recorded yet."""
        assert self._pager is not None
        if self._recorder is None:
            self._recorder = self._pager.recorder = TraceRecorder(self.cache.layers)

    def begin_request_in_trace(self) -> None:
        """What follows is another request, which finds the cache as it is."""
        if self._recorder is not None:
            self._recorder.begin_request()

    def recent_routing(self, requests: int) -> RouteTrace | None:
        """The routing of the last requests; what is older is forgotten. None if there is none."""
        assert self._recorder is not None, "record_routing comes first"
        self._recorder.keep_last(requests)
        return self.trace() if self._recorder.has_calls else None

    def _begin_call(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each forward call of the decoder: is it one more token of known sequences, or a prompt?"""
        assert self._pager is not None
        ids_BT = args[0] if args else kwargs.get("input_ids")
        batch, tokens = (kwargs["inputs_embeds"] if ids_BT is None else ids_BT).shape[:2]
        past = kwargs.get("past_key_values")
        is_decode = tokens == 1 and past is not None and past.get_seq_length() > 0
        context_tokens = tokens + (0 if past is None else past.get_seq_length())
        self._call = {"batch": batch, "rows": batch * tokens, "context_tokens": context_tokens}
        self._make_room()
        self._pager.begin_call(rows=batch * tokens, is_decode=is_decode)

    def _end_call(self, *_: Any) -> None:
        assert self._pager is not None
        self._pager.end_call()

    def _make_room(self) -> None:
        """For the running call: kept keys and values give way to it, and slots to both.

        Raises:
            ContextTooLong: that is not enough.
        """
        if self.division is None:
            return
        spare_bytes = self.division.spare_bytes(**self._call)
        if self.kept is not None:
            self.kept.shrink(spare_bytes)
            spare_bytes -= self.kept.held_bytes
        self._resize(self.division.slots_with(spare_bytes))

    def _room_for_kept(self, held_bytes: int) -> bool:
        """Let slots give way to so many bytes of kept keys and values beside the last call; False if too few are left."""
        if self.division is None:
            return True
        spare_bytes = self.division.spare_bytes(**self._call) - held_bytes
        if spare_bytes >= 0:
            self._resize(self.division.slots_with(spare_bytes))
        return spare_bytes >= 0

    def _resize(self, slots: int) -> None:
        """Give slots to a growing KV cache, or take back what a finished request leaves."""
        for slot in self.cache.resize(slots):
            self._memory.release(slot)
