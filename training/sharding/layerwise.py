"""Frozen weights sharded over processes, layer by layer; routers stay whole on every one.

What trains is small (a router is experts x hidden numbers) and what does not is the model, so only the frozen weights are
sharded, layer by layer as they are loaded: by torch's `fully_shard` (FSDP2) or by the parameter side of DeepSpeed's ZeRO-3,
with or without offload. Both leave routers alone, whose gradients the loop adds up itself. So optimizer, checkpoints, resume
and the router delta are those of one process, whatever the launcher.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import PreTrainedModel

from training.model.lazy_weights import LayerwiseCheckpoint, decoder_layers
from training.model.routers import find_routers
from training.run_folder import proof
from training.sharding.launcher import FSDP2, REPLICATED
from training.sharding.zero3 import Zero3

Parameters = Mapping[str, nn.Parameter]


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
    model: PreTrainedModel, trained: Parameters, accelerator: Accelerator, *, layout: str, weights: LayerwiseCheckpoint
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Load the decoder layers of a skeleton, each of them sharded before the next one is read.

    Returns:
        The trained tensors by name (the same ones, or those that have taken their place), and the digests of all others.
    """
    layers = decoder_layers(model)
    digest_of = proof.digests(((name, t) for name, t in model.state_dict().items() if not t.is_meta), trained)
    sharder = _FullyShard(model, trained, accelerator) if layout == FSDP2 else Zero3(model, trained, accelerator)
    for name, layer in tqdm(layers.items(), desc="loading", unit="layer", disable=not accelerator.is_main_process):
        weights.fill(model, name)
        tensors = {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
        digest_of |= proof.digests(((key, t) for key, t in tensors.items() if key not in digest_of), trained)
        sharder.shard(layer)
    sharder.shard_rest()
    return sharder.trained, digest_of


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
