"""The engine's flags, which every command that decodes shares, and what they mean to `load`."""

import argparse
from typing import Any

from torch import Tensor

from evaluation.engine.cache.policies import DEFAULT, ONLINE
from evaluation.engine.options import EngineOptions
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
    to.add_argument("--cache-policy", default=DEFAULT, help=f"one of {', '.join(ONLINE)} (default {DEFAULT})")
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


def engine_options(arguments: argparse.Namespace, **more: Any) -> EngineOptions:
    """The options that the flags stand for, and `more` of them.

    Raises:
        UserError: see `EngineOptions`.
    """
    return EngineOptions(
        expert_cache=arguments.expert_cache,
        memory_budget=arguments.memory_budget,
        cache_policy=arguments.cache_policy,
        cache_scope=arguments.cache_scope,
        dtype=arguments.dtype,
        device=arguments.device,
        prefetch=arguments.prefetch,
        **more,
    )


def router_weights(arguments: argparse.Namespace, model_dir: str) -> dict[str, Tensor] | None:
    """The tuned routers that are asked for, if any.

    Raises:
        UserError: they belong to another model.
    """
    return load_for(model_dir, arguments.router_delta) if arguments.router_delta else None
