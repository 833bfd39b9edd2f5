"""Frozen weights sharded over processes, layer by layer; routers stay whole on every one.

What trains is small (a router is experts x hidden numbers) and what does not is the model, so only the frozen weights are
sharded, layer by layer as they are loaded: by torch's `fully_shard` (FSDP2) or by the parameter side of DeepSpeed's ZeRO-3,
with or without offload. Both leave routers alone, whose gradients the loop adds up itself. So optimizer, checkpoints, resume
and the router delta are those of one process, whatever the launcher.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import PreTrainedModel

from configs.load import UserError
from training.model import frozen_experts
from training.model.layerwise_checkpoint import LayerwiseCheckpoint
from training.model.lazy_weights import decoder_layers
from training.model.packed_experts import expert_modules
from training.model.routers import find_routers, router_parameters
from training.sharding.launcher import FSDP2, NVME, REPLICATED, offload_device

Parameters = Mapping[str, nn.Parameter]
PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
"""What DeepSpeed's configuration calls them; float32 is neither."""


def move_whole_tensors(model: PreTrainedModel, device: torch.device, *, layout: str) -> None:
    """Move to the device what will be whole there: everything, or routers and buffers where the rest is sharded."""
    if layout == REPLICATED:
        model.to(device)  # type: ignore[arg-type]
        return
    for router in find_routers(model).values():
        router.to(device)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def load_layerwise(
    model: PreTrainedModel, trained: Parameters, accelerator: Accelerator, *, layout: str, weights: LayerwiseCheckpoint,
    found: Callable[[Iterable[tuple[str, Tensor]]], object] = lambda _: None,
) -> dict[str, Tensor]:  # fmt: skip
    """Load the decoder layers of a skeleton, each of them sharded before the next one is read.

    Args:
        found: told the names and values of all tensors while they are whole, layer by layer.

    Returns:
        The trained tensors by name: the same ones, or those that have taken their place.
    """
    layers, known = decoder_layers(model), set[str]()

    def tell(tensors: Mapping[str, Tensor]) -> None:
        new = {name: tensor for name, tensor in tensors.items() if name not in known and not tensor.is_meta}
        known.update(new)
        found(new.items())

    tell(model.state_dict())
    sharder = _FullyShard(model, trained, accelerator) if layout == FSDP2 else _Zero3(model, trained, accelerator)
    for name, layer in tqdm(layers.items(), desc="loading", unit="layer", disable=not accelerator.is_main_process):
        weights.fill(model, name)
        tell({f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()})
        sharder.shard(layer)
    sharder.shard_rest()
    return sharder.trained


def load_sharded(folder: str, accelerator: Accelerator, *, layout: str, dtype: str | torch.dtype) -> PreTrainedModel:
    """A model for inference that no process holds whole; all of them call it together, with the same inputs.

    Raises:
        UserError: see `LayerwiseCheckpoint`; or the layers cannot be told apart.
    """
    weights = LayerwiseCheckpoint(folder, dtype=dtype)
    model = weights.skeleton()
    model.requires_grad_(False)
    if weights.is_packed:
        frozen_experts.register()
        model.set_experts_implementation(frozen_experts.IMPLEMENTATION)
    routers = router_parameters(model)  # found out while they are whole
    move_whole_tensors(model, accelerator.device, layout=layout)
    load_layerwise(model, routers, accelerator, layout=layout, weights=weights)
    for tensor in router_parameters(model).values():
        tensor.requires_grad_(False)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether its processes hold parts of its weights, so that it may only be called as a whole, and by all of them."""
    return any(isinstance(tensor, DTensor) or hasattr(tensor, "ds_status") for tensor in model.parameters())


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its tokens; of a sharded one parts may lie elsewhere, but never its routers."""
    return next(iter(router_parameters(model).values())).device if is_sharded(model) else model.device


def whole_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every saved tensor, gathered one at a time; all processes must go through it together."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, DTensor):
            yield name, tensor.full_tensor()
        elif hasattr(tensor, "ds_status") and tensor.ds_status.name == "NOT_AVAILABLE":
            import deepspeed  # seconds, for those alone who use it

            with deepspeed.zero.GatheredParameters([tensor]):
                yield name, tensor.data
        else:
            yield name, tensor


class _FullyShard:
    """torch's FSDP2, layer by layer, so that one layer is whole at a time."""

    def __init__(self, model: PreTrainedModel, trained: Parameters, accelerator: Accelerator) -> None:
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        self._model, self.trained = model, dict[str, Tensor](trained)
        self._options: dict[str, Any] = {"mesh": mesh, "ignored_params": set(trained.values())}

    def shard(self, layer: nn.Module) -> None:
        fully_shard(layer, **self._options)

    def shard_rest(self) -> None:
        fully_shard(self._model, **self._options)


class _Zero3:
    """DeepSpeed without an optimizer partitions parameters and gathers them around each module, forward and backward.

    It would partition routers too, so these become plain tensors of their modules. With offload to NVMe experts go to disk
    and all else to the host's memory, so that DeepSpeed's buffers, each as large as the largest tensor, are few.
    """

    def __init__(self, model: PreTrainedModel, trained: Parameters, accelerator: Accelerator) -> None:
        self._model = model
        self.trained: dict[str, Tensor] = {}
        for name, parameter in trained.items():
            module_name, _, attribute = name.rpartition(".")
            module = model.get_submodule(module_name)
            self.trained[name] = parameter.detach().clone().requires_grad_(True)
            delattr(module, attribute)
            setattr(module, attribute, self.trained[name])
        given: Any = accelerator.state.deepspeed_plugin.deepspeed_config
        zero = {key: value for key, value in given["zero_optimization"].items() if value != "auto"}
        config = {"train_micro_batch_size_per_gpu": 1, **{key: given[key] for key in ("aio",) if key in given}}
        self._device = offload_device(accelerator)
        beside = {"offload_param": {"device": "cpu"}} if self._device == NVME else {}
        self._in_memory = {**config, "zero_optimization": {**zero, **beside}}
        if self._device == NVME:
            swapping = self._swapping(zero["offload_param"], accelerator)
            self._on_disk = {**config, "zero_optimization": {**zero, **swapping}}
            self._start_swapping()

    def shard(self, layer: nn.Module) -> None:
        import deepspeed  # seconds, for those alone who use it

        if self._device == NVME:
            for experts in expert_modules(layer):
                deepspeed.zero.Init(module=experts, config_dict_or_path=self._on_disk, param_swapper=self._swapper)
        # what is partitioned already stays as it is
        deepspeed.zero.Init(module=layer, config_dict_or_path=self._in_memory)

    def shard_rest(self) -> None:
        import deepspeed

        self.shard(self._model)
        config = self._on_disk if self._device == NVME else self._in_memory
        plain = {key: value for key, value in config.items() if key not in PRECISIONS.values()}  # nothing is converted
        engine, *_ = deepspeed.initialize(model=self._model, config=plain)
        object.__setattr__(self._model, "_zero3_engine", engine)  # lives as long as the model; no module of it

    def _swapping(self, offload: Mapping[str, Any], accelerator: Accelerator) -> dict[str, Any]:
        """Options of the offload: a folder of this process's own, buffers for one layer's experts, nothing kept whole beyond."""
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise UserError("offload to nvme needs libaio's headers: install Debian's libaio-dev (RPM: libaio-devel)")
        parent = offload.get("nvme_path")
        if parent in (None, "none"):
            raise UserError(
                "no nvme_path to offload to: accelerate does not pass on offload_param_nvme_path of its YAML; write "
                "deepspeed_config_file there, and nvme_path in that JSON, as in configs/accelerate/deepspeed_zero3_nvme.yaml"
            )
        try:
            Path(parent).mkdir(parents=True, exist_ok=True)
            folder = tempfile.TemporaryDirectory(dir=parent, prefix=f"process{accelerator.process_index}-")
        except OSError as error:
            raise UserError(f"nvme_path {parent} cannot be written: {error}") from error
        object.__setattr__(self._model, "_zero3_folder", folder)  # removed with the model
        experts = [list(module.parameters(recurse=False)) for module in expert_modules(self._model)]
        largest = max(tensor.numel() for tensors in experts for tensor in tensors)
        size = -(-largest // accelerator.num_processes) + accelerator.num_processes
        buffers = {"buffer_size": size, "buffer_count": 1 + max(len(tensors) for tensors in experts)}
        limits = ("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size")
        return {**dict.fromkeys(limits, 0), "offload_param": {**buffers, **offload, "nvme_path": folder.name}}

    def _start_swapping(self) -> None:
        """One swapper for all layers, in the precision of the experts, which it takes from the configuration alone."""
        import deepspeed

        dtype = next(expert_modules(self._model)[0].parameters()).dtype
        if dtype in PRECISIONS:
            self._on_disk[PRECISIONS[dtype]] = {"enabled": True}
        self._swapper = deepspeed.zero.Init(config_dict_or_path=self._on_disk).param_swapper
