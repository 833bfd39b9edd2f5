"""`remoe pack`: a copy of a checkpoint whose experts lie in whole pages, which the engine reads without copying them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.command import parse
from configs.files import prepare_folder
from configs.load import UserError
from evaluation.engine.store.experts import ExpertStore
from evaluation.engine.store.packing import is_packed, write_packed
from evaluation.engine.store.pages import PAGE_BYTES
from training.model.loading import local_folder


@dataclass(frozen=True)
class Pack:
    """Copy a checkpoint so that its experts lie in whole pages: they are then read without being copied.

    The copy is an ordinary checkpoint with the same tensors in the same shards; only their order and the headers change, so
    that experts start on pages. Reads past the page cache then go straight into the expert cache. Router deltas of the
    original belong to the copy too. `remoe make-model` writes packed checkpoints.

    examples:
      remoe pack --model allenai/OLMoE-1B-7B-0924-Instruct --output runs/models/olmoe-packed
      remoe generate --model runs/models/olmoe-packed --expert-cache 2GiB --prompt "The sea was"
    """

    model: str  # folder with safetensors weights, or hub name
    output: str  # a folder that is not there


def main(argv: Sequence[str] | None = None) -> None:
    """Check that packing is of use, and write."""
    command = parse(Pack, argv, prog="remoe pack")
    output = Path(command.output)
    if output.exists():
        raise UserError(f"output {output} exists already; name a new one, or remove it first")
    model_dir = Path(local_folder(command.model))
    store = ExpertStore(model_dir)
    if is_packed(store):
        raise UserError(f"the experts of {model_dir} lie in whole pages already; use it as it is")
    odd = [role for role in store.format.roles if store.format.role_bytes(role) % PAGE_BYTES]
    if odd:
        raise UserError(
            f"an expert's {odd[0]} matrix has {store.format.role_bytes(odd[0])} bytes, which are no whole pages of "
            f"{PAGE_BYTES}: no order would let all experts start on one; use {model_dir} as it is"
        )
    prepare_folder(output.parent)
    write_packed(model_dir, output)
    print(f"{len(store.shards)} shards with experts are packed in {output}; its tensors are those of {model_dir}")
