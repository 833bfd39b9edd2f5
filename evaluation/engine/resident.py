"""Everything of a checkpoint but its experts, loaded by transformers itself; the experts stay on the meta device.

transformers' loader is given a state dict of lazy slices of the shards, as it makes for itself, without the experts;
in their place stand tensors that never leave the meta device. So names, precisions, tied weights and even the memory
alignment of every resident weight are what `from_pretrained` would have made, and no expert is ever read. Residents are
copied out of the mapped shards, one after the other.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from configs.load import UserError
from evaluation.engine.device import CPU
from evaluation.engine.slot_memory import TORCH_DTYPES
from evaluation.engine.store.expert_format import ALIGN_BYTES
from evaluation.engine.store.experts import ExpertStore


def read_config(model_dir: str | Path) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        UserError: unreadable, or a model type transformers does not know.
    """
    if not (Path(model_dir) / "config.json").is_file():
        raise UserError(f"{model_dir} holds no config.json; give the folder of a saved model")
    try:
        return AutoConfig.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise UserError(f"{model_dir}/config.json is not understood: {error}") from error


def compute_dtype(dtype: str | torch.dtype, *, config: PretrainedConfig, store: ExpertStore) -> torch.dtype:
    """The precision to compute in; `auto` is the one the checkpoint's config states, else the one it is stored in.

    Raises:
        UserError: no floating-point precision the engine can hold experts in.
    """
    if dtype == "auto":
        dtype = config.dtype if config.dtype is not None else TORCH_DTYPES[store.format.dtype]
    known = {str(known).removeprefix("torch."): known for known in TORCH_DTYPES.values()}
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise UserError(f"dtype {name!r} is not supported; write auto, {', '.join(known)}")
    return known[name]


def load_resident(
    model_dir: str | Path, store: ExpertStore, *, config: PretrainedConfig, dtype: torch.dtype,
    device: torch.device = CPU,
) -> PreTrainedModel:  # fmt: skip
    """The model in evaluation mode, on `device` but for its experts, which are on the meta device.

    Its parameters go on saying `requires_grad`, as `from_pretrained` leaves them: `torch.matmul` looks at that flag
    when it chooses how to multiply, even under `no_grad`, so clearing it gives other last bits (torch 2.13, fp32).

    Raises:
        UserError: no causal language model, or resident weights missing from the checkpoint or of another shape.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{model_dir}: model type {config.model_type!r} is no causal language model of transformers")
    state_dict: dict[str, Any] = {**_lazy_residents(store), **_meta_experts(store)}
    try:
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model, info = model_class.from_pretrained(
            None, config=config, state_dict=state_dict, dtype=dtype, output_loading_info=True
        )
    except RuntimeError as error:  # how transformers reports shapes that differ
        raise UserError(f"{model_dir}: the weights do not fit config.json: {error}") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"]))
        raise UserError(f"{model_dir}: the checkpoint lacks {missing}; copy the model again")
    _copy_out_of_files(model, device)
    model.config.name_or_path = str(model_dir)
    if (Path(model_dir) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(model_dir)
    return model


def _copy_out_of_files(model: PreTrainedModel, device: torch.device) -> None:
    """transformers maps weights from the shards: a file that is cut later would take the process with it (SIGBUS)."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_meta:
            continue
        if device.type != CPU.type:
            tensor.data = tensor.data.to(device)
        elif tensor.is_contiguous():
            tensor.data = _copy_with_alignment(tensor.data)


def _copy_with_alignment(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that starts as far off a 64-byte boundary: last bits of products depend on it."""
    memory = torch.empty(tensor.nbytes + ALIGN_BYTES, dtype=torch.uint8)
    start = (tensor.data_ptr() - memory.data_ptr()) % ALIGN_BYTES
    copy = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def experts_modules(model: PreTrainedModel, store: ExpertStore) -> list[tuple[int, nn.Module]]:
    """(layer id, experts module) in the order the layers run.

    Raises:
        UserError: the experts are of another form than [gate; up] and down, or not behind transformers' interface.
    """
    layer_of = {f".layers.{layer}.": layer for layer in store.layer_ids}
    found = []
    for name, module in model.named_modules():
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            _check_form(name, module, transposed=store.format.transposed)
            found.append((next(layer for part, layer in layer_of.items() if part in f".{name}."), module))
    return found


def _check_form(name: str, experts: nn.Module, *, transposed: bool) -> None:
    wanted = {"has_gate": True, "is_transposed": transposed, "has_post_expert_norm": False}
    for flag, value in wanted.items():
        if getattr(experts, flag, None) != value:
            raise UserError(f"experts module {name} has {flag} other than {value}; that form is not supported")


def _lazy_residents(store: ExpertStore) -> dict[str, Any]:
    files = {shard: safe_open(shard, framework="pt") for shard in {t.shard for t in store.resident.values()}}
    return {name: files[tensor.shard].get_slice(name) for name, tensor in store.resident.items()}


def _meta_experts(store: ExpertStore) -> dict[str, "_StaysOnMeta"]:
    return {name: _StaysOnMeta(shape) for name, shape in store.meta_shapes.items()}


class _StaysOnMeta:
    """What transformers' loader needs of a lazy slice; loading it gives a meta tensor, whatever device is asked for."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def __getitem__(self, _: Any) -> "_StaysOnMeta":
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(self._shape, dtype=dtype, device="meta")
