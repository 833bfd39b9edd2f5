"""Weights of a checkpoint read layer by layer, for models that no process may hold whole.

A model starts as a skeleton: embeddings, head, norm and routers are loaded, everything else in its decoder layers is on the
meta device. `fill` then loads one layer, so that it can be sharded before the next one is read. Names, precisions and
stacked experts are made by transformers' own conversion, which is handed the keys of one layer at a time.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from configs.load import UserError
from training.model.host_memory import spare_memory
from training.model.lazy_weights import TORCH_DTYPES, StaysOnMeta, causal_lm_class, load_slices, read_config
from training.model.routers import find_routers
from training.model.transformers_internals import (
    LoadStateDictConfig,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    get_model_conversion_mapping,
    rename_source_key,
)


def empty_model(folder: str, *, dtype: str | torch.dtype) -> PreTrainedModel:
    """The model of a folder's config.json without weights: all of it is on the meta device.

    Raises:
        UserError: the configuration is missing or unknown, or the model has no routers.
    """
    config = read_config(folder)
    causal_lm_class(folder, config)
    if dtype == "auto":  # as transformers decides
        dtype = config.dtype or _stored_dtype(_lazy_slices(Path(folder)))
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, KeyError) as error:
        raise UserError(f"model {folder} cannot be loaded: {error}") from error
    find_routers(model)
    return model


def decoder_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Name -> decoder layer: the children of the list in which the routers are.

    Raises:
        UserError: there is no such list, or there are several.
    """
    lists = {name.split(".layers.")[0] + ".layers" for name in find_routers(model) if ".layers." in name}
    if len(lists) != 1:
        raise UserError(
            f"{type(model).__name__}: routers are in {sorted(lists) or 'no list of layers'}; one is needed to shard by. "
            "Write --accelerate-config configs/accelerate/multi_gpu.yaml, which shards nothing"
        )
    (name,) = lists
    return {f"{name}.{number}": layer for number, layer in model.get_submodule(name).named_children()}


class LayerwiseCheckpoint:
    """The safetensors of a folder, and which module of the model each of them belongs to."""

    def __init__(self, folder: str, *, dtype: str | torch.dtype) -> None:
        spare_memory()  # for as long as it runs: tensors are gathered again and again
        self._folder = folder
        self._slices = _lazy_slices(Path(folder))
        empty = empty_model(folder, dtype=dtype)
        self._config, self._dtype = empty.config, empty.dtype
        self._transforms: Any = get_model_conversion_mapping(empty)
        renamings = [entry for entry in self._transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._transforms if isinstance(entry, WeightConverter)]
        names = empty.state_dict()
        self._layers, self._routers = list(decoder_layers(empty)), list(find_routers(empty))
        self._target = {
            key: rename_source_key(key, renamings, converters, empty.base_model_prefix, names)[0]
            for key in self._slices
        }

    def skeleton(self) -> PreTrainedModel:
        """The model in eval mode on the CPU, but for what `fill` loads.

        Raises:
            UserError: weights are missing or of another shape.
        """
        slices = {
            key: StaysOnMeta(part.get_shape()) if self._is_filled_later(self._target[key]) else part
            for key, part in self._slices.items()
        }
        return load_slices(self._folder, slices, config=self._config, dtype=self._dtype)

    def fill(self, model: PreTrainedModel, layer: str) -> None:
        """Load all of one decoder layer but its routers; what is loaded is frozen.

        Raises:
            UserError: a shard cannot be read or lacks a tensor.
        """
        keys = [
            key for key, name in self._target.items() if _inside(name, [layer]) and not _inside(name, self._routers)
        ]
        progress_bar_was_on = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            convert_and_load_state_dict_in_model(
                model,
                {key: self._slices[key] for key in keys},
                LoadStateDictConfig(dtype=self._dtype, weight_mapping=self._transforms),
            )
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self._folder}: {layer} cannot be read: {error}") from error
        finally:
            if progress_bar_was_on:
                logging.enable_progress_bar()
        for name, parameter in model.get_submodule(layer).named_parameters(prefix=layer):
            if parameter.is_meta:
                raise UserError(f"{self._folder}: the checkpoint lacks {name}; copy the model again")
            if not _inside(name, self._routers):
                parameter.requires_grad_(False)

    def _is_filled_later(self, name: str) -> bool:
        return _inside(name, self._layers) and not _inside(name, self._routers)


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _lazy_slices(folder: Path) -> Mapping[str, Any]:
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise UserError(
            f"{folder} holds no *.safetensors, which alone can be read layer by layer; save the model as such"
        )
    try:
        files = [safe_open(shard, framework="pt") for shard in shards]
        return {key: file.get_slice(key) for file in files for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: {error}; copy the model again") from error


def _stored_dtype(slices: Mapping[str, Any]) -> torch.dtype:
    """The precision of the first tensor in floating point."""
    found = (TORCH_DTYPES.get(part.get_dtype()) for part in slices.values())
    return next((dtype for dtype in found if dtype is not None), torch.float32)


def expert_modules(module: nn.Module) -> list[nn.Module]:
    """The modules that hold the stacked weights of all experts of a layer, [experts, rows, columns]."""
    return [m for m in module.modules() if any(p.dim() == 3 for p in m.parameters(recurse=False))]
