"""llama.cpp as a side. No torch here: its process holds what llama.cpp needs and a bare Python, so that nearly all of its
memory limit is left for its page cache.
"""

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evaluation.benchmark.order import Leg, Order
from evaluation.benchmark.sides.serving import LegResult, Meter, Serving

GGUF_PRECISION = "float16"  # what llama.cpp computes fastest in of the 16-bit formats, on processors without bfloat16


@contextmanager
def llamacpp(order: Order) -> Iterator[Serving]:
    """llama.cpp (PyPI's `xllamacpp`) on a GGUF of the same weights, mapped; asked over its own loopback server."""
    import xllamacpp

    assert order.gguf is not None, "an order for llama.cpp without a GGUF"
    params = xllamacpp.CommonParams()
    params.model.path = order.gguf
    params.n_ctx = order.context_tokens + 8
    params.n_parallel, params.n_gpu_layers = 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = order.threads
    params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{order.kv_cache}")
    params.no_extra_bufts = not order.repacks
    params.warmup = False  # it would read the whole model
    params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_MMAP
    params.fit_params, params.ui, params.cache_prompt, params.verbosity = False, False, False, 0
    server = xllamacpp.Server(params)
    settings = {
        "xllamacpp": xllamacpp.__version__, "gguf": Path(order.gguf).name, "gguf_precision": GGUF_PRECISION,
        "load_mode": "mmap", "lazy_mode": "auto", "n_ctx": params.n_ctx, "threads": order.threads,
        "kv_cache": order.kv_cache, "warmup": False, "repacks": order.repacks,
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
