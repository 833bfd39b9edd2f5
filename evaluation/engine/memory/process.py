"""What this process holds of the machine's memory."""

import os
import re
from pathlib import Path

from configs.load import UserError
from training.model.host_memory import memory_limit


def peak_rss_bytes() -> int | None:
    """Peak resident memory of this process since it started (VmHWM); None where the kernel does not tell."""
    return _status_bytes("VmHWM")


def private_bytes() -> int:
    """Memory this process holds that belongs to no file (RssAnon), or `UserError`: what a memory budget counts."""
    held_bytes = _status_bytes("RssAnon")
    if held_bytes is None:
        raise UserError(
            "this system does not tell how much memory a process holds (/proc/self/status); use expert_cache"
        )
    return held_bytes


def total_memory_bytes() -> int:
    """What this process may hold at most: the machine's memory, or the limit of its memory group where that is less."""
    machine_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(machine_bytes, memory_limit() or machine_bytes)


def _status_bytes(key: str) -> int | None:
    status = Path("/proc/self/status")
    found = re.search(rf"^{key}:\s*(\d+) kB$", status.read_text(), re.MULTILINE) if status.is_file() else None
    return int(found[1]) * 1024 if found else None
