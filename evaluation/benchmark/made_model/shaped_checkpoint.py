"""A checkpoint with the names, shapes and formats of any config.json, and random weights: to see what a model would take.

Names and shapes are those that transformers would save. One tensor is in memory at a time. Hidden states are a part that all
tokens share and a part of each token's own, so that routers choose some experts more often than others; how large the shared part
is decides how often a token's experts were the last token's too.
"""

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from configs.files import write_json
from configs.load import UserError
from evaluation.benchmark.made_model.calibration import angle_for, reuse_rate
from evaluation.benchmark.made_model.synthetic import ROUTER_STD, Source
from evaluation.engine.store.experts import ExpertStore
from evaluation.engine.store.packing import header
from evaluation.export.quantised_folder import announcement, raw, written_as
from training.model.expert_format import ExpertFormat
from training.model.expert_layout import expert_layout
from training.model.lazy_weights import LAYER, empty_model, quantisation_of, read_config
from training.model.number_formats.formats import STORED_DTYPES, NumberFormat, Stored
from training.model.number_formats.mxfp4 import BIAS, Mxfp4
from training.model.quantising import quantised_format
from training.model.routers import most_chosen
from training.model.shards import INDEX_NAME, StoredTensor
from training.model.transformers_internals import revert_weight_conversion

OUTPUT = re.compile(r"\.(o_proj|out_proj|down_proj|w2|output_linear|dense|wo)\b")
OUTPUT_GAIN = 0.3
"""What attention and experts add stays small beside what a token brings, so that all layers see about the same."""
SAMPLED_TOKENS, SAMPLED_LAYERS, SAMPLED_ROWS = 4096, 32, 256
ZERO = re.compile(r"(bias|sinks|A_log)$")
PREFIX = "model"


@dataclass(frozen=True)
class ShapedModel:
    """What is to be written.

    Attributes:
        folder: with the config.json that is meant.
        names: every tensor of 16 bits by name, as transformers would save it.
        numbers: the format of the experts; None: they have 16 bits.
    """

    folder: Path
    config: PretrainedConfig
    names: Mapping[str, StoredTensor]
    experts: frozenset[str]
    form: ExpertFormat
    numbers: NumberFormat | None
    top_k: int
    num_experts: int
    layers: int

    @classmethod
    def of(cls, folder: Path, kind: str | None) -> "ShapedModel":
        """The model of a config.json, experts as it announces them or in the format `kind`; a `UserError` if there is none."""
        config = read_config(folder)
        kind = kind or _announced(config, folder)
        model = empty_model(str(folder), dtype=torch.bfloat16)
        names = {
            name: StoredTensor(name, folder, "BF16", tuple(tensor.shape), 0, 2 * tensor.numel())
            for name, tensor in _saved(model).items()
        }
        layout = expert_layout(names, folder)
        numbers = None if kind is None else quantised_format(kind, layout.format)
        return cls(
            folder, config, names, frozenset(layout.module_of), layout.format, numbers, most_chosen(model), layout.num_experts,
            len(layout.layer_ids),
        )  # fmt: skip

    @property
    def weight_bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(one.length_bytes for tensor in self.names.values() for one in self.written(tensor))

    def written(self, tensor: StoredTensor) -> list[StoredTensor]:
        """What a tensor is stored as: itself, or numbers and scales."""
        if self.numbers is None or tensor.name not in self.experts:
            return [tensor]
        return written_as(tensor, self.numbers, is_transposed=self.form.transposed)

    def shards(self) -> list[list[StoredTensor]]:
        """The tensors of each layer, and those outside of layers."""
        found: dict[str, list[StoredTensor]] = {}
        for name, tensor in self.names.items():
            layer = LAYER.match(name)
            found.setdefault(layer[0] if layer else "", []).append(tensor)
        return list(found.values())


def write_shaped(
    folder: Path, model: ShapedModel, tokenizer: PreTrainedTokenizerBase, *, eor: float, seed: int
) -> dict[str, Any]:
    """Write config, tokenizer, shards and their index; returns what was made, as `write_checkpoint` does."""
    config = json.loads((model.folder / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    config["dtype"] = "bfloat16"
    shutil.copyfile(model.folder / "config.json", folder / "config.json")
    tokenizer.save_pretrained(folder)
    shared = shared_part(eor, model.num_experts, model.top_k)
    shards, shard_of = model.shards(), {}
    place = 0
    for number, tensors in enumerate(tqdm(shards, desc="layers", unit="file"), 1):
        name = f"{PREFIX}-{number:05}-of-{len(shards):05}.safetensors"
        with (folder / name).open("wb") as file:
            file.write(header({"format": "pt"}, [one for tensor in tensors for one in model.written(tensor)]))
            for tensor in tensors:
                place += 1
                for one, numbers in zip(
                    model.written(tensor), _drawn(model, tensor, Source(seed, place), shared), strict=True
                ):
                    file.write(raw(numbers))
                    shard_of[one.name] = name
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": model.weight_bytes}, "weight_map": shard_of})
    if model.numbers is not None:
        config["quantization_config"] = announcement(model.numbers, ExpertStore(folder))
    write_json(folder / "config.json", config)
    shape = {
        "layers": model.layers, "num_experts": model.num_experts, "top_k": model.top_k, "hidden": model.form.hidden,
        "intermediate": model.form.intermediate,
    }  # fmt: skip
    dtype = "bfloat16" if model.numbers is None else f"bfloat16, experts in {model.numbers.name}"
    return {"shape": shape, "eor": eor, "seed": seed, "dtype": dtype, "weight_bytes": model.weight_bytes}


def shared_part(eor: float, num_experts: int, top_k: int) -> float:
    """The share of a hidden state's squares that all tokens have in common, with which a token's experts are the last one's
    this often. Where even chance is more often than asked for, none.
    """
    source = Source(0, 0)
    own_TE = source.normal(SAMPLED_TOKENS, num_experts)
    shared_TE = source.normal(SAMPLED_LAYERS, num_experts).repeat_interleave(SAMPLED_TOKENS // SAMPLED_LAYERS, dim=0)

    def measured(angle: float) -> float:
        return reuse_rate(math.sin(angle) * shared_TE + math.cos(angle) * own_TE, top_k, rows=SAMPLED_LAYERS)

    return math.sin(angle_for(eor, measured)) ** 2


def _announced(config: PretrainedConfig, folder: Path) -> str | None:
    """The kind of quantised experts that config.json announces."""
    method, how = quantisation_of(config)
    if method != "compressed-tensors":
        return method
    weights = [group.get("weights") or {} for group in how.get("config_groups", {}).values()]
    kinds = {f"{one.get('type')}{one.get('num_bits')}".replace("float4", "mxfp4") for one in weights}
    if len(kinds) != 1 or not kinds <= {"mxfp4", "int4", "int8"}:
        raise UserError(
            f"{folder}/config.json announces weights of {', '.join(sorted(kinds)) or 'no kind'}; write --expert-format "
            "mxfp4, fp8, int4 or int8"
        )
    return kinds.pop()


def _saved(model: PreTrainedModel) -> dict[str, Tensor]:
    """Name -> a meta tensor of that shape, for all that `save_pretrained` would write."""
    tied: set[int] = set()
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in tied:
            tied.add(id(tensor))
            state[name] = tensor.detach()
    return dict(sorted(revert_weight_conversion(model, state).items()))


def _drawn(model: ShapedModel, tensor: StoredTensor, source: Source, shared: float) -> Iterator[Tensor]:
    """The numbers of a tensor, in the order of `written`."""
    is_expert = tensor.name in model.experts
    inputs = tensor.shape[-2 if is_expert and model.form.transposed else -1]
    size = (OUTPUT_GAIN if OUTPUT.search(tensor.name) else 1) / math.sqrt(inputs)
    if is_expert and model.numbers is not None:
        for part in model.written(tensor):
            yield (
                torch.tensor(tensor.shape)
                if part.name.endswith("_shape")
                else _packed(model.numbers, part, source, size)
            )
    elif ZERO.search(tensor.name):
        yield torch.zeros(tensor.shape, dtype=torch.bfloat16)
    elif (
        len(tensor.shape) == 1 and LAYER.match(tensor.name) is None
    ):  # or a tied output layer would repeat the last token
        yield source.normal(*tensor.shape).sign().to(torch.bfloat16)
    elif len(tensor.shape) == 1:
        yield torch.ones(tensor.shape, dtype=torch.bfloat16)
    elif "embed" in tensor.name:
        shared_H = source.normal(tensor.shape[1])
        own_VH = source.normal(*tensor.shape).mul_(math.sqrt(1 - shared))
        yield own_VH.add_(math.sqrt(shared) * shared_H).to(torch.bfloat16)
    else:
        is_router = len(tensor.shape) == 2 and tensor.shape == (model.num_experts, model.form.hidden)
        yield (source.normal(*tensor.shape) * (ROUTER_STD * size if is_router else size)).to(torch.bfloat16)


def _packed(numbers: NumberFormat, part: StoredTensor, source: Source, size: float) -> Tensor:
    """Codes that are all equally likely, or a scale with which numbers are of this size."""
    if "_scale" in part.name:
        return _scales(part, numbers, size / _size_of_codes(numbers))
    return _codes(part, source)


def _codes(part: Stored | StoredTensor, source: Source) -> Tensor:
    """Any bytes, but none of FP8 that is no number."""
    stored = STORED_DTYPES[part.dtype]
    found = source.bytes(math.prod(part.shape) * stored.itemsize)
    if part.dtype == "F8_E4M3":
        found[found % 128 == 127] = 0
    return found.view(stored).view(part.shape)


def _scales(part: Stored | StoredTensor, numbers: NumberFormat, scale: float) -> Tensor:
    """The same for all blocks."""
    value = BIAS + round(math.log2(scale)) if isinstance(numbers, Mxfp4) else scale
    return torch.full(part.shape, value, dtype=STORED_DTYPES[part.dtype])


def _size_of_codes(numbers: NumberFormat) -> float:
    """The root of the mean square of all codes alike, times a scale of 1."""
    source, sample = Source(0, 0), numbers.tensors(SAMPLED_ROWS, SAMPLED_ROWS)
    stored = {e: _scales(one, numbers, 1.0) if "_scale" in e else _codes(one, source) for e, one in sample.items()}
    return float(numbers.values(stored).float().square().mean().sqrt())
