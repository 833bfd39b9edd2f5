"""Everything of a checkpoint but its experts, loaded by transformers itself; the experts stay on the meta device.

No expert is ever read (`training/model/lazy_weights.py`). Residents are copied out of the mapped shards, one after the
other.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from configs.load import UserError
from evaluation.engine.device import Device
from evaluation.engine.store.experts import ExpertStore
from training.model.lazy_weights import StaysOnMeta, lazy_slices, load_slices, stored_dtype
from training.model.number_formats.formats import PLAIN_DTYPES
from training.model.packed_experts import check_form, layer_id


def compute_dtype(dtype: str | torch.dtype, *, config: PretrainedConfig, store: ExpertStore) -> torch.dtype:
    """The precision to compute in, or `UserError`; `auto`: as transformers decides."""
    if dtype == "auto":
        dtype = config.dtype if config.dtype is not None else stored_dtype(store.model_dir)
    known = {str(known).removeprefix("torch."): known for known in PLAIN_DTYPES.values()}
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise UserError(f"dtype {name!r} is not supported; write auto, {', '.join(known)}")
    return known[name]


def load_resident(
    model_dir: str | Path, store: ExpertStore, *, config: PretrainedConfig, dtype: torch.dtype, device: Device
) -> PreTrainedModel:
    """The model in evaluation mode, on `device` but for its experts, which are on the meta device.

    Raises:
        UserError: no causal language model, or resident weights missing from the checkpoint or of another shape.
    """
    later = {name: StaysOnMeta(shape) for name, shape in store.meta_shapes.items()}
    slices = {**lazy_slices(store.resident), **later}
    model = load_slices(model_dir, slices, config=config, dtype=dtype)
    _copy_out_of_files(model, device)
    return model


def _copy_out_of_files(model: PreTrainedModel, device: Device) -> None:
    """transformers maps weights from the shards: a file that is cut later would take the process with it (SIGBUS)."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if not tensor.is_meta:
            tensor.data = device.resident(tensor.data)


def experts_modules(
    model: PreTrainedModel, layer_ids: Sequence[int], *, transposed: bool
) -> list[tuple[int, nn.Module]]:
    """(layer id, experts module on the meta device) in the order the layers run.

    Raises:
        UserError: experts are no [gate; up] and down.
    """
    found = []
    for name, module in model.named_modules():
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            check_form(name, module, transposed=transposed)
            found.append((layer_id(name, layer_ids), module))
    return found
