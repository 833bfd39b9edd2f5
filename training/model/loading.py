"""Loading the model, and deciding which of its tensors train."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from configs.load import UserError
from training.model import frozen_experts, packed_attention
from training.model.expert_format import ExpertFormat
from training.model.expert_layout import ExpertLayout
from training.model.host_memory import sparing_memory
from training.model.layerwise_checkpoint import LayerwiseCheckpoint
from training.model.lazy_weights import (
    check_loaded,
    in_one_precision,
    quantisation_of,
    read_config,
    stored_dtype,
)
from training.model.packed_experts import load_packed, packed_layout
from training.model.quantising import KINDS
from training.model.routers import copy_into_routers, find_routers, router_parameters
from training.model.shards import SINGLE_NAME, read_index, shard_names
from training.model.transformers_internals import GradientCheckpointingLayer

Device = str | torch.device
RouterDelta = Mapping[str, torch.Tensor] | None
"""Parameter name -> weight, as `run_folder.router_delta.load_for` gives it."""

BESIDE_WEIGHTS = ["*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "NOTICE*"]
"""What is fetched from the hub beside the weights that the index names."""
OF_SUBFOLDERS = ["*/*.safetensors", "*/*.json", "*/*.txt", "*/*.model", "*/*.md"]
"""What is not: the same model in other forms, as in `original/`."""


@dataclass
class ModelArguments:
    """Which model, and what of it is trained."""

    model_name_or_path: str | None = None  # folder or hub name of the base model; null: a new one from config_name
    config_name: str | None = None  # folder of a model configuration, to pretrain from nothing
    tokenizer_name: str | None = None  # where the tokenizer is, if not with the model
    trainable: str = "routers"  # what trains: routers (fine-tuning) or all (pretraining)
    bf16: bool = False  # compute in bfloat16 (autocast); routers and optimizer state stay float32
    # what frozen experts of 16 or 32 bits are rounded to, and what they stay in memory: mxfp4, fp8, int4 or int8; null: as
    # stored. Those of a quantised checkpoint stay as they are
    experts: str | None = None
    # frozen experts lie in files in output_dir, that vanish with the process, and are read whenever they are used: for a model
    # larger than memory, on a processor
    experts_on_disk: bool = False
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time

    def __post_init__(self) -> None:
        if self.trainable not in ("routers", "all"):
            raise ValueError(f"trainable={self.trainable!r}: write routers or all")
        if self.experts not in (None, *KINDS):
            raise ValueError(f"experts={self.experts!r}: write {', '.join(KINDS)}, or null")
        if self.experts is not None and self.trainable != "routers":
            raise ValueError(f"experts={self.experts}: experts that train cannot be rounded; write trainable=routers")
        if self.experts_on_disk and self.trainable != "routers":
            raise ValueError("experts_on_disk=true: experts that train must be in memory; write trainable=routers")
        if (self.model_name_or_path is None) == (self.config_name is None):
            raise ValueError("write exactly one of model_name_or_path (a trained model) and config_name (a new one)")
        if self.model_name_or_path is None and self.trainable != "all":
            raise ValueError("a new model (config_name) has nothing worth freezing; write trainable=all")


def local_folder(name_or_path: str) -> str:
    """The folder that is named, or the local copy of a model on the hub, fetched if need be; a `UserError` if neither is."""
    name_or_path = os.path.expanduser(name_or_path)
    _check_exists(name_or_path)
    if Path(name_or_path).is_dir():
        return name_or_path
    try:
        small = snapshot_download(name_or_path, allow_patterns=BESIDE_WEIGHTS, ignore_patterns=OF_SUBFOLDERS)
        weights = [SINGLE_NAME, *shard_names(Path(small))]
        return str(
            snapshot_download(name_or_path, allow_patterns=[*BESIDE_WEIGHTS, *weights], ignore_patterns=OF_SUBFOLDERS)
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UserError(f"model {name_or_path} is no folder and cannot be fetched from the hub: {error}") from error


def load_pretrained(
    name_or_path: str, *, dtype: str | torch.dtype = "auto", device: Device = "cpu", router_delta: RouterDelta = None
) -> PreTrainedModel:
    """A causal language model with experts in eval mode, with the routers of a delta if one is given.

    Raises:
        UserError: the folder is missing or damaged, the model has no routers or others than the delta, or it does not fit
            the device.
    """
    folder = local_folder(name_or_path)
    read_index(folder)
    config = read_config(folder)
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "trust_remote_code": False}
    if quantisation_of(config)[0] is not None:
        options["config"] = config
    try:
        with sparing_memory():
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    except (OSError, SafetensorError, AttributeError, AssertionError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"model {name_or_path} cannot be loaded: {error}") from error
    except RuntimeError as error:  # how transformers reports shapes that differ
        raise UserError(f"model {name_or_path}: the weights do not fit config.json: {error}") from error
    model, info = loaded
    check_loaded(folder, model, info)
    if quantisation_of(config)[0] is not None and dtype != "auto":
        in_one_precision(model, dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype))
    find_routers(model)
    if router_delta is not None:
        copy_into_routers(model, router_delta)
    try:
        return model.eval().to(device)
    except torch.OutOfMemoryError as error:
        size = f"{model.get_memory_footprint() / 2**30:.1f} GiB of weights"
        raise UserError(f"model {name_or_path} has {size}, which do not fit {device}; give cpu as device") from error


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model, or in a folder of its own; a `UserError` if there is none."""
    _check_exists(name_or_path)
    try:
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:  # whatever files raise that are none of a tokenizer's
        raise UserError(f"tokenizer {name_or_path} cannot be loaded: {error!r}") from error


def read_text_config(args: ModelArguments) -> Any:
    """The text model's configuration, without loading any weights."""
    folder = str(args.config_name or local_folder(str(args.model_name_or_path)))
    _check_exists(folder)
    config = (
        read_config(folder) if Path(folder).is_dir() else AutoConfig.from_pretrained(folder, trust_remote_code=False)
    )
    return config.get_text_config()


def weights_dtype(args: ModelArguments) -> str | torch.dtype:
    """float32 masters unless autocast does the arithmetic in bfloat16, where frozen weights stay as stored."""
    return "auto" if args.bf16 and args.model_name_or_path else torch.float32


def build_model(
    args: ModelArguments, *, seed: int, weights: LayerwiseCheckpoint | None = None, disk: Path | None = None
) -> PreTrainedModel:
    """The model to train, frozen as `args` says: loaded, or a new one of `seed`, or the skeleton of `weights`.

    Args:
        disk: folder for experts that are not to be in memory.
    """
    if weights is not None:
        model = weights.skeleton()
    elif args.model_name_or_path is not None:
        model = _frozen_base(args, disk)
    else:
        assert args.config_name is not None, "ModelArguments checks this"
        _check_exists(args.config_name)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(read_config(args.config_name), dtype=torch.float32)
        find_routers(model)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if model.config.get_text_config()._attn_implementation == "sdpa":
        packed_attention.register()
        model.set_attn_implementation(packed_attention.IMPLEMENTATION)
    if args.trainable == "all":
        return model.train()
    model.requires_grad_(False)
    frozen_experts.register()
    model.set_experts_implementation(frozen_experts.IMPLEMENTATION)
    for parameter in router_parameters(model).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return _as_it_is_used(model)


def frozen_layout(args: ModelArguments, folder: str) -> tuple[ExpertLayout, ExpertFormat] | None:
    """The experts of the trained model and their format, if they stay quantised or on disk; a `UserError` if they cannot."""
    if args.trainable != "routers":
        return None
    return packed_layout(folder, args.experts, on_disk=args.experts_on_disk)


def _frozen_base(args: ModelArguments, disk: Path | None) -> PreTrainedModel:
    """The trained model; experts that are quantised, or are to be, stay so if they do not train."""
    folder, dtype = local_folder(str(args.model_name_or_path)), weights_dtype(args)
    packed = frozen_layout(args, folder)
    assert (disk is not None) == args.experts_on_disk, "whoever wants experts on disk says where"
    if packed is None:
        return load_pretrained(folder, dtype=dtype)
    if isinstance(dtype, str):
        named = read_config(folder).dtype
        dtype = named if isinstance(named, torch.dtype) else stored_dtype(folder)
    with sparing_memory():
        return load_packed(folder, *packed, dtype=dtype, disk=disk)


def _as_it_is_used(model: PreTrainedModel) -> PreTrainedModel:
    """Routers learn to choose as they will in inference: no dropout, no jitter; only checkpointing has to know better."""
    model.eval()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
    return model


@torch.no_grad()
def plain_head(model: PreTrainedModel) -> nn.Module | None:
    """What makes the logits of the last hidden states, if it does not train and nothing comes after it."""
    head: nn.Module | None = model.get_output_embeddings()
    if head is None or any(parameter.requires_grad for parameter in head.parameters()):
        return None
    ids_BS = torch.arange(8, device=model.device)[None]
    found: torch.Tensor = head(model.base_model(input_ids=ids_BS, use_cache=False)[0])
    return head if torch.equal(found, model(input_ids=ids_BS, use_cache=False).logits) else None


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of everything that trains, in a fixed order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _check_exists(name_or_path: str) -> None:
    """A path that is written as one must exist; anything else may be a hub name."""
    looks_like_path = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1
    if not Path(name_or_path).exists() and (looks_like_path or Path(name_or_path).parent.is_dir()):
        raise UserError(f"{name_or_path} does not exist; give the folder of a saved model or its name on the hub")
