"""`load`: a stock checkpoint as a transformers model whose experts are paged, within a budget of bytes."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PretrainedConfig, PreTrainedModel

from configs.load import UserError
from configs.sizes import parse_size
from evaluation.engine.cache.policies import ONLINE
from evaluation.engine.cache.pool import ExpertCache
from evaluation.engine.device import CPU, Device, device_at, find_device
from evaluation.engine.engine import Engine
from evaluation.engine.generation_settings import read_generation_config
from evaluation.engine.memory.demand import Demand, slots_for, warn_below_cliff
from evaluation.engine.memory.division import Division, divide
from evaluation.engine.memory.needs import needs_of
from evaluation.engine.options import AUTO, EngineOptions
from evaluation.engine.prefetch import SLOTS_PER_GUESS, experts_ahead
from evaluation.engine.resident import compute_dtype, load_resident
from evaluation.engine.slot_kind import READY, STORED, fastest, possible_kinds
from evaluation.engine.store.bandwidth import reads_in_flight_for
from evaluation.engine.store.experts import ExpertStore
from evaluation.engine.store.reader import Reader
from training.model.lazy_weights import empty_model, read_config
from training.model.packed_experts import check_announced
from training.model.routers import copy_into_routers, most_chosen

T = TypeVar("T")
KERNELS = 24
"""Compiled matrix products that are kept under a memory budget: those of decoding, and most of a prompt's."""
LOADING_BYTES = 6 * 2**20
"""What loading leaves behind whatever the model: code that is imported for it, above all (3.7 MiB, transformers 5.23)."""
MODULE_BYTES, TENSOR_BYTES = 16 * 2**10, 2**10
"""What Python holds of a module of the model and of the header of a stored tensor; measured, rounded up."""


@contextmanager
def load(
    model_dir: str | Path, options: EngineOptions, *, router_delta: Mapping[str, torch.Tensor] | None = None
) -> Iterator[tuple[PreTrainedModel, Engine]]:
    """Load a checkpoint without its experts; they are read from its shards as the model asks for them.

    Args:
        model_dir: a Hugging Face folder with safetensors weights.
        router_delta: parameter name -> weight, copied into the routers and cast to their precision.

    Yields:
        The transformers model, to be used as any other (inference only), and its engine.

    Raises:
        UserError: nothing to page, damaged shards, a cache too small for one token in one layer, no such device.
    """
    device = _device(options)
    if options.memory_budget is not None:
        bound_kernel_caches()
    config, store = read_config(model_dir), ExpertStore(model_dir)
    generation_config = read_generation_config(model_dir)
    dtype = compute_dtype(options.dtype, config=config, store=store)
    check_announced(model_dir, store.format)
    kinds = possible_kinds(options, store, device)
    demands = {kind: _demand(store, config=config, dtype=dtype, kind=kind) for kind in kinds}
    slots = _slots_of_cache(options, demands)  # before anything is loaded, so that too few are refused at once
    in_flight = options.reads_in_flight or reads_in_flight_for(store.shards)
    with Reader(store.shards, reads_in_flight=in_flight, longest_bytes=store.longest_bytes) as reader:
        model = load_resident(model_dir, store, config=config, dtype=dtype, device=device)
        model.generation_config = generation_config
        if router_delta:
            copy_into_routers(model, router_delta)
        divisions = _divisions(options, model, store, reader, demands=demands)
        slots = slots or {kind: division.slots for kind, division in divisions.items()}
        kind = fastest(slots, demands, store, dtype, scope=options.cache_scope) if len(slots) > 1 else next(iter(slots))
        demand, division = demands[kind], divisions.get(kind)
        if options.warn:
            warn_below_cliff(slots[kind], demand, scope=options.cache_scope, policy=options.cache_policy)
        make_policy = ONLINE[options.cache_policy]
        cache = ExpertCache(slots[kind], demand.layers, scope=options.cache_scope, make_policy=make_policy)
        engine = Engine(
            model, options, store=store, reader=reader, cache=cache, demand=demand, device=device, division=division,
            slot_kind=kind,
        )  # fmt: skip
        yield model, engine


def _device(options: EngineOptions) -> Device:
    """Where to compute; a memory budget is for the processor."""
    where = find_device(options.device)
    if options.memory_budget is not None and where.type != CPU.type:
        raise UserError(
            f"a memory budget counts the processor's memory, and device is {options.device}; give an expert cache"
        )
    return device_at(where)


def _slots_of_cache(options: EngineOptions, demands: Mapping[str, Demand]) -> dict[str, int]:
    """Slots that `expert_cache` buys of each kind; none under a memory budget, which is divided once the residents are loaded."""
    if options.expert_cache is None:
        return {}
    first = next(iter(demands.values()))
    budget_bytes = parse_size(options.expert_cache, whole_bytes=first.all_experts * first.slot_bytes)
    return _where_it_fits(demands, lambda _, demand: slots_for(budget_bytes, demand, scope=options.cache_scope))


def _divisions(
    options: EngineOptions, model: PreTrainedModel, store: ExpertStore, reader: Reader, *, demands: Mapping[str, Demand]
) -> dict[str, Division]:
    """What `memory_budget` is divided into with slots of each kind; none if experts alone have a budget."""
    if options.memory_budget is None:
        return {}
    itemsize = model.dtype.itemsize
    beside = {STORED: store.record(itemsize).total_bytes, READY: store.stored_record().total_bytes}
    needs = needs_of(
        model.config, itemsize, top_k=next(iter(demands.values())).top_k, intermediate=store.format.intermediate
    )

    def divided(kind: str, demand: Demand) -> Division:
        given: dict[str, Any] = dict(
            budget=options.memory_budget or 0,
            demand=demand,
            needs=needs,
            resident_bytes=_resident_bytes(model, store),
            reader_bytes=reader.buffer_bytes + (beside[kind] if store.format.is_quantised else 0),
            reads_in_flight=reader.reads_in_flight,
            context_tokens=options.context_tokens,
            scope=options.cache_scope,
            prompt_tokens=options.prompt_tokens,
        )
        asked = 0 if options.prefetch == AUTO else options.prefetch
        division = divide(**given, ahead_slots=SLOTS_PER_GUESS * asked)
        held: dict[str, int] = {
            "slots": division.slots * division.pools,
            "pools": division.pools,
            "top_k": demand.top_k,
        }
        if options.prefetch == AUTO and (ahead := experts_ahead(AUTO, **held)):
            division = divide(**given, ahead_slots=SLOTS_PER_GUESS * ahead)
        return division

    return _where_it_fits(demands, divided)


def _where_it_fits(demands: Mapping[str, Demand], buy: Callable[[str, Demand], T]) -> dict[str, T]:
    """What each kind of slots gives; a `UserError`, that of the smallest, where none has room for a token's experts."""
    found: dict[str, T] = {}
    errors: list[UserError] = []
    for kind, demand in demands.items():
        try:
            found[kind] = buy(kind, demand)
        except UserError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return found


def _resident_bytes(model: PreTrainedModel, store: ExpertStore) -> int:
    """Memory of the loaded model without its experts.

    It is worked out, because what a process has grown by differs from start to start by half: memory that was freed before is
    used again, and the first start after an installation compiles what it imports.
    """
    weight_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta)
    modules = sum(1 for _ in model.modules())
    return weight_bytes + LOADING_BYTES + modules * MODULE_BYTES + store.stored_tensors * TENSOR_BYTES


def bound_kernel_caches() -> None:
    """Let oneDNN keep few compiled products: it keeps a thousand, 0.6 MB for each number of rows it meets (torch 2.13).

    Both variables are read when a process multiplies in 16-bit precision for the first time; what the user set stays.
    """
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, str(KERNELS))


def _demand(store: ExpertStore, *, config: PretrainedConfig, dtype: torch.dtype, kind: str) -> Demand:
    text_config = config.get_text_config()
    layers = [layer for layer in store.layer_ids if layer < text_config.num_hidden_layers]  # later ones predict ahead
    if not layers:
        raise UserError(f"{store.model_dir}/config.json has {text_config.num_hidden_layers} layers, none with experts")
    top_k = getattr(text_config, "num_experts_per_tok", None)
    if not isinstance(top_k, int):  # under another name, or a number for each layer
        top_k = most_chosen(empty_model(str(store.model_dir), dtype=dtype))
    record = store.stored_record() if kind == STORED else store.record(dtype.itemsize)
    return Demand(len(layers), store.num_experts, top_k, record.total_bytes)
