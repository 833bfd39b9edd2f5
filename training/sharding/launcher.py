"""What `accelerate launch` asked for: processes, and the layout of frozen weights over them.

Both are read from what the launcher put into the environment. A stage of ZeRO below 3 shards nothing but what trains, so
weights are replicated then, and a message says so.
"""

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env

from configs.load import UserError
from training.model.transformers_internals import unset_hf_deepspeed_config
from training.sharding.compilation import await_other_compilations

REPLICATED, FSDP2, ZERO3 = "replicated", "fsdp2", "zero3"
NVME = "nvme"


def make_accelerator(*, bf16: bool) -> Accelerator:
    """One process or what `accelerate launch` started; gloo where there is no accelerator."""
    if (asked := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) not in ("no", "bf16"):
        raise UserError(
            f"mixed_precision {asked} of accelerate's configuration is not supported; write bf16 or no there, and bf16=true or "
            "bf16=false in the training config, which decides"
        )
    with_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if with_deepspeed:
        # or accelerate would leave DeepSpeed out, which needs no telling where it runs
        os.environ.pop("ACCELERATE_USE_CPU", None)
        # it compiles with the ninja that was installed beside this Python
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        await_other_compilations()
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed looks for one and warns that there is none
    # without it accelerate takes this for a run of one process
    handlers = [InitProcessGroupKwargs(backend="gloo")] if on_cpu and with_deepspeed else None
    precision, on_cpu = "bf16" if bf16 else "no", on_cpu and not with_deepspeed
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision, kwargs_handlers=handlers)
    if with_deepspeed:
        unset_hf_deepspeed_config()  # or transformers would partition the model, routers too, while it loads it
    return accelerator


def weight_layout(accelerator: Accelerator) -> str:
    """How frozen weights are laid out over processes: `replicated`, `fsdp2` or `zero3`; FSDP1 is refused."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise UserError("fsdp_version 1 cannot hold frozen and trained weights together; write fsdp_version: 2")
        return FSDP2
    if accelerator.state.distributed_type != "DEEPSPEED":
        return REPLICATED
    stage = int(accelerator.state.deepspeed_plugin.zero_stage)
    if stage < 3:
        accelerator.print(
            f"ZeRO stage {stage} shards gradients and optimizer states of what trains, which is the routers alone: they "
            "and all weights are replicated; write zero_stage: 3 to shard the frozen weights"
        )
    return ZERO3 if stage == 3 else REPLICATED


def is_asked_to_shard() -> bool:
    """Whether the launcher's configuration may lay weights out over processes."""
    return any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))


def offload_device(accelerator: Accelerator) -> str | None:
    """Where a DeepSpeed configuration wants parameters: `cpu`, `nvme`, or None for the device itself."""
    if accelerator.state.distributed_type != "DEEPSPEED":
        return None
    zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    device = (zero.get("offload_param") or {}).get("device")
    return None if device in (None, "none") else str(device)
