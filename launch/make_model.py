"""`remoe make-model`: a mid-sized checkpoint with routing like that of trained models, to measure paging with.

What the routing is like is measured on the finished checkpoint, by the engine, and written beside it.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import transformers
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from configs.checks import at_least
from configs.command import parse
from configs.files import folder_aside, write_json
from configs.load import UserError
from configs.sizes import parse_size, readable
from data.corpus import DOMAINS, EMBEDDED
from evaluation.benchmark.made_model.made_checkpoint import MISS_SHARES, Recipe, measure, weight_bytes, write_checkpoint
from evaluation.benchmark.made_model.shaped_checkpoint import ShapedModel, write_shaped
from evaluation.benchmark.made_model.synthetic import Shape
from training.model.loading import load_tokenizer
from training.model.quantising import Kind

CONTEXT_TOKENS = 4096
SIZES = {"size", "layers", "hidden", "experts", "top_k", "intermediate", "shared_intermediate", "dtype"}
INTERMEDIATE_STEP = 64  # as in every model in the field; matrices are then whole pages, see `remoe pack`


@dataclass(frozen=True)
class MakeModel:
    """Make a mid-sized mixture-of-experts checkpoint (Qwen2-MoE) with routing like that of trained models: popular and
    unpopular experts, and experts chosen again soon, as often as --eor says.

    One expert has 3 x hidden x intermediate weights; without --intermediate it is chosen so that all weights fill --size.
    With --shape the names, shapes and formats are those of any model, to see what it takes of a machine before it is fetched.

    examples:
      remoe make-model --shape config.json --output runs/models/olmoe
      remoe make-model --output runs/models/mid
      remoe make-model --output runs/models/small --size 256MiB --layers 6 --hidden 512 --experts 32 --top-k 4 --eor 0.4
    """

    output: str  # a new folder; it appears when all is done
    # a config.json, or a folder with one (its tokenizer is used if it has one): a model of that shape instead, quantised as it
    # says; which experts are chosen depends on tokens alone, some more often than others
    shape: str | None = None
    expert_format: Kind | None = None  # with shape: mxfp4, fp8, int4 or int8, whatever the config.json says
    size: str = "2.5GiB"  # of all weights; decides --intermediate
    layers: int = 12  # all of them with experts
    hidden: int = 1024  # a multiple of 128
    experts: int = 64  # of a layer
    top_k: int = 8  # experts that a token chooses
    intermediate: int | None = None  # rows of an expert, instead of --size
    shared_intermediate: int = 64  # rows of the shared expert
    # share of its experts that a token of real text has in common with the one before; in the model's own greedy text it
    # is a little less
    eor: float = 0.37
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # precision of all weights
    seed: int = 0  # of all weights
    # greedy tokens of each of four prompts with which the finished model is measured; 0: only test text
    check_tokens: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.eor < 1:
            raise UserError(f"--eor {self.eor} is no share; write for example 0.35")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"--seed {self.seed} is out of range; write a number from 0 to {2**31 - 1}")
        at_least(self, check_tokens=0, intermediate=1)
        sizes = [f.name for f in fields(self) if f.name in SIZES and getattr(self, f.name) != f.default]
        if self.shape is not None and sizes:
            raise UserError(f"--shape says all sizes; leave --{sizes[0].replace('_', '-')} out")
        if self.shape is None and self.expert_format is not None:
            raise UserError("--expert-format is for --shape; make the model, then write `remoe pack --experts`")


def main(argv: Sequence[str] | None = None) -> None:
    """Make the checkpoint aside, measure it, rename it, print what it is like."""
    command = parse(MakeModel, argv, prog="remoe make-model")
    transformers.utils.logging.disable_progress_bar()
    output = Path(command.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output {output} exists already; name a new folder, or remove it first")
    with folder_aside(output) as aside:
        made, tokenizer = (_write if command.shape is None else _write_shaped)(command, aside)
        made["measured"] = measure(aside, tokenizer, new_tokens=command.check_tokens)
        write_json(aside / "made.json", made)
        (aside / "README.md").write_text(_readme(made), encoding="utf-8")
    _print(output, made)


def _write(command: MakeModel, aside: Path) -> tuple[dict[str, Any], PreTrainedTokenizerBase]:
    tokenizer = load_tokenizer(str(EMBEDDED / "tokenizer"))
    recipe = _recipe(command, len(tokenizer))
    _check_room(aside, weight_bytes(recipe.shape, recipe.dtype))
    return write_checkpoint(aside, recipe, tokenizer), tokenizer


def _write_shaped(command: MakeModel, aside: Path) -> tuple[dict[str, Any], PreTrainedTokenizerBase]:
    path = Path(command.shape or "")
    folder = path if path.is_dir() else path.parent
    if not path.exists() or (path.is_file() and path.name != "config.json"):
        raise UserError(f"--shape {path} is neither a config.json nor a folder with one")
    tokenizer = load_tokenizer(str(folder if (folder / "tokenizer.json").is_file() else EMBEDDED / "tokenizer"))
    model = ShapedModel.of(folder, command.expert_format)
    if (tokens := model.config.get_text_config().vocab_size) < len(tokenizer):
        raise UserError(
            f"{folder}/config.json has {tokens} tokens, and the tokenizer that ships {len(tokenizer)}; put the model's "
            "tokenizer.json beside it"
        )
    _check_room(aside, model.weight_bytes)
    return write_shaped(aside, model, tokenizer, eor=command.eor, seed=command.seed), tokenizer


def _recipe(command: MakeModel, vocabulary: int) -> Recipe:
    """The recipe that the flags ask for; a `UserError` if sizes do not fit together."""
    try:
        shape = Shape(
            hidden=command.hidden,
            layers=command.layers,
            num_experts=command.experts,
            top_k=command.top_k,
            intermediate=command.intermediate or INTERMEDIATE_STEP,
            shared_intermediate=command.shared_intermediate,
            vocabulary=vocabulary,
            context=CONTEXT_TOKENS,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    if command.intermediate is None:
        shape = replace(shape, intermediate=_fitting_intermediate(shape, command.dtype, command.size))
    return Recipe(shape, command.eor, command.seed, command.dtype)


def _fitting_intermediate(shape: Shape, dtype: str, size: str) -> int:
    """The largest multiple of the step with which all weights are at most `size`."""
    none_bytes = weight_bytes(replace(shape, intermediate=0), dtype)
    step_bytes = weight_bytes(replace(shape, intermediate=INTERMEDIATE_STEP), dtype) - none_bytes
    steps = (parse_size(size, what="--size") - none_bytes) // step_bytes
    if steps < 1:
        raise UserError(
            f"--size {size} is too small for {shape.layers} layers of {shape.num_experts} experts with hidden size "
            f"{shape.hidden}: the smallest is {readable(weight_bytes(shape, dtype))}; write more, or fewer experts"
        )
    return steps * INTERMEDIATE_STEP


def _check_room(folder: Path, wanted_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < wanted_bytes:
        raise UserError(
            f"the model has {readable(wanted_bytes)} and the disk of {folder.parent} only {readable(free_bytes)} free; "
            "free some space or write a smaller --size"
        )


def _readme(made: dict[str, Any]) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in _facts(made).items())
    return (
        "# A made model\n\nRandom weights whose routing is like that of trained models; made by `remoe make-model` to "
        "measure expert paging with. It writes noise, not language.\n\n"
        f"| | |\n|---|---|\n{rows}\n\nAll figures are in `made.json`. EOR is the mean share of a token's experts that "
        "the token before it chose too; teacher-forced on test text, and of the model's own greedy text.\n"
    )


def _facts(made: dict[str, Any]) -> dict[str, str]:
    shape, measured = made["shape"], made["measured"]
    forced, greedy = measured["teacher_forced"], measured["greedy"]
    facts = {
        "weights": f"{readable(made['weight_bytes'])}, {made['dtype']}, seed {made['seed']}",
        "layers x experts": f"{shape['layers']} x {shape['num_experts']}, {shape['top_k']} chosen, hidden "
        f"{shape['hidden']}, intermediate {shape['intermediate']}",
        "EOR asked for": f"{made['eor']:.3f}; chance is {forced['chance_reuse_rate']:.3f}",
        "EOR on test text": f"{forced['reuse_rate_mean']:.3f} ({_range(forced['reuse_rate_per_layer'])} by layer)",
        "LRU misses on test text": _misses(forced),
        "load CV on test text": f"{_range(forced['load_cv_per_layer'])} by layer",
    }
    if greedy is not None:
        facts["EOR of greedy decoding"] = (
            f"{greedy['reuse_rate_mean']:.3f} ({_range(greedy['reuse_rate_per_layer'])} by layer)"
        )
        facts["LRU misses of greedy decoding"] = _misses(greedy)
        facts["distinct greedy tokens"] = (
            f"{measured['distinct_tokens']:.0f} of {greedy['n_tokens'] // len(DOMAINS)}; in real text "
            f"{measured['distinct_tokens_in_text']:.0f}; the commonest is {100 * measured['most_common_share']:.1f} %"
        )
    return facts


def _misses(routing: dict[str, Any]) -> str:
    rates = ", ".join(f"{100 * rate:.0f}" for rate in routing["lru_miss_rate"].values())
    return f"{rates} % with {', '.join(f'{100 * share:g}' for share in MISS_SHARES)} % of a layer's experts"


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def _print(output: Path, made: dict[str, Any]) -> None:
    table = Table(title=str(output), show_header=False)
    for name, value in _facts(made).items():
        table.add_row(name, value)
    Console().print(table)
