"""`remoe pack`: a copy of a checkpoint whose experts lie in whole pages, or are quantised, so that less is read or copied."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.command import parse
from configs.files import prepare_folder
from configs.load import UserError
from configs.sizes import readable
from evaluation.engine.store.experts import ExpertStore
from evaluation.engine.store.packing import is_packed, write_packed
from evaluation.engine.store.pages import PAGE_BYTES
from evaluation.export.quantised_folder import write_quantised
from training.model.loading import local_folder
from training.model.quantising import Kind, quantised_format


@dataclass(frozen=True)
class Pack:
    """Copy a checkpoint so that its experts lie in whole pages, or are quantised.

    The copy is an ordinary checkpoint with the same tensors in the same shards; only their order and the headers change, so
    that experts start on pages. Reads past the page cache then go straight into the expert cache. Router deltas of the
    original belong to the copy too. `remoe make-model` writes packed checkpoints.

    examples:
      remoe pack --model allenai/OLMoE-1B-7B-0924-Instruct --output runs/models/olmoe-packed
      remoe generate --model runs/models/olmoe-packed --expert-cache 2GiB --prompt "The sea was"
      remoe pack --model allenai/OLMoE-1B-7B-0924-Instruct --output runs/models/olmoe-mxfp4 --experts mxfp4
    """

    model: str  # folder with safetensors weights, or hub name
    output: str  # a folder that is not there
    # write experts of 4 or 8 bits instead, rounded to the nearest: mxfp4 (4.25 bits a number), int4 (4.5), fp8 or int8, in the
    # standard layout by which transformers knows them; routers and everything else stay as they are
    experts: Kind | None = None


def main(argv: Sequence[str] | None = None) -> None:
    """Check that packing is of use, and write."""
    command = parse(Pack, argv, prog="remoe pack")
    output = Path(command.output)
    if output.exists():
        raise UserError(f"output {output} exists already; name a new one, or remove it first")
    model_dir = Path(local_folder(command.model))
    store = ExpertStore(model_dir)
    if command.experts is not None:
        _quantise(command.experts, store, output)
        return
    if is_packed(store):
        raise UserError(f"the experts of {model_dir} lie in whole pages already; use it as it is")
    odd = [(name, part.stored.length_bytes) for name, part in store.format.parts.items()]
    odd = [(name, length_bytes) for name, length_bytes in odd if length_bytes % PAGE_BYTES]
    if odd:
        raise UserError(
            f"an expert's {odd[0][0]} matrix has {odd[0][1]} bytes, which are no whole pages of "
            f"{PAGE_BYTES}: no order would let all experts start on one; use {model_dir} as it is"
        )
    prepare_folder(output.parent)
    write_packed(model_dir, output)
    print(f"{len(store.shards)} shards with experts are packed in {output}; its tensors are those of {model_dir}")


def _quantise(kind: str, store: ExpertStore, output: Path) -> None:
    """Check that it can be done before anything is written, and write."""
    quantised_format(kind, store.format)
    prepare_folder(output.parent)
    numbers = write_quantised(store.model_dir, output, kind)
    after = ExpertStore(output)
    share = after.format.expert_bytes / store.format.expert_bytes
    print(
        f"{len(store.layer_ids) * store.num_experts} experts are written as {numbers.name} in {output}: {share:.2f} of their "
        f"bytes, {readable(after.all_experts_bytes)} in all; everything else is that of {store.model_dir}"
    )
