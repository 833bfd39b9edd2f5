"""`load`: a stock checkpoint as a transformers model whose experts are paged, and the engine that pages them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from configs.load import UserError
from evaluation.engine.accounting import CacheCounts, EngineStats, ReadCounts, engine_stats
from evaluation.engine.bandwidth import reads_in_flight_for
from evaluation.engine.budget import Demand, parse_size, slots_for, warn_below_cliff
from evaluation.engine.cache import SCOPES, ExpertCache
from evaluation.engine.cache_prior import CachePrior, attach_cache_prior
from evaluation.engine.pager import IMPLEMENTATION, PagedLayer, Pager, attach, register
from evaluation.engine.policies import ONLINE
from evaluation.engine.reader import Reader
from evaluation.engine.resident import compute_dtype, experts_modules, load_resident, read_config
from evaluation.engine.route_trace import RouteTrace, TraceRecorder
from evaluation.engine.slot_memory import SlotMemory, record_bytes
from evaluation.engine.store import ExpertStore

PASSING_SHARE = 8
"""One slot in so many is added for experts that do not stay, so that several of them are read at once."""


class Engine:
    """The paging side of a loaded model: its size, its counters, its cache.

    Attributes:
        demand: layers, experts, top_k and the bytes of a slot.
        dtype: the precision that is computed in.
        cache: slots and who is in them.
        is_exact: whether outputs are those of the resident model; False with a cache prior.
    """

    def __init__(self, store: ExpertStore, cache: ExpertCache, *, demand: Demand, dtype: torch.dtype) -> None:
        self.demand, self.dtype, self.cache = demand, dtype, cache
        self._store = store
        self.is_exact = True
        self._recorder: TraceRecorder | None = None
        self._pager: Pager | None = None

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

    def attach(self, model: PreTrainedModel, reader: Reader, *, record_trace: bool) -> None:
        """Page the experts of `model`; called once, by `load`."""
        modules = experts_modules(model, self._store)
        layer_ids = [layer for layer, _ in modules]
        assert len(layer_ids) == self.demand.layers, f"experts in layers {layer_ids}, {self.demand.layers} were planned"
        self._layer_ids = tuple(layer_ids)
        self._recorder = TraceRecorder(len(layer_ids)) if record_trace else None
        slots = self.cache.total_slots
        passing = max(1, min(reader.reads_in_flight, slots // PASSING_SHARE))
        self._memory = SlotMemory(self._store, slots, self.dtype, passing=passing)
        self._pager = Pager(
            self.cache, memory=self._memory, reader=reader, layer_ids=layer_ids, recorder=self._recorder
        )
        for position, (_, experts) in enumerate(modules):
            attach(experts, PagedLayer(self._pager, position))
        register()
        model.set_experts_implementation(IMPLEMENTATION)
        model.base_model.register_forward_pre_hook(self._begin_call, with_kwargs=True)

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

    def _begin_call(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each forward call of the decoder: is it one more token of known sequences, or a prompt?"""
        assert self._pager is not None
        ids_BT = args[0] if args else kwargs.get("input_ids")
        batch, tokens = (kwargs["inputs_embeds"] if ids_BT is None else ids_BT).shape[:2]
        past = kwargs.get("past_key_values")
        is_decode = tokens == 1 and past is not None and past.get_seq_length() > 0
        self._pager.begin_call(rows=batch * tokens, is_decode=is_decode)


@contextmanager
def load(
    model_dir: str | Path,
    expert_cache: int | str,
    *,
    router_delta: Mapping[str, torch.Tensor] | None = None,
    cache_policy: str = "lru",
    cache_scope: str = "global",
    dtype: str | torch.dtype = "auto",
    record_trace: bool = False,
    reads_in_flight: int | None = None,
    cache_prior: CachePrior | None = None,
) -> Iterator[tuple[PreTrainedModel, Engine]]:
    """Load a checkpoint without its experts; they are read from its shards as the model asks for them.

    Args:
        model_dir: a Hugging Face folder with safetensors weights, one tensor per expert matrix.
        expert_cache: memory for experts: bytes, `2MiB`, or `25%` of all experts; `engine.buffer_bytes` come on top.
        router_delta: parameter name -> weight, copied into the routers and cast to their precision.
        cache_policy: a key of `ONLINE`: `lru`, `fifo`, `lfu`, `lfru` or `decayed`.
        cache_scope: `global` (one pool for all layers) or `per_layer` (equal pools).
        dtype: `auto` as the checkpoint's config says, or `bfloat16`, `float16`, `float32`.
        record_trace: keep the routing of every token, for `engine.trace()`.
        reads_in_flight: reading threads; None: what `bandwidth.py` found best for the device.
        cache_prior: let routers prefer resident experts while decoding; this changes what the model says.

    Yields:
        The transformers model, to be used as any other (inference only), and its engine.

    Raises:
        UserError: nothing to page, damaged shards, a cache too small for one token in one layer, unknown values.
    """
    if cache_policy not in ONLINE:
        raise UserError(f"unknown cache policy {cache_policy!r}; known: {', '.join(ONLINE)}")
    if cache_scope not in SCOPES:
        raise UserError(f"unknown cache scope {cache_scope!r}; known: {', '.join(SCOPES)}")
    if reads_in_flight is not None and reads_in_flight < 1:
        raise UserError(f"reads_in_flight is {reads_in_flight}; write at least 1, or None for what suits the device")
    config = read_config(model_dir)
    store = ExpertStore(model_dir)
    in_flight = reads_in_flight_for(store.shards) if reads_in_flight is None else reads_in_flight
    with Reader(store.shards, reads_in_flight=in_flight) as reader:
        chosen_dtype = compute_dtype(dtype, config=config, store=store)
        demand = _demand(store, config=config, dtype=chosen_dtype)
        budget_bytes = parse_size(expert_cache, whole_bytes=demand.all_experts * demand.slot_bytes)
        slots = slots_for(budget_bytes, demand, scope=cache_scope)
        warn_below_cliff(slots, demand, scope=cache_scope, policy=cache_policy)
        model = load_resident(model_dir, store, config=config, dtype=chosen_dtype)
        copy_into_routers(model, router_delta or {})
        cache = ExpertCache(slots, demand.layers, scope=cache_scope, make_policy=ONLINE[cache_policy])
        engine = Engine(store, cache, demand=demand, dtype=chosen_dtype)
        engine.attach(model, reader, record_trace=record_trace)
        if cache_prior is not None:
            engine.prefer_residents(model, cache_prior)
        yield model, engine


def copy_into_routers(model: PreTrainedModel, router_delta: Mapping[str, torch.Tensor]) -> None:
    """Overwrite parameters by name, in memory; the checkpoint's file is mapped privately and stays as it is.

    Raises:
        UserError: a name the model does not have or that is an expert's, or another shape.
    """
    parameters = dict(model.named_parameters())
    for name, weight in router_delta.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.is_meta:
            raise UserError(f"router delta: the model has no router weight {name}; use the model it was made for")
        if parameter.shape != weight.shape:
            raise UserError(
                f"router delta: {name} has shape {list(weight.shape)}, the model's is {list(parameter.shape)}; "
                "use the model it was made for"
            )
        with torch.no_grad():
            parameter.copy_(weight.to(parameter.dtype))


def _demand(store: ExpertStore, *, config: PretrainedConfig, dtype: torch.dtype) -> Demand:
    text_config = config.get_text_config()
    top_k = getattr(text_config, "num_experts_per_tok", None)
    if not isinstance(top_k, int):
        raise UserError(f"{store.model_dir}/config.json names no num_experts_per_tok: the cache cannot be sized")
    layers = [layer for layer in store.layer_ids if layer < text_config.num_hidden_layers]  # later ones predict ahead
    if not layers:
        raise UserError(f"{store.model_dir}/config.json has {text_config.num_hidden_layers} layers, none with experts")
    return Demand(len(layers), store.num_experts, top_k, record_bytes(store, dtype))
