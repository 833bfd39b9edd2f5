"""`remoe trace`: which experts every token of a text chooses, written as a routing trace."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from configs.checks import at_least
from configs.command import parse
from configs.files import prepare
from data.batches import tokenize
from data.sources import read_text
from evaluation.engine.cache.reuse import routing_summary
from evaluation.engine.cache.trace_formats import check_extension, write_trace
from evaluation.engine.device import find_device
from evaluation.engine.engine import Engine
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from evaluation.tracing import mean_loss, teacher_forced_trace
from launch.engine_flags import router_weights
from training.model.loading import load_pretrained, load_tokenizer, local_folder


@dataclass(frozen=True)
class Trace:
    """Write which experts every token of a text chooses in every layer.

    examples:
      remoe trace --model data/embedded/model --text-file README.md --output runs/readme.safetensors
      remoe replay runs/readme.safetensors --slots 4,6,8,12
      remoe trace --model data/embedded/model --text-file README.md --output runs/readme.csv
      remoe trace --model allenai/OLMoE-1B-7B-0924-Instruct --memory-budget 6GiB --text-file README.md --output runs/olmoe.csv
    """

    model: str  # folder or hub name of the model
    text_file: str  # UTF-8 text
    output: str  # the trace; its ending chooses the format: .safetensors, .npz or .csv
    router_delta: str | None = None  # use the routers of this delta
    max_length: int = 512  # tokens of a request: a replay starts cold with each
    dtype: str = "auto"  # precision: auto (as stored), float32 or bfloat16
    device: str = "auto"  # auto (the accelerator if there is one), cpu or cuda; with a budget of bytes auto is cpu
    # for a model that does not fit: experts are read from disk as they are needed, within this memory for everything; 8GiB
    memory_budget: str | None = None
    expert_cache: str | None = None  # the same, within this memory for experts; 2GiB, or 25% of them

    def __post_init__(self) -> None:
        at_least(self, max_length=2)
        if self.memory_budget is not None or self.expert_cache is not None:
            self.engine_options()

    def engine_options(self) -> EngineOptions:
        """How the engine reads experts; it wants exactly one of the budgets."""
        device = "cpu" if self.device == "auto" else self.device
        return EngineOptions(
            self.expert_cache,
            self.memory_budget,
            context_tokens=self.max_length,
            dtype=self.dtype,
            device=device,
            warn=False,
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Load, trace, write, print a summary as JSON."""
    command = parse(Trace, argv, prog="remoe trace")
    output, text = prepare(command.output), read_text(command.text_file)
    check_extension(output)
    model_dir = local_folder(command.model)
    documents = tokenize([text], load_tokenizer(model_dir))
    with _loaded(command, model_dir) as (model, engine):
        how: dict[str, Any] = {"max_length": command.max_length, "progress": "trace", "engine": engine}
        trace, losses_R = teacher_forced_trace(model, documents, **how)
    write_trace(trace, output)
    print(json.dumps({"trace": str(output), "nll": mean_loss(trace, losses_R), **routing_summary(trace)}, indent=2))


@contextmanager
def _loaded(command: Trace, model_dir: str) -> Iterator[tuple[PreTrainedModel, Engine | None]]:
    """The model in memory, or paged if there is a budget of bytes."""
    routers = router_weights(model_dir, command.router_delta)
    if command.memory_budget is None and command.expert_cache is None:
        device = find_device(command.device)
        yield load_pretrained(model_dir, dtype=command.dtype, device=device, router_delta=routers), None
    else:
        with load(model_dir, command.engine_options(), router_delta=routers) as loaded:
            yield loaded
