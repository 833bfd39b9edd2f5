"""DeepSpeed's compiled operations, and the locks that a killed process leaves behind.

torch compiles an operation under a file named `lock`, for which every later process waits: without end, if the one that wrote
it was killed (torch 2.13).
"""

import os
import time
from pathlib import Path

import psutil
from torch.utils.cpp_extension import get_default_build_root

QUIET_SECONDS = 300
"""A lock is left behind if for so long nothing beside it was written: one file compiles in less, on a busy machine too."""
POLL_SECONDS = 1.0


def await_other_compilations() -> None:
    """Wait until nobody compiles an operation, and remove locks that were left behind; says what it waits for."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in sorted({*root.glob("*/lock"), *root.glob("*/*/lock")}):
        said = False
        while lock.exists():
            if _quiet_seconds(lock.parent) > QUIET_SECONDS and not _works_in(lock.parent):
                lock.unlink(missing_ok=True)
                print(f"removed {lock}, which a process that was killed while it compiled left behind", flush=True)
            elif not said:
                print(f"waiting for another process that compiles {lock.parent.name} ({lock})", flush=True)
                said = True
            else:
                time.sleep(POLL_SECONDS)


def _quiet_seconds(folder: Path) -> float:
    """Time since the last file in it was written."""
    try:
        return time.time() - max(path.stat().st_mtime for path in folder.iterdir())
    except (OSError, ValueError):  # another process removes files just now
        return 0.0


def _works_in(folder: Path) -> bool:
    """Whether a process of this machine has the folder as its working directory, as compilers do."""
    processes = (process.info["cwd"] for process in psutil.process_iter(["cwd"]))
    return any(cwd is not None and Path(cwd) == folder.resolve() for cwd in processes)
