"""Where a model computes: the processor, or an accelerator beside it."""

import torch

from configs.load import UserError

CPU = torch.device("cpu")


def find_device(name: str | torch.device) -> torch.device:
    """The device of this name, if this machine has one; `auto`: its accelerator, or else the processor.

    Raises:
        UserError: it has none, or there is no such kind of device.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or CPU
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is not known to torch; write cpu, cuda or auto") from error
    if found.type not in (CPU.type, accelerator and accelerator.type):
        raise UserError(f"device is {name!r}, and torch finds no such accelerator here; write cpu")
    return found
