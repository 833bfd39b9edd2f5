"""A model made of lazy slices of a checkpoint's shards, some of which stay on the meta device, to be read later or never.

transformers' own loader is given a state dict as it makes for itself. So names, precisions, tied weights and even the memory
alignment of everything that is loaded are what `from_pretrained` would have made.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel

from configs.load import UserError

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""Precisions in which weights can be computed with, by the names that safetensors has for them."""


class StaysOnMeta:
    """What transformers' loader needs of a lazy slice; loading it gives a meta tensor, whatever device is asked for."""

    def __init__(self, shape: Iterable[int]) -> None:
        self._shape = tuple(shape)

    def __getitem__(self, _: Any) -> "StaysOnMeta":
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(self._shape, dtype=dtype, device="meta")


def read_config(model_dir: str | Path) -> PretrainedConfig:
    """The configuration of the model in a folder.

    Raises:
        UserError: it is missing or unreadable, or of a model type that transformers does not know.
    """
    if not (Path(model_dir) / "config.json").is_file():
        raise UserError(f"{model_dir} holds no config.json; give the folder of a saved model")
    try:
        return AutoConfig.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise UserError(f"{model_dir}/config.json is not understood: {error}") from error


def causal_lm_class(model_dir: str | Path, config: PretrainedConfig) -> Any:
    """transformers' class for the model in a folder.

    Raises:
        UserError: it is no causal language model.
    """
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
    try:
        model, info = model_class.from_pretrained(
            None, config=config, state_dict=dict(slices), dtype=dtype, output_loading_info=True
        )
    except RuntimeError as error:  # how transformers reports shapes that differ, and experts that are missing
        raise UserError(f"{model_dir}: the weights do not fit config.json: {error}") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"]))
        raise UserError(f"{model_dir}: the checkpoint lacks {missing}; copy the model again")
    model.config.name_or_path = str(model_dir)
    loaded: PreTrainedModel = model
    return loaded
