"""`remoe export`: tuned routers as something others can use without this project: a Hugging Face folder, or a GGUF."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.command import parse
from configs.files import prepare_folder
from configs.load import UserError
from evaluation.export.gguf_patch import patch_gguf
from evaluation.export.hf_folder import write_folder
from training.model.lazy_weights import stored_tensors
from training.model.loading import local_folder
from training.run_folder.router_delta import describe, load_for


@dataclass(frozen=True)
class Export:
    """Write a model with tuned routers for others: a Hugging Face folder, or a patched copy of a GGUF.

    gguf: the routers of an existing file of the same base are replaced in a copy; its experts may be quantised.

    examples:
      remoe export --model data/embedded/model --router-delta runs/tiny/router_delta --format hf --output runs/tiny/model
      remoe export --model allenai/OLMoE-1B-7B-0924-Instruct --router-delta runs/olmoe_1b_7b/router_delta \\
          --format gguf --gguf olmoe-q4_k_m.gguf --output olmoe-q4_k_m-remoe.gguf
    """

    model: str  # the base: folder with safetensors weights, or hub name
    router_delta: str  # folder that training wrote, for exactly this base
    output: str  # a folder (hf) or a file (gguf) that is not there
    format: Literal["hf", "gguf"] = "hf"  # what is written
    gguf: str | None = None  # with --format gguf: a GGUF of the base

    def __post_init__(self) -> None:
        if (self.format == "gguf") != (self.gguf is not None):
            raise UserError("--format gguf and --gguf BASE.gguf go together: the file whose routers are to be replaced")


def main(argv: Sequence[str] | None = None) -> None:
    """Check that the delta belongs to the model, and write."""
    command = parse(Export, argv, prog="remoe export")
    output = Path(command.output)
    if output.exists():
        raise UserError(f"output {output} exists already; name a new one, or remove it first")
    prepare_folder(output.parent)
    model_dir = Path(local_folder(command.model))
    routers = load_for(model_dir, command.router_delta)
    about = describe(command.router_delta, needed=("objective", "config", "metrics", "code_commit"))
    stored = stored_tensors(model_dir, routers)
    if command.gguf is not None:
        patch_gguf(Path(command.gguf), output, routers, stored=stored, about=about)
    else:
        write_folder(model_dir, output, routers, stored=stored, about=about)
    print(f"{len(routers)} router tensors are in {output}; everything else is as in {command.gguf or model_dir}")
