"""What machine and which versions a result was measured with."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch


def machine_facts() -> dict[str, Any]:
    """Processor, cores, accelerator, memory and the versions that decide numbers."""
    return {
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(),
        "accelerator": _accelerator(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "accelerate", "lm_eval")},
    }


def _accelerator() -> str | None:
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return None
    name = getattr(torch.get_device_module(found), "get_device_name", None)
    return str(name()) if name else found.type


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
