"""`load`: a stock checkpoint as a transformers model whose experts are paged, within a budget of bytes."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from configs.load import UserError
from configs.sizes import parse_size
from evaluation.engine.cache.policies import DEFAULT, make_policy
from evaluation.engine.cache.pool import SCOPES, ExpertCache
from evaluation.engine.cache.trace import RouteTrace
from evaluation.engine.cache_prior import CachePrior
from evaluation.engine.device import CPU, find_device
from evaluation.engine.engine import Engine
from evaluation.engine.memory.demand import Demand, slots_for, warn_below_cliff
from evaluation.engine.memory.division import CONTEXT_TOKENS, divide
from evaluation.engine.memory.needs import needs_of
from evaluation.engine.memory.process import private_bytes, total_memory_bytes
from evaluation.engine.prefetch import SLOTS_PER_GUESS
from evaluation.engine.resident import compute_dtype, load_resident
from evaluation.engine.slot_memory import record_bytes
from evaluation.engine.store.bandwidth import reads_in_flight_for
from evaluation.engine.store.experts import ExpertStore
from evaluation.engine.store.reader import Reader
from training.model.lazy_weights import read_config
from training.model.routers import copy_into_routers

KERNELS = 24
"""Compiled matrix products that are kept under a memory budget: those of decoding, and most of a prompt's."""


@contextmanager
def load(
    model_dir: str | Path,
    expert_cache: int | str | None = None,
    *,
    memory_budget: int | str | None = None,
    context_tokens: int = CONTEXT_TOKENS,
    prompt_tokens: int | None = None,
    router_delta: Mapping[str, torch.Tensor] | None = None,
    cache_policy: str = DEFAULT,
    profile: RouteTrace | None = None,
    cache_scope: str = "global",
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    record_trace: bool = False,
    reads_in_flight: int | None = None,
    cache_prior: CachePrior | None = None,
    prefetch: int = 0,
) -> Iterator[tuple[PreTrainedModel, Engine]]:
    """Load a checkpoint without its experts; they are read from its shards as the model asks for them.

    Args:
        model_dir: a Hugging Face folder with safetensors weights, one tensor per expert matrix.
        expert_cache: memory for experts: bytes, `2MiB`, or `25%` of all experts; `engine.buffer_bytes` come on top.
        memory_budget: instead: memory for everything that loading and using the model takes; see `division.py`.
        context_tokens: with a memory budget: tokens whose keys and values have memory of their own, over all sequences
            of a batch. A longer context takes from the experts and is refused when they have no more to give.
        prompt_tokens: with a memory budget: tokens of a prompt that are computed at once at most, if whoever uses the
            model sees to that (`prefill_chunk_size`, `Conversations`); None: whole prompts.
        router_delta: parameter name -> weight, copied into the routers and cast to their precision.
        cache_policy: `decayed` (the default), `lru`, `fifo`, `lfu`, `lfru` or `static`.
        profile: a trace whose most used experts `static` keeps.
        cache_scope: `global` (one pool for all layers) or `per_layer` (equal pools).
        dtype: `auto` as the checkpoint's config says, or `bfloat16`, `float16`, `float32`.
        device: where the model computes and the slots lie: `cpu`, or an accelerator such as `cuda` (`auto`: if there is
            one), for which experts are read into pinned memory and copied from there; with `expert_cache` only.
        record_trace: keep the routing of every token, for `engine.trace()`.
        reads_in_flight: reading threads; None: what `bandwidth.py` found best for the device.
        prefetch: read ahead so many experts that the next layer's router is likely to choose, into slots on top of
            `expert_cache`; 0: none. See `prefetch.py`.
        cache_prior: let routers prefer resident experts while decoding; this changes what the model says.

    Yields:
        The transformers model, to be used as any other (inference only), and its engine.

    Raises:
        UserError: nothing to page, damaged shards, a cache too small for one token in one layer, unknown values.
    """
    if cache_scope not in SCOPES:
        raise UserError(f"unknown cache scope {cache_scope!r}; known: {', '.join(SCOPES)}")
    if reads_in_flight is not None and reads_in_flight < 1:
        raise UserError(f"reads_in_flight is {reads_in_flight}; write at least 1, or None for what suits the device")
    if (expert_cache is None) == (memory_budget is None):
        raise UserError(
            "give exactly one of expert_cache (memory for experts) and memory_budget (memory for everything)"
        )
    if prefetch < 0:
        raise UserError(f"prefetch is {prefetch}; write how many experts of a layer to read ahead, or 0 for none")
    where = find_device(device)
    if memory_budget is not None and where.type != CPU.type:
        raise UserError(f"a memory budget counts the processor's memory, and device is {device}; give an expert cache")
    if memory_budget is not None:
        bound_kernel_caches()
    before_bytes = private_bytes()
    config = read_config(model_dir)
    store = ExpertStore(model_dir)
    chosen_dtype = compute_dtype(dtype, config=config, store=store)
    demand = _demand(store, config=config, dtype=chosen_dtype)
    make = make_policy(cache_policy, layers=demand.layers, num_experts=demand.num_experts, profile=profile)
    in_flight = reads_in_flight_for(store.shards) if reads_in_flight is None else reads_in_flight
    division = None
    if memory_budget is None:
        assert expert_cache is not None, "one of the two was given"
        budget_bytes = parse_size(expert_cache, whole_bytes=demand.all_experts * demand.slot_bytes)
        slots = slots_for(budget_bytes, demand, scope=cache_scope)
    with Reader(store.shards, reads_in_flight=in_flight, longest_bytes=store.longest_bytes) as reader:
        model = load_resident(model_dir, store, config=config, dtype=chosen_dtype, device=where)
        if router_delta:
            copy_into_routers(model, router_delta)
        if memory_budget is not None:
            needs = needs_of(
                model.config, chosen_dtype.itemsize, top_k=demand.top_k, intermediate=store.shape.intermediate
            )
            resident_bytes = max(private_bytes() - before_bytes, _tensor_bytes(model))
            division = divide(
                parse_size(memory_budget, whole_bytes=total_memory_bytes()), demand=demand, needs=needs,
                resident_bytes=resident_bytes, reader_bytes=reader.buffer_bytes, reads_in_flight=in_flight,
                context_tokens=context_tokens, scope=cache_scope, prompt_tokens=prompt_tokens,
                ahead_slots=SLOTS_PER_GUESS * prefetch,
            )  # fmt: skip
            slots = division.slots
        warn_below_cliff(slots, demand, scope=cache_scope, policy=cache_policy)
        cache = ExpertCache(slots, demand.layers, scope=cache_scope, make_policy=make)
        engine = Engine(store, cache, demand=demand, dtype=chosen_dtype, division=division)
        engine.attach(model, reader, record_trace=record_trace, prefetch=prefetch)
        if cache_prior is not None:
            engine.prefer_residents(model, cache_prior)
        yield model, engine


def _tensor_bytes(model: PreTrainedModel) -> int:
    """What the residents take at least: memory that was freed before and is used again does not show as growth."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.nbytes for tensor in tensors if not tensor.is_meta)


def bound_kernel_caches() -> None:
    """Let oneDNN keep few compiled products: it keeps a thousand, 0.6 MB for each number of rows it meets (torch 2.13).

    Both variables are read when a process multiplies in 16-bit precision for the first time; what the user set stays.
    """
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, str(KERNELS))


def _demand(store: ExpertStore, *, config: PretrainedConfig, dtype: torch.dtype) -> Demand:
    text_config = config.get_text_config()
    top_k = getattr(text_config, "num_experts_per_tok", None)
    if not isinstance(top_k, int):
        raise UserError(f"{store.model_dir}/config.json names no num_experts_per_tok: the cache cannot be sized")
    layers = [layer for layer in store.layer_ids if layer < text_config.num_hidden_layers]  # later ones predict ahead
    if not layers:
        raise UserError(f"{store.model_dir}/config.json has {text_config.num_hidden_layers} layers, none with experts")
    return Demand(len(layers), store.num_experts, top_k, record_bytes(store, dtype))
