"""Frozen weights spread over processes; routers stay whole on every one.

What trains is small (a router is experts x hidden numbers) and what does not is the model, so only the frozen weights are
sharded: by torch's `fully_shard` (FSDP2) or by the parameter side of DeepSpeed's ZeRO-3, with or without offload. Both
leave routers alone, whose gradients the loop adds up itself. So optimizer, checkpoints, resume and the router delta are
those of one process, whatever the launcher. What was asked for is read from what `accelerate launch` put into the
environment; a stage of ZeRO below 3 shards nothing but what trains, so weights are replicated and it says so.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from configs.load import UserError
from training.routers import find_routers

REPLICATED, FSDP2, ZERO3 = "replicated", "fsdp2", "zero3"


def make_accelerator(*, bf16: bool) -> Accelerator:
    """One process or what `accelerate launch` started; gloo where there is no accelerator."""
    precision, handlers = "bf16" if bf16 else "no", []
    with_deepspeed, on_cpu = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true", not torch.accelerator.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed looks for one and warns that there is none
    if with_deepspeed:  # it compiles with the ninja that was installed beside this Python
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if on_cpu and with_deepspeed:  # without it accelerate takes this for a run of one process
        handlers = [InitProcessGroupKwargs(backend="gloo")]
    accelerator = Accelerator(
        cpu=on_cpu and not with_deepspeed, mixed_precision=precision, kwargs_handlers=handlers or None
    )
    if with_deepspeed:
        unset_hf_deepspeed_config()  # or transformers would partition the model, routers too, while it loads it
    return accelerator


def wanted(accelerator: Accelerator) -> str:
    """How frozen weights are to be held: `replicated`, `fsdp2` or `zero3`.

    Raises:
        UserError: FSDP1, which cannot shard weights beside others that train.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise UserError("fsdp_version 1 cannot hold frozen and trained weights together; write fsdp_version: 2")
        return FSDP2
    plugin = accelerator.state.deepspeed_plugin if accelerator.state.distributed_type == "DEEPSPEED" else None
    if plugin is None:
        return REPLICATED
    stage = int(plugin.zero_stage)
    if stage < 3:
        accelerator.print(
            f"ZeRO stage {stage} shards gradients and optimizer states of what trains, which is the routers alone: they "
            "and all weights are replicated; write zero_stage: 3 to shard the frozen weights"
        )
    return ZERO3 if stage == 3 else REPLICATED


def place(model: PreTrainedModel, device: Any, *, how: str) -> None:
    """Move to the device what will be whole there: everything, or routers and buffers, the rest as it is sharded."""
    if how == REPLICATED:
        model.to(device)
        return
    for router in find_routers(model).values():
        router.to(device)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def spread(
    model: PreTrainedModel, trained: Mapping[str, nn.Parameter], accelerator: Accelerator, *, how: str
) -> dict[str, Tensor]:
    """Shard all of `model` but `trained`, in place, as `wanted` says.

    Returns:
        The trained tensors by name: the same ones, or those that have taken their place.

    Raises:
        UserError: sharding is asked for and everything trains.
    """
    if how == REPLICATED:
        return dict(trained)
    if len(trained) == len(list(model.parameters())):
        raise UserError(
            f"{how} here shards what does not train; with trainable=all use configs/accelerate/multi_gpu.yaml"
        )
    if how == FSDP2:
        _fully_shard(model, trained, accelerator)
        return dict(trained)
    return _zero3(model, trained, accelerator)


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


def _fully_shard(model: PreTrainedModel, trained: Mapping[str, nn.Parameter], accelerator: Accelerator) -> None:
    """Layer by layer, so that one layer is whole at a time."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    options: dict[str, Any] = {"mesh": mesh, "ignored_params": set(trained.values())}
    for layer in _layers(model):
        fully_shard(layer, **options)
    fully_shard(model, **options)


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers: the children of the list in which the routers are."""
    names = {name.split(".layers.")[0] + ".layers" for name in find_routers(model) if ".layers." in name}
    assert len(names) == 1, f"routers in {names or 'no layers'}: nothing to shard by"
    return list(model.get_submodule(names.pop()).children())


def _zero3(model: PreTrainedModel, trained: Mapping[str, nn.Parameter], accelerator: Accelerator) -> dict[str, Tensor]:
    """DeepSpeed without an optimizer partitions parameters and gathers them around each module, forward and backward.

    It would partition routers too, so these become plain tensors of their modules.
    """
    import deepspeed

    leaves: dict[str, Tensor] = {}
    for name, parameter in trained.items():
        module_name, _, attribute = name.rpartition(".")
        module = model.get_submodule(module_name)
        leaves[name] = parameter.detach().clone().requires_grad_(True)
        delattr(module, attribute)
        setattr(module, attribute, leaves[name])
    plugin: Any = accelerator.state.deepspeed_plugin
    given = plugin.deepspeed_config
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {k: v for k, v in given["zero_optimization"].items() if v != "auto"},
        **{key: given[key] for key in ("aio",) if key in given},
    }
    offload = config["zero_optimization"].get("offload_param") or {}
    remote_device = {"none": None}.get(offload.get("device", "none"), offload.get("device"))
    deepspeed.zero.Init(  # one parameter at a time: `initialize` would move the whole model to the device first
        module=model, config_dict_or_path=config, remote_device=remote_device, dtype=model.dtype
    )
    engine, *_ = deepspeed.initialize(model=model, config=config)
    object.__setattr__(model, "_zero3_engine", engine)  # lives as long as the model; no module of it
    return leaves
