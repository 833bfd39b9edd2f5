"""The engine's flags, which every command that decodes shares: its options, less those that a command knows itself."""

from dataclasses import dataclass
from typing import Literal

import tyro
from torch import Tensor

from evaluation.engine.options import AUTO, CONTEXT_TOKENS, EngineOptions
from training.run_folder.router_delta import load_for


@dataclass(frozen=True)
class EngineFlags(EngineOptions):
    """Memory, cache and precision of the engine; give exactly one of --expert-cache and --memory-budget."""

    prefetch: int | Literal["auto"] = AUTO
    context_tokens: tyro.conf.Suppress[int] = CONTEXT_TOKENS
    prompt_tokens: tyro.conf.Suppress[int | None] = None
    record_trace: tyro.conf.Suppress[bool] = False
    warn: tyro.conf.Suppress[bool] = True


def router_weights(model_dir: str, router_delta: str | None) -> dict[str, Tensor] | None:
    """The tuned routers in the folder `router_delta`, if any is given; a `UserError` if they are of another model."""
    return load_for(model_dir, router_delta) if router_delta else None
