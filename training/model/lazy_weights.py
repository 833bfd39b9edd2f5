"""Weights of a checkpoint as lazy slices, for models of which parts are read later, or never.

transformers' own loader and conversion are given slices, of which some stay on the meta device; so names, precisions, tied
weights, stacked experts and even the memory alignment of what is loaded are what `from_pretrained` would have made.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from configs.load import UserError
from training.model import transformers_internals as internals
from training.model.number_formats.formats import PLAIN_DTYPES
from training.model.routers import find_routers
from training.model.shards import INDEX_NAME, StoredTensor, read_index

QUANTISED = ("mxfp4", "fp8", "compressed-tensors")
"""Ways to quantise (`quant_method` of config.json) that transformers undoes on loading, on any device."""

ADAPTER = re.compile(r"\.(lora_|adapter|modules_to_save\.)")
"""In names of tensors that are no part of a model, but of an adapter beside it."""

LAYER = re.compile(r".*\blayers\.\d+(?=\.)")


class StaysOnMeta:
    """What transformers' loader needs of a lazy slice; loading it gives a meta tensor, whatever device is asked for."""

    def __init__(self, shape: Iterable[int]) -> None:
        self._shape = tuple(shape)

    def __getitem__(self, _: Any) -> "StaysOnMeta":
        return self

    def get_dtype(self) -> str:
        """A precision to compute in: it is not to be dequantised."""
        return "BF16"

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(self._shape, dtype=dtype, device="meta")


def read_config(model_dir: str | Path) -> PretrainedConfig:
    """The configuration of the model in a folder; a `UserError` if there is none that transformers understands."""
    if not (Path(model_dir) / "config.json").is_file():
        raise UserError(f"{model_dir} holds no config.json; give the folder of a saved model")
    try:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
        text_config = config.get_text_config()
        assert isinstance(text_config, PretrainedConfig), "its text_config is none of a model that is known"
    except Exception as error:  # whatever transformers raises where values are none that it expects
        raise UserError(f"{model_dir}/config.json is not understood: {error}") from error
    method, announced = quantisation_of(config)
    if method is not None:
        if method not in QUANTISED or not isinstance(announced, dict):
            raise UserError(
                f"{model_dir} is quantised as {method} (quantization_config of config.json), which is not supported; supported "
                f"are {', '.join(QUANTISED)}. Give the unquantised model, or remove that entry if the weights are not quantised"
            )
        announced["dequantize"] = True  # what transformers loads is what it would compute with on a CPU
    return config


def quantisation_of(config: PretrainedConfig) -> tuple[str | None, Any]:
    """How config.json says that weights are quantised, and the entry that does; None, None: it does not."""
    parts = (getattr(part, "quantization_config", None) for part in (config, config.get_text_config()))
    announced: Any = next((part for part in parts if part is not None), None)
    if announced is None:
        return None, None
    return str(announced.get("quant_method") if isinstance(announced, dict) else announced), announced


def causal_lm_class(model_dir: str | Path, config: PretrainedConfig) -> Any:
    """transformers' class for the model in a folder; a `UserError` if it is no causal language model."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{model_dir}: model type {config.model_type!r} is no causal language model of transformers")
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def load_slices(
    model_dir: str | Path, slices: Mapping[str, Any], *, config: PretrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """The model in evaluation mode on the CPU, but for tensors whose slice is a `StaysOnMeta`.

    Its parameters say `requires_grad`, as `from_pretrained` leaves them: `torch.matmul` looks at that flag when it chooses
    how to multiply, even under `no_grad`, so clearing it gives other last bits (torch 2.13, float32).

    Raises:
        UserError: no causal language model, or weights that are missing from the checkpoint or of another shape.
    """
    model_class = causal_lm_class(model_dir, config)
    if model_class.config_class is config.sub_configs.get("text_config"):  # as AutoModelForCausalLM does
        config = config.get_text_config()
    options: dict[str, Any] = {"config": config, "state_dict": dict(slices), "dtype": dtype}
    try:
        model, info = model_class.from_pretrained(None, **options, output_loading_info=True)
    except RuntimeError as error:  # how transformers reports shapes that differ, and experts that are missing
        raise UserError(f"{model_dir}: the weights do not fit config.json: {error}") from error
    except (AttributeError, AssertionError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{model_dir}/config.json is that of no model that can be made: {error}") from error
    check_loaded(model_dir, model, info)
    model.config.name_or_path = str(model_dir)
    if quantisation_of(read_config(model_dir))[0] is not None:
        in_one_precision(model, dtype)
    return cast(PreTrainedModel, model)


def in_one_precision(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast what is left in another precision of 16 bits: beside quantised weights transformers (5.23) leaves it as stored."""
    for parameter in model.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.to(dtype)


def check_loaded(model_dir: str | Path, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Refuse by a `UserError` what transformers only warns of: weights of the model that were drawn at random because the
    checkpoint lacks them, and weights of its layers, or of an adapter, that it does not use. Layers that it has not got
    (for predicting further tokens, or for pictures) are left alone.

    Args:
        info: the loading report of `from_pretrained`, with what the family ignores already left out.
    """
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    adapters = [name for name in unexpected if ADAPTER.search(name)]
    if adapters:
        raise UserError(f"{model_dir} holds {adapters[0]}, an adapter's; merge it into the model and save that again")
    if missing:
        some = f"{missing[0]}{f' and {len(missing) - 1} others' if len(missing) > 1 else ''}"
        prefixes = {name.removesuffix(key) for name in unexpected for key in missing if name.endswith(f".{key}")}
        looks = "copy the model again"
        if len(prefixes) == 1 and all(name.startswith(prefix) for prefix in prefixes for name in unexpected):
            looks = f"every name begins with {min(prefixes)!r}: save the model without its wrapper"
        elif unexpected:
            looks = f"it has {unexpected[0]} instead; save the model with the transformers that config.json is for"
        raise UserError(f"{model_dir}: the checkpoint lacks {some}; {looks}")
    modules = dict(model.named_modules())
    unused = [name for name in unexpected if (layer := LAYER.match(name)) and layer[0] in modules]
    if unused:
        raise UserError(
            f"{model_dir} holds {unused[0]}, which the model of config.json does not use: it is quantised, or its config is "
            "another model's; give the unquantised model with its own config.json"
        )


def empty_model(folder: str, *, dtype: str | torch.dtype) -> PreTrainedModel:
    """The model of a folder's config.json without weights: all of it is on the meta device.

    Raises:
        UserError: the configuration is missing or unknown, or the model has no routers.
    """
    config = read_config(folder)
    causal_lm_class(folder, config)
    if dtype == "auto":  # as transformers decides: as config.json says, else as the first tensor in floating point
        dtype = config.dtype or stored_dtype(folder)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # as above
        raise UserError(f"{folder}/config.json is that of no model that can be made: {error}") from error
    find_routers(model)
    return model


def names_in_model(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Name of a stored tensor -> name of the model's tensor that it, or it and others, become."""
    transforms: Any = internals.get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, internals.WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, internals.WeightConverter)]
    rest = (renamings, converters, model.base_model_prefix, model.state_dict())
    return {name: internals.rename_source_key(name, *rest)[0] for name in stored}


def stored_tensors(model_dir: str | Path, routers: Mapping[str, torch.Tensor]) -> dict[str, StoredTensor]:
    """The place of each router tensor in the checkpoint, by its name in the loaded model; a `UserError` if it has none."""
    index, found = read_index(model_dir), {}
    stored_as: dict[str, list[str]] = {}
    for stored, name in names_in_model(empty_model(str(model_dir), dtype="auto"), index).items():
        stored_as.setdefault(name, []).append(stored)
    for name, tensor in routers.items():
        places = [index[stored] for stored in stored_as.get(name, [])]
        if len(places) != 1 or places[0].shape != tuple(tensor.shape):
            raise UserError(
                f"{model_dir} holds no tensor of shape {list(tensor.shape)} that becomes the router {name} when transformers "
                "loads it; save the model with save_pretrained and train on that folder"
            )
        found[name] = places[0]
    return found


def decoder_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Name -> decoder layer: the children of the list in which the routers are; a `UserError` if there is no one list."""
    lists = {name.split(".layers.")[0] + ".layers" for name in find_routers(model) if ".layers." in name}
    if len(lists) != 1:
        raise UserError(
            f"{type(model).__name__}: routers are in {sorted(lists) or 'no list of layers'}; one is needed to shard by. "
            "Write --accelerate-config configs/accelerate/multi_gpu.yaml, which shards nothing"
        )
    (name,) = lists
    return {f"{name}.{number}": layer for number, layer in model.get_submodule(name).named_children()}


def lazy_slices(tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """Slices of safetensors by the tensors' names; nothing is read yet."""
    try:
        files = {shard: safe_open(shard, framework="pt") for shard in {tensor.shard for tensor in tensors.values()}}
        return {name: files[tensor.shard].get_slice(name) for name, tensor in tensors.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{error}; copy the model again") from error


def stored_dtype(folder: str | Path) -> torch.dtype:
    """The precision by which transformers goes where config.json names none: the index's, or the first tensor's in the first
    file that is in floating point."""
    tensors, index_path = read_index(folder), Path(folder) / INDEX_NAME
    if index_path.is_file():
        named = json.loads(index_path.read_text(encoding="utf-8")).get("metadata", {}).get("dtype")
        if isinstance(named, str) and isinstance(getattr(torch, named, None), torch.dtype):
            return cast(torch.dtype, getattr(torch, named))
    with safe_open(min(tensor.shard for tensor in tensors.values()), framework="pt") as first:
        names = [first.get_slice(name).get_dtype() for name in first.keys()]  # noqa: SIM118
    known = {**PLAIN_DTYPES, "F64": torch.float64}
    return next((known[name] for name in names if name in known), torch.float32)
