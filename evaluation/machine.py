"""What machine and which versions a result was measured with."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil


def machine_facts() -> dict[str, Any]:
    """Processor, cores, memory and the versions that decide numbers."""
    return {
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "accelerate", "lm_eval")},
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
