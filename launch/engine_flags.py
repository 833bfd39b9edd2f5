"""The engine's flags, which every command that decodes shares, and what they mean to `load`."""

import argparse
from typing import Any

from evaluation.engine.cache.policies import DEFAULT, LIVE
from evaluation.engine.cache.trace_formats import read_trace
from evaluation.engine.prefetch import EXPERTS
from training.run_folder.router_delta import load_for


def add_engine_flags(to: Any) -> None:
    """Add them to a parser or to a group of one."""
    to.add_argument("--model", required=True, help="folder with safetensors weights, or hub name")
    to.add_argument("--router-delta", metavar="DIR", help="tuned routers for exactly this model")
    memory = to.add_mutually_exclusive_group(required=True)
    memory.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="memory for everything: weights, experts, KV cache, activations, buffers; 512MiB, 8GiB, or 25%% of the machine",
    )
    memory.add_argument(
        "--expert-cache",
        metavar="SIZE",
        help="memory for experts alone: 512KiB, 2MiB, 8GiB, 25%% of all or bytes; room for some that do not stay comes on top",
    )
    to.add_argument("--cache-policy", default=DEFAULT, help=f"one of {', '.join(LIVE)} (default {DEFAULT})")
    to.add_argument(
        "--profile", metavar="TRACE", help="a routing trace of this model, whose most used experts `static` keeps"
    )
    to.add_argument("--cache-scope", default="global", help="global (default, one pool) or per_layer (equal pools)")
    to.add_argument(
        "--prefetch",
        nargs="?",
        type=int,
        const=EXPERTS,
        default=0,
        metavar="N",
        help="read ahead N experts (3 if not said) that the next layer's router is likely to choose: same tokens, more reads",
    )
    to.add_argument("--dtype", default="auto", help="auto (as stored), bfloat16, float16 or float32")
    to.add_argument(
        "--device", default="cpu", help="cpu (default), cuda (slots in its memory, with --expert-cache only) or auto"
    )


def engine_options(arguments: argparse.Namespace, model_dir: str) -> dict[str, Any]:
    """What `load` takes beside the model.

    Raises:
        UserError: a delta of another model, a profile that cannot be read.
    """
    return {
        "expert_cache": arguments.expert_cache,
        "memory_budget": arguments.memory_budget,
        "router_delta": load_for(model_dir, arguments.router_delta) if arguments.router_delta else None,
        "cache_policy": arguments.cache_policy,
        "profile": read_trace(arguments.profile) if arguments.profile else None,
        "cache_scope": arguments.cache_scope,
        "dtype": arguments.dtype,
        "device": arguments.device,
        "prefetch": arguments.prefetch,
    }
