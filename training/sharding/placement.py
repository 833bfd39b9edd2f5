"""How many bytes of weights each process will hold where, before anything is loaded; which launcher makes them fit.

Weights are counted exactly, from the configuration; activations and what libraries hold come on top.
"""

import os
from dataclasses import dataclass

import psutil
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from configs.load import UserError
from configs.sizes import size_text
from training.model.host_memory import memory_limit
from training.model.lazy_weights import decoder_layers, empty_model
from training.model.loading import ModelArguments, frozen_layout, local_folder, weights_dtype
from training.model.packed_experts import expert_modules, pack, packed_matrices
from training.sharding.launcher import FSDP2, NVME, REPLICATED, ZERO3, offload_device


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's weights, in the precision they are trained in."""

    total: int
    experts: int
    largest_layer: int
    swap_buffers: int  # what an offload to disk holds in memory
    decoded: int = 0  # where packed experts of one matrix and layer are decoded


@dataclass(frozen=True)
class Placement:
    """Bytes of weights that one process holds: on its device (the host's memory, if that is a CPU), beside it, on disk."""

    device: int
    host: int
    disk: int


def placement(
    sizes: Sizes, *, layout: str, offload: str | None, processes: int, experts_on_disk: bool = False
) -> Placement:
    """What each of that many processes holds; a sharded model has one layer whole at a time."""
    if experts_on_disk:
        return Placement(device=sizes.total - sizes.experts + sizes.decoded, host=0, disk=sizes.experts)
    if layout == REPLICATED:
        return Placement(device=sizes.total + sizes.decoded, host=0, disk=0)
    share, in_use = -(-sizes.total // processes), sizes.largest_layer + sizes.decoded
    if layout == FSDP2 or offload is None:
        return Placement(device=share + in_use, host=0, disk=0)
    if offload != NVME:
        return Placement(device=in_use, host=share, disk=0)
    rest = -(-(sizes.total - sizes.experts) // processes)
    buffers = -(-sizes.swap_buffers // processes)
    return Placement(device=in_use, host=rest + buffers, disk=-(-sizes.experts // processes))


def check_memory(args: ModelArguments, accelerator: Accelerator, *, layout: str) -> None:
    """Print what every process will hold, or refuse it if there is less memory; the message names a launcher that fits."""
    if args.model_name_or_path is None:
        return
    folder = local_folder(args.model_name_or_path)
    model = empty_model(folder, dtype=weights_dtype(args))
    packed = frozen_layout(args, folder)
    if args.experts_on_disk and (layout != REPLICATED or accelerator.device.type != "cpu"):
        raise UserError(
            f"experts_on_disk=true: on {accelerator.device.type} with {layout} weights experts are not read from there; leave it "
            "out, or write --accelerate-config configs/accelerate/deepspeed_zero3_nvme.yaml"
        )
    if packed is not None:
        pack(model, *packed)
    sizes, offload = sizes_of(model), offload_device(accelerator)
    how = {"layout": layout, "offload": offload, "processes": accelerator.num_processes}
    planned = placement(sizes, **how, experts_on_disk=args.experts_on_disk)
    parts = [f"{size_text(planned.device)} on its {accelerator.device.type}"]
    parts += [f"{size_text(planned.host)} in the host's memory"] * bool(planned.host)
    parts += [f"{size_text(planned.disk)} on disk"] * bool(planned.disk)
    precision = str(model.dtype).removeprefix("torch.")
    experts = size_text(sizes.experts) + (f" in {packed[1].numbers.name}" if packed else "")
    accelerator.print(
        f"weights: {size_text(sizes.total)} in {precision}, of it experts {experts}, largest layer "
        f"{size_text(sizes.largest_layer)}; each process will hold {', '.join(parts)} (activations come on top)"
    )
    free = FreeMemory(accelerator)
    if shortage := free.shortage_for(planned):
        halved = "" if args.bf16 or model.dtype != torch.float32 else ", or bf16=true, which may halve them"
        may_be_on_disk = free.on_cpu and args.trainable == "routers" and not args.experts_on_disk
        raise UserError(f"{shortage}; {_advice(sizes, free, may_be_on_disk=may_be_on_disk)}{halved}")


def sizes_of(model: PreTrainedModel) -> Sizes:
    """The sizes of a model's weights; it may be on the meta device."""
    experts = [list(module.parameters(recurse=False)) for module in expert_modules(model)]
    try:
        layers = list(decoder_layers(model).values())
    except UserError:  # such a model cannot be sharded
        layers = [model]
    total, *of_layers = (sum(tensor.nbytes for tensor in module.parameters()) for module in (model, *layers))
    of_experts = sum(tensor.nbytes for tensors in experts for tensor in tensors)
    buffers = ((1 + len(tensors)) * max(tensor.nbytes for tensor in tensors) for tensors in experts)
    decoded = (
        packed.shape.numel() * packed.dtype.itemsize for each in model.modules() for packed in packed_matrices(each)
    )
    return Sizes(
        total,
        of_experts,
        largest_layer=max(of_layers),
        swap_buffers=max(buffers, default=0),
        decoded=max(decoded, default=0),
    )


class FreeMemory:
    """Bytes that this machine has free for the processes of one run."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.on_cpu = accelerator.device.type == "cpu"
        self.processes = accelerator.num_processes
        # torch's launcher says how many share the host; one process that was started alone has it to itself
        self.local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.host = min(psutil.virtual_memory().available, memory_limit() or 2**63)
        self.device = self.host if self.on_cpu else torch.accelerator.get_memory_info(accelerator.device)[0]

    def shortage_for(self, planned: Placement) -> str | None:
        """In words, what there is too little of; None if all fits."""
        host = self.local_processes * (planned.host + (planned.device if self.on_cpu else 0))
        if host > self.host:
            processes = f"{self.local_processes} process{'es' * (self.local_processes > 1)}"
            return f"weights need {size_text(host)} of the host's memory ({processes}), {size_text(self.host)} are free"
        if not self.on_cpu and planned.device > self.device:
            return f"weights need {size_text(planned.device)} on every device, {size_text(self.device)} are free"
        return None


def _advice(sizes: Sizes, free: FreeMemory, *, may_be_on_disk: bool) -> str:
    on_disk = placement(sizes, layout=REPLICATED, offload=None, processes=free.processes, experts_on_disk=True)
    if may_be_on_disk and free.shortage_for(on_disk) is None:
        return "write experts_on_disk=true"
    zero3 = {"deepspeed_zero3_cpu_offload": (ZERO3, "cpu"), "deepspeed_zero3_nvme": (ZERO3, NVME)}
    for name, (layout, offload) in {"fsdp2": (FSDP2, None), **zero3}.items():
        if free.shortage_for(placement(sizes, layout=layout, offload=offload, processes=free.processes)) is None:
            return f"write --accelerate-config configs/accelerate/{name}.yaml"
    return "no launcher here makes them fit: give more memory or more processes on other machines"
