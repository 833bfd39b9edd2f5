"""The sides that are transformers: our engine, accelerate's disk offload, and everything in memory.

The context managers load one side from an order each.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from evaluation.benchmark.order import Leg, Order
from evaluation.benchmark.sides.serving import LegResult, Meter, Serving
from evaluation.engine.cache.counts import DECODE
from evaluation.engine.cache.reuse import reuse_rate_per_layer
from evaluation.engine.cache.trace import RouteTrace
from evaluation.engine.engine import Engine
from evaluation.engine.greedy import greedy
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from evaluation.engine.store.experts import ExpertStore


@contextmanager
def remoe(order: Order) -> Iterator[Serving]:
    """Our engine, with the order's expert cache or memory budget."""
    _prepare(order)
    choices: dict[str, Any] = {
        name: getattr(order, name)
        for name in ("expert_cache", "memory_budget", "cache_policy", "prefetch", "lever", "products")
    }
    options = EngineOptions(**choices, context_tokens=order.context_tokens, record_trace=True, warn=False)
    with load(order.model_dir, options) as (model, engine):

        def request(leg: Leg) -> LegResult:
            engine.reset_stats()
            result = _generate(model, leg)
            result.engine = _engine_figures(engine)
            return result

        settings = {**choices, "expert_cache_bytes": engine.pool_bytes, **_precision(engine.dtype)}
        yield Serving(request, order.shards, settings, engine.reset_cache)


def _engine_figures(engine: Engine) -> dict[str, Any]:
    """The figures that the engine counted since its counters were reset."""
    stats = engine.stats()
    decoded, misses = stats.tokens["decode"], stats.misses_by_phase["decode"]
    return {
        "hit_rate": stats.hit_rate,
        "reuse_rate_mean": _decode_reuse(engine.trace(), sum(stats.tokens.values())),
        "misses_per_token": misses / decoded if decoded else None,
        "first_touches": stats.first_touches,
        "counted_bytes_read_per_token": stats.bytes_read_per_token,
        "missed_bytes_per_token": misses * engine.expert_bytes / decoded if decoded else None,
        "counted_bytes_read": stats.bytes_read_by_phase,
        "stall_seconds": stats.stall_seconds,
        "reading_seconds": stats.reading_seconds,
        "expert_bytes": engine.expert_bytes,
        "token_demand_bytes": engine.token_demand_bytes,
    }


def _decode_reuse(trace: RouteTrace, last: int) -> float | None:
    """EOR of the decoded tokens among the `last` ones of the trace; None for fewer than two."""
    kept_T = (np.arange(trace.tokens) >= trace.tokens - last) & (trace.phase == DECODE)
    return float(reuse_rate_per_layer(trace.where(kept_T)).mean()) if kept_T.sum() > 1 else None


@contextmanager
def resident(order: Order) -> Iterator[Serving]:
    """Plain transformers, everything in memory, in the precision of the checkpoint."""
    _prepare(order)
    model = AutoModelForCausalLM.from_pretrained(order.model_dir, dtype="auto").eval()
    settings = {**_precision(model.dtype), "experts_implementation": model.config._experts_implementation}
    yield Serving(lambda leg: _generate(model, leg), order.shards, settings)


@contextmanager
def accelerate(order: Order) -> Iterator[Serving]:
    """transformers over accelerate's disk offload."""
    _prepare(order)
    model, files, settings = load_offloaded(order)
    yield Serving(lambda leg: _generate(model, leg), files, settings)


def load_offloaded(order: Order) -> tuple[PreTrainedModel, list[Path], dict[str, Any]]:
    """The model with as many layers' experts in memory as the order allows, the files it reads, and its settings in words.

    Only experts are offloaded: the rest is small and used by every token. Experts are stored one by one and computed
    as one tensor a layer, so transformers writes the fused ones into the offload folder: a second copy on disk.
    """
    assert order.offload_dir is not None, "an order for accelerate without an offload folder"
    device_map = accelerate_device_map(order.model_dir, order.resident_bytes or 0)
    model = AutoModelForCausalLM.from_pretrained(
        order.model_dir, dtype="auto", device_map=device_map, offload_folder=order.offload_dir
    ).eval()
    files = order.shards + [path for path in Path(order.offload_dir).rglob("*") if path.is_file()]
    settings = {
        "layers_with_experts_on_disk": list(device_map.values()).count("disk"),
        "weights_in_memory_bytes": order.resident_bytes,
        "offload": "fused experts as safetensors in the offload folder, read layer by layer",
        **_precision(model.dtype),
    }
    return model, files, settings


def accelerate_device_map(model_dir: str, resident_bytes: int) -> dict[str, str]:
    """Module -> `cpu` or `disk`: experts of the first layers in memory while `resident_bytes` last."""
    store = ExpertStore(model_dir)
    left_bytes = resident_bytes - store.resident_bytes - np.cumsum(list(store.module_bytes.values()))
    on_disk = {name for name, left in zip(store.module_bytes, left_bytes, strict=True) if left < 0}
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir))
    return dict(_placed(skeleton, "", on_disk))


def _placed(module: torch.nn.Module, name: str, on_disk: set[str]) -> Iterator[tuple[str, str]]:
    """The largest modules that are wholly in one place."""
    if name in on_disk:
        yield name, "disk"
    elif not any(other.startswith(f"{name}.") or not name for other in on_disk):
        yield name, "cpu"
    else:
        for child_name, child in module.named_children():
            yield from _placed(child, f"{name}.{child_name}".removeprefix("."), on_disk)


def _generate(model: PreTrainedModel, leg: Leg) -> LegResult:
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    meter = Meter()
    greedy(model, leg.prompt_ids, max_new_tokens=leg.max_new_tokens, on_tokens=meter.tokens)
    return meter.result()


def _prepare(order: Order) -> None:
    torch.set_num_threads(order.threads)
    transformers.utils.logging.disable_progress_bar()


def _precision(dtype: torch.dtype) -> dict[str, Any]:
    return {"dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
