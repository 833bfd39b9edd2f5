"""The engine: the paging side of a loaded model. `loading.py` makes it; `pager.py` does the work."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel

from configs.load import UserError
from evaluation.engine.cache.counts import DECODE, CacheCounts
from evaluation.engine.cache.pool import ExpertCache
from evaluation.engine.cache.trace import RouteTrace, TraceRecorder
from evaluation.engine.device import Device
from evaluation.engine.levers.attach import attach
from evaluation.engine.levers.spec import levers_of
from evaluation.engine.memory.demand import Demand
from evaluation.engine.memory.division import Call, ContextTooLong, Division, passing_slots
from evaluation.engine.memory.prefix_cache import PrefixCache
from evaluation.engine.options import AUTO, PACKED, EngineOptions
from evaluation.engine.pager import IMPLEMENTATION, PagedLayer, Pager, paged_experts_forward
from evaluation.engine.prefetch import SLOTS_PER_GUESS, Prefetch, experts_ahead
from evaluation.engine.resident import experts_modules
from evaluation.engine.slot_kind import READY, STORED
from evaluation.engine.slot_memory import SlotMemory
from evaluation.engine.stats import EngineStats, ReadCounts, engine_stats
from evaluation.engine.store.bandwidth import calibrated, is_worth_it
from evaluation.engine.store.experts import ExpertStore
from evaluation.engine.store.reader import Reader
from training.model.routers import ask_routers, find_routers
from training.model.transformers_internals import ALL_EXPERTS_FUNCTIONS


class Engine:
    """The paging side of a loaded model: its size, its counters, its cache.

    Attributes:
        demand: layers, experts, top_k and the bytes of a slot.
        dtype: the precision that is computed in.
        options: what the user decided.
        cache: slots and who is in them.
        is_exact: whether outputs are those of the resident model; False with a lever or packed products.
        slot_kind: what slots hold of an expert, `stored` or `ready`.
        experts_ahead: how many of the next layer are read ahead, at most.
        division: what a memory budget is divided into; None if only experts have one.
        kept: keys and values of earlier prompts, which share the budget with the experts; None if none are kept.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        options: EngineOptions,
        *,
        store: ExpertStore,
        reader: Reader,
        cache: ExpertCache,
        demand: Demand,
        device: Device,
        division: Division | None,
        slot_kind: str = READY,
    ) -> None:
        self.demand, self.dtype, self.cache, self.division = demand, model.dtype, cache, division
        self.options, self.is_exact = options, options.changes is None
        self.slot_kind = slot_kind
        self.kept: PrefixCache | None = None
        self._store, self._reader, self._call = store, reader, Call()
        has_all_routers = len(find_routers(model)) == demand.layers
        if not has_all_routers and (options.prefetch not in (0, AUTO) or options.lever is not None):
            _refuse_without_routers(len(find_routers(model)), demand.layers)
        modules = experts_modules(model, store.layer_ids, transposed=store.format.transposed)
        self._layer_ids = tuple(layer for layer, _ in modules)
        assert len(modules) == demand.layers, f"experts in layers {self._layer_ids}, {demand.layers} were planned"
        passing = passing_slots(cache.total_slots, reader.reads_in_flight)
        pools = 1 if options.cache_scope == "global" else demand.layers
        ahead = experts_ahead(options.prefetch, cache.total_slots, pools=pools, top_k=demand.top_k)
        self.experts_ahead = ahead if has_all_routers else 0
        self._memory = SlotMemory(
            store,
            cache.total_slots,
            model.dtype,
            passing=passing,
            ahead=SLOTS_PER_GUESS * self.experts_ahead,
            device=device,
            as_stored=slot_kind == STORED,
            multiplies_packed=options.products == PACKED,
        )
        if division is not None:  # kernels are counted and few are kept; trying would leave hundreds otherwise
            self._memory.fill_rows()
        self._reads = ReadCounts()
        recorder = TraceRecorder(demand.layers) if options.record_trace else None
        prefetch = self._prefetch(model) if self.experts_ahead else None
        self._pager = Pager(cache, self._memory, reader, self._layer_ids, self._reads, recorder, prefetch)
        self._page(model, [experts for _, experts in modules])
        if options.lever is not None:
            how: Any = {"is_decode": lambda: self._pager.is_decode, "counts": self._reads}
            attach(model, levers_of(options.lever), resident=self._resident, **how)

    def _resident(self, layer: int, experts: int) -> npt.NDArray[np.bool_]:
        """[1, E]: which experts of a layer are in a slot now."""
        return self.cache.holds(layer, experts)[None]

    def _prefetch(self, model: PreTrainedModel) -> Prefetch:
        routers, resident = list(ask_routers(model).values()), self.cache.resident_experts
        numbers: dict[str, Any] = {"experts": self.experts_ahead, "layer_ids": self._layer_ids, "counts": self._reads}
        if self.options.prefetch == AUTO:
            numbers["misses"] = lambda: self.cache.counts.total(DECODE).misses
        return Prefetch(routers, self._memory, self._reader, resident=resident, **numbers)

    def _page(self, model: PreTrainedModel, experts_modules: Sequence[nn.Module]) -> None:
        """Let `model` compute its experts through the pager, and tell of every call before and after it."""
        for position, experts in enumerate(experts_modules):
            experts.paged = PagedLayer(self._pager, position)  # type: ignore[assignment]
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, paged_experts_forward)
        model.set_experts_implementation(IMPLEMENTATION)
        if self._memory.device.decodes_in_batches:  # what `generate` does to `grouped_mm` there, it shall do to us
            model._optimize_model_for_decode = self._pager.batched_products  # type: ignore[assignment]
        model.base_model.register_forward_pre_hook(self._begin_call, with_kwargs=True)
        model.base_model.register_forward_hook(lambda *_: self._pager.end_call())

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
        return self._store.format.expert_bytes

    @property
    def buffer_bytes(self) -> int:
        """Memory for experts on top of the pool: the slots of those that do not stay."""
        return self._memory.passing_bytes

    @property
    def bytes_per_second(self) -> float | None:
        """How fast the checkpoint's device was read when it was measured; None for one too small to be worth that."""
        return calibrated(self._store.shards).bytes_per_second if is_worth_it(self._store.shards) else None

    def has_room(self, call: Call) -> bool:
        """Whether a memory budget allows such a call; if experts alone have a budget, any call."""
        try:
            return self.division is None or self.division.spare_bytes(call) >= 0
        except ContextTooLong:
            return False

    def changed_shards(self) -> list[Path]:
        """Files of the checkpoint that were changed in place since loading; whatever needs them fails."""
        return self._reader.changed_shards()

    def keep_prefixes(self, capacity_bytes: int) -> PrefixCache:
        """Keep keys and values of prompts, at most this many bytes; under a memory budget experts give way to them."""
        self.kept = PrefixCache(capacity_bytes, make_room=self._room_for_kept)
        return self.kept

    def stats(self) -> EngineStats:
        """Counters since `load` or the last `reset_stats`."""
        return engine_stats(self.cache.counts, self._reads)

    def reset_stats(self) -> None:
        """Set all counters to zero; the cache keeps its content."""
        self.cache.counts = CacheCounts(self.cache.layers)
        self._reads.clear()

    def reset_cache(self) -> None:
        """Empty the cache: what follows is a new request with a cold start, in the trace too. Counters go on."""
        self.cache.reset()
        self.begin_request_in_trace()

    def trace(self) -> RouteTrace:
        """The routing of everything computed since `load`, or `UserError` if nothing was computed or recorded."""
        recorder = self._pager.recorder
        if recorder is None:
            raise UserError("the routing was not recorded; load the model with record_trace=True")
        facts = {"expert_bytes": self.expert_bytes, "model": str(self._store.model_dir)}
        return recorder.trace(num_experts=self.demand.num_experts, layer_ids=self._layer_ids, **facts)

    def record_routing(self) -> None:
        """Record the routing from now on, if it is not recorded yet."""
        if self._pager.recorder is None:
            self._pager.recorder = TraceRecorder(self.cache.layers)

    def begin_request_in_trace(self) -> None:
        """What follows is another request, which finds the cache as it is."""
        if self._pager.recorder is not None:
            self._pager.recorder.begin_request()

    def recent_routing(self, requests: int) -> RouteTrace | None:
        """The routing of the last requests; what is older is forgotten. None if there is none."""
        recorder = self._pager.recorder
        assert recorder is not None, "record_routing comes first"
        return self.trace() if recorder.keep_last(requests) else None

    def _begin_call(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each forward call of the decoder: is it one more token of known sequences, or a prompt?"""
        ids_BT = args[0] if args else kwargs.get("input_ids")
        batch, tokens = (kwargs["inputs_embeds"] if ids_BT is None else ids_BT).shape[:2]
        past = kwargs.get("past_key_values")
        is_decode = tokens == 1 and past is not None and past.get_seq_length() > 0
        context_tokens = tokens + (0 if past is None else past.get_seq_length())
        self._call = Call(batch, batch * tokens, context_tokens, keeps=kwargs.get("use_cache") is not False)
        self._make_room()
        self._pager.begin_call(rows=batch * tokens, is_decode=is_decode)

    def _make_room(self) -> None:
        """For the running call: kept keys and values give way to it, and slots to both, or `ContextTooLong` is raised."""
        if self.division is None:
            return
        spare_bytes = self.division.spare_bytes(self._call)
        if self.kept is not None:
            self.kept.shrink(spare_bytes)
            spare_bytes -= self.kept.held_bytes
        self._resize(self.division.slots_with(spare_bytes))

    def _room_for_kept(self, held_bytes: int) -> bool:
        """Let slots give way to this many bytes of kept keys and values beside the last call; False if too few slots are left."""
        if self.division is None:
            return True
        spare_bytes = self.division.spare_bytes(self._call) - held_bytes
        if spare_bytes >= 0:
            self._resize(self.division.slots_with(spare_bytes))
        return spare_bytes >= 0

    def _resize(self, slots: int) -> None:
        """Give slots to a growing KV cache, or take back what a finished request leaves."""
        for slot in self.cache.resize(slots):
            self._memory.release(slot)


def _refuse_without_routers(found: int, layers: int) -> None:
    """What asks the router of a layer by its place, if some layers choose experts in another way."""
    raise UserError(
        f"{found} of {layers} layers with experts have a router that is known (others choose by token ids, as "
        "DeepSeek-V4's first layers do): --prefetch and --lever cannot tell whose it is; leave them out"
    )
