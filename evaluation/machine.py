"""What machine and which versions a result was measured with, and how busy the machine was with other things."""

import platform
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from evaluation.results import MachineLoad


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
    name = getattr(torch.get_device_module(found), "get_device_name", None) if found else None
    return str(name()) if name else found.type if found else None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    named = re.search(r"(?m)^model name\s*:\s*(.*)$", info.read_text(encoding="utf-8") if info.exists() else "")
    return named[1].strip() if named else platform.processor()


@dataclass(frozen=True)
class ProcessorTimes:
    """Seconds of all processors since the machine started, and of this process and its ended children; the load now."""

    total: float
    idle: float
    stolen: float  # by the hypervisor, where it says so
    own: float
    load_average: float  # over the last minute


def processor_times() -> ProcessorTimes:
    """The counters now."""
    times, own = psutil.cpu_times()._asdict(), psutil.Process().cpu_times()
    return ProcessorTimes(
        total=sum(seconds for name, seconds in times.items() if not name.startswith("guest")),  # user has guests in it
        idle=times["idle"] + times.get("iowait", 0.0),
        stolen=times.get("steal", 0.0),
        own=own.user + own.system + own.children_user + own.children_system,
        load_average=psutil.getloadavg()[0],
    )


def machine_load(before: ProcessorTimes, after: ProcessorTimes) -> MachineLoad:
    """How much of the processors' time between two readings others had."""
    total, stolen = after.total - before.total, after.stolen - before.stolen
    others = total - (after.idle - before.idle) - stolen - (after.own - before.own)
    return MachineLoad(
        load_average_before=before.load_average,
        load_average_after=after.load_average,
        stolen_share=stolen / (total or 1),
        others_share=max(0.0, others / (total or 1)),  # clocks may disagree by a tick
    )
