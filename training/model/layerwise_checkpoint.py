"""A model that no process may hold whole: a skeleton first, then one decoder layer after the other.

What is quantised is loaded as if it were not, but for experts, which stay so in memory; transformers' own ways to undo it are
for whole models.
"""

from collections.abc import Iterable
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import logging

from configs.load import UserError
from training.model import transformers_internals as internals
from training.model.decoded_slices import decoded_slices
from training.model.host_memory import spare_memory
from training.model.lazy_weights import (
    StaysOnMeta,
    decoder_layers,
    empty_model,
    lazy_slices,
    load_slices,
    names_in_model,
    quantisation_of,
    read_config,
)
from training.model.packed_experts import fill_packed, pack, packed_layout
from training.model.routers import find_routers
from training.model.shards import read_index


class LayerwiseCheckpoint:
    """The safetensors of a folder, and which module of the model each of them belongs to.

    Args:
        experts: what experts of 16 or 32 bits are rounded to; None: they are as stored.

    Raises:
        UserError: a folder that cannot be read, or experts that cannot be had so.
    """

    def __init__(self, folder: str, *, dtype: str | torch.dtype, experts: str | None = None) -> None:
        spare_memory()  # for as long as it runs: tensors are gathered again and again
        self._folder, self._packed, index = folder, packed_layout(folder, experts), read_index(folder)
        empty = empty_model(folder, dtype=dtype)
        self._config, self._dtype = empty.config, empty.dtype
        for part in (self._config, self._config.get_text_config()):
            if hasattr(part, "quantization_config"):
                del part.quantization_config  # of what is decoded here nothing is left to undo
        layout = self._packed[0] if self._packed else None
        apart = set(layout.module_of) | layout.others if layout else set()
        index = {name: tensor for name, tensor in index.items() if name not in apart}
        is_quantised = quantisation_of(read_config(folder))[0] is not None
        self._slices = decoded_slices(index, dtype=self._dtype) if is_quantised else lazy_slices(index)
        self._experts = {name: StaysOnMeta(shape) for name, shape in layout.meta_shapes.items()} if layout else {}
        self._transforms: Any = internals.get_model_conversion_mapping(empty)
        target = names_in_model(empty, self._slices)
        self._routers = list(find_routers(empty))
        others = [key for key, name in target.items() if not _inside(name, self._routers)]
        self._keys = {
            layer: [key for key in others if _inside(target[key], [layer])] for layer in decoder_layers(empty)
        }

    @property
    def is_packed(self) -> bool:
        """Whether experts stay quantised, which transformers' own functions cannot compute with."""
        return self._packed is not None

    def skeleton(self) -> PreTrainedModel:
        """The model in eval mode on the CPU, but for what `fill` loads; may raise what `load_slices` does."""
        later = {key: StaysOnMeta(self._slices[key].get_shape()) for keys in self._keys.values() for key in keys}
        slices = {**self._slices, **later, **self._experts}
        model = load_slices(self._folder, slices, config=self._config, dtype=self._dtype)
        if self._packed is not None:
            pack(model, *self._packed)
        return model

    def fill(self, model: PreTrainedModel, layer: str) -> None:
        """Load all of one decoder layer but its routers; what is loaded is frozen.

        Raises:
            UserError: a shard cannot be read or lacks a tensor.
        """
        slices = {key: self._slices[key] for key in self._keys[layer]}
        how = internals.LoadStateDictConfig(dtype=self._dtype, weight_mapping=self._transforms)
        progress_bar_was_on = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            internals.convert_and_load_state_dict_in_model(model, slices, how)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self._folder}: {layer} cannot be read: {error}") from error
        finally:
            if progress_bar_was_on:
                logging.enable_progress_bar()
        if self._packed is not None:
            fill_packed(model.get_submodule(layer), layer, *self._packed)
        for name, parameter in model.get_submodule(layer).named_parameters(prefix=layer):
            if parameter.is_meta:
                raise UserError(f"{self._folder}: the checkpoint lacks {name}; copy the model again")
            if not _inside(name, self._routers):
                parameter.requires_grad_(False)


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)
