"""Our side and its peers, each loaded and ready for requests, with the best settings they have for this machine.

Every function here is a context manager that loads one side from an order and gives a `Serving`. They run in the
process of `side.py`, never in the benchmark's own. No text ends early: end-of-text tokens are switched off everywhere.
"""

import json
import logging
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from evaluation.benchmark.meter import LegResult, Meter
from evaluation.benchmark.order import Leg, Order
from evaluation.benchmark.weights import expert_modules
from evaluation.engine import load
from evaluation.engine.accounting import DECODE
from evaluation.engine.decoding import greedy
from evaluation.engine.engine import Engine
from evaluation.engine.route_trace import RouteTrace
from evaluation.reuse import reuse_rate_per_layer


@dataclass
class Serving:
    """A loaded side.

    Attributes:
        request: serves one leg.
        begin_cold: forgets what the side itself has cached; the page cache is not its business.
        files: the weights it reads, for the page cache to be dropped.
        settings: in words or numbers, for the report.
    """

    request: Callable[[Leg], LegResult]
    files: list[Path]
    settings: dict[str, Any]
    begin_cold: Callable[[], None] = field(default=lambda: None)


@contextmanager
def remoe(order: Order) -> Iterator[Serving]:
    """Our engine, with the order's expert cache."""
    assert order.expert_cache is not None, "an order for our side without an expert cache"
    logging.getLogger("evaluation.engine.budget").setLevel(logging.ERROR)
    with load(order.model_dir, order.expert_cache, cache_policy=order.cache_policy, record_trace=True) as (
        model,
        engine,
    ):
        _never_end(model)

        def request(leg: Leg) -> LegResult:
            engine.reset_stats()
            result = _generate(model, leg)
            result.engine = _engine_figures(engine)
            return result

        settings = {
            "expert_cache": order.expert_cache, "expert_cache_bytes": engine.pool_bytes,
            "cache_policy": order.cache_policy, "dtype": str(engine.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        yield Serving(request, _shards(order.model_dir), settings, engine.reset_cache)


def _engine_figures(engine: Engine) -> dict[str, Any]:
    """What the engine counted since its counters were reset."""
    stats = engine.stats()
    decoded = stats.tokens["decode"]
    return {
        "hit_rate": stats.hit_rate,
        "reuse_rate_mean": _decode_reuse(engine.trace(), sum(stats.tokens.values())),
        "misses_per_token": stats.misses_by_phase["decode"] / decoded if decoded else None,
        "first_touches": stats.first_touches,
        "counted_bytes_read_per_token": stats.bytes_read_per_token,
        "counted_bytes_read": stats.bytes_read_by_phase,
        "stall_seconds": stats.stall_seconds,
        "expert_bytes": engine.expert_bytes,
        "token_demand_bytes": engine.token_demand_bytes,
    }


def _decode_reuse(trace: RouteTrace, last: int) -> float | None:
    """EOR of those of the `last` tokens of the trace that were decoded."""
    kept_T = (np.arange(trace.tokens) >= trace.tokens - last) & (trace.phase == DECODE)
    if kept_T.sum() < 2:
        return None
    fields = {name: getattr(trace, name)[kept_T] for name in ("expert_ids", "phase", "request_id", "call")}
    one = RouteTrace(**fields, num_experts=trace.num_experts, layer_ids=trace.layer_ids)
    return float(reuse_rate_per_layer(one).mean())


@contextmanager
def resident(order: Order) -> Iterator[Serving]:
    """Plain transformers, everything in memory, in the precision of the checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(order.model_dir, dtype="auto").eval()
    _never_end(model)
    settings = {"dtype": str(model.dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
                "experts_implementation": model.config._experts_implementation}  # fmt: skip
    yield Serving(lambda leg: _generate(model, leg), _shards(order.model_dir), settings)


@contextmanager
def accelerate(order: Order) -> Iterator[Serving]:
    """transformers over accelerate's disk offload: as many layers' experts in memory as the order allows.

    Only experts are offloaded: the rest is small and used by every token. Experts are stored one by one and computed
    as one tensor a layer, so transformers writes the fused ones into the offload folder: a second copy on disk.
    """
    assert order.offload_dir is not None, "an order for accelerate without an offload folder"
    device_map = accelerate_device_map(order.model_dir, order.resident_bytes or 0)
    on_disk = [name for name, device in device_map.items() if device == "disk"]
    model = AutoModelForCausalLM.from_pretrained(
        order.model_dir, dtype="auto", device_map=device_map, offload_folder=order.offload_dir
    ).eval()
    _never_end(model)
    files = _shards(order.model_dir) + [path for path in Path(order.offload_dir).rglob("*") if path.is_file()]
    settings = {
        "layers_with_experts_on_disk": len(on_disk), "weights_in_memory_bytes": order.resident_bytes,
        "offload": "fused experts as safetensors in the offload folder, read layer by layer",
        "dtype": str(model.dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
    }  # fmt: skip
    yield Serving(lambda leg: _generate(model, leg), files, settings)


def accelerate_device_map(model_dir: str, resident_bytes: int) -> dict[str, str]:
    """Module -> `cpu` or `disk`: experts of the first layers in memory while `resident_bytes` last."""
    modules, other_bytes = expert_modules(model_dir)
    left_bytes = resident_bytes - other_bytes
    on_disk = set()
    for name, module_bytes in modules.items():
        left_bytes -= module_bytes
        if left_bytes < 0:
            on_disk.add(name)
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


@contextmanager
def llamacpp(order: Order) -> Iterator[Serving]:
    """llama.cpp (PyPI's `xllamacpp`) on a GGUF of the same weights, mapped; asked over its own loopback server."""
    import xllamacpp

    assert order.gguf is not None, "an order for llama.cpp without a GGUF"
    params = xllamacpp.CommonParams()
    params.model.path = order.gguf
    params.n_ctx = max(len(leg.prompt_ids) + leg.max_new_tokens for leg in order.legs) + 8
    params.n_parallel, params.n_gpu_layers = 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = order.threads
    params.warmup = False  # it would read the whole model
    params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_MMAP
    params.fit_params, params.ui, params.cache_prompt, params.verbosity = False, False, False, 0
    server = xllamacpp.Server(params)
    settings = {
        "xllamacpp": xllamacpp.__version__, "gguf": Path(order.gguf).name, "load_mode": "mmap", "lazy_mode": "auto",
        "n_ctx": params.n_ctx, "threads": order.threads, "kv_cache": "F16", "warmup": False,
        "system_info": xllamacpp.get_system_info().strip(),
    }  # fmt: skip
    yield Serving(lambda leg: _ask_server(server.listening_address, leg), [Path(order.gguf)], settings)


def _ask_server(address: str, leg: Leg) -> LegResult:
    body = {
        "prompt": leg.prompt_ids, "n_predict": leg.max_new_tokens, "temperature": 0, "cache_prompt": False,
        "ignore_eos": True, "return_tokens": True, "stream": True,
    }  # fmt: skip
    call = urllib.request.Request(
        f"{address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    meter = Meter()
    with urllib.request.urlopen(call) as events:
        for line in events:
            if line.startswith(b"data: "):
                meter.tokens(json.loads(line.removeprefix(b"data: ")).get("tokens", []))
    return meter.result()


class _MeterStreamer(BaseStreamer):
    """Hands the new tokens of `generate` to a meter; the first thing that comes is the prompt."""

    def __init__(self, meter: Meter) -> None:
        self._meter, self._prompt_seen = meter, False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._meter.tokens(value.flatten().tolist())
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing to do: the meter has it all."""


def _generate(model: PreTrainedModel, leg: Leg) -> LegResult:
    meter = Meter()
    greedy(model, leg.prompt_ids, max_new_tokens=leg.max_new_tokens, streamer=_MeterStreamer(meter))
    return meter.result()


def _never_end(model: PreTrainedModel) -> None:
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None


def _shards(model_dir: str) -> list[Path]:
    return sorted(Path(model_dir).glob("*.safetensors"))


SIDES = {"remoe": remoe, "accelerate": accelerate, "llamacpp": llamacpp, "resident": resident}
