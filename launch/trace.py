"""`remoe trace`: which experts every token of a text chooses, written as a routing trace."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from configs.checks import at_least
from configs.command import parse
from configs.files import prepare
from data.batches import tokenize
from data.sources import read_text
from evaluation.engine.cache.reuse import routing_summary
from evaluation.engine.cache.trace_formats import check_extension, write_trace
from evaluation.engine.device import find_device
from evaluation.tracing import mean_loss, teacher_forced_trace
from training.model.loading import load_pretrained, load_tokenizer, local_folder
from training.run_folder.router_delta import load_for


@dataclass(frozen=True)
class Trace:
    """Write which experts every token of a text chooses in every layer.

    examples:
      remoe trace --model data/embedded/model --text-file README.md --output runs/readme.safetensors
      remoe replay runs/readme.safetensors --slots 4,6,8,12
      remoe trace --model data/embedded/model --text-file README.md --output runs/readme.csv
    """

    model: str  # folder or hub name of the model
    text_file: str  # UTF-8 text
    output: str  # the trace; its ending chooses the format: .safetensors, .npz or .csv
    router_delta: str | None = None  # use the routers of this delta
    max_length: int = 512  # tokens of a request: a replay starts cold with each
    dtype: str = "auto"  # precision: auto (as stored), float32 or bfloat16
    device: str = "auto"  # auto (the accelerator if there is one), cpu or cuda

    def __post_init__(self) -> None:
        at_least(self, max_length=2)


def main(argv: Sequence[str] | None = None) -> None:
    """Load, trace, write, print a summary as JSON."""
    command = parse(Trace, argv, prog="remoe trace")
    output, text = prepare(command.output), read_text(command.text_file)
    check_extension(output)
    delta = load_for(local_folder(command.model), command.router_delta) if command.router_delta else None
    model = load_pretrained(command.model, dtype=command.dtype, device=find_device(command.device), router_delta=delta)
    documents = tokenize([text], load_tokenizer(command.model))
    trace, losses_R = teacher_forced_trace(model, documents, max_length=command.max_length, progress="trace")
    write_trace(trace, output)
    print(json.dumps({"trace": str(output), "nll": mean_loss(trace, losses_R), **routing_summary(trace)}, indent=2))
