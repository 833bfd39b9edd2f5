"""Runs one side in a process and a memory group of its own, and says how it ended."""

import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from configs.sizes import readable
from evaluation.benchmark.memory_group import Hierarchy, MemoryGroup
from evaluation.benchmark.order import Order

PROJECT = Path(__file__).parents[2]
MODULE = "evaluation.benchmark.sides.side"
INSTALL = 'install the opponents with pip install -e ".[bench]"'


@dataclass
class SideRun:
    """One process. `failure` says why not all of its legs are there; those that are count."""

    contender: str
    repeat: int
    limit_bytes: int | None
    failure: str | None = None
    peak_memory_bytes: int | None = None  # of the memory group: page cache included
    load_seconds: float | None = None
    peak_rss_bytes: int | None = None
    read_rate: float | None = None  # bytes per second of the disk, mean of right before and right after
    settings: dict[str, Any] = field(default_factory=dict)
    legs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def run_side(
    order: Order, *, contender: str, repeat: int, hierarchy: Hierarchy | None, limit_bytes: int | None,
    timeout_seconds: float,
) -> SideRun:  # fmt: skip
    """Run the order to its end, its death or the timeout. Never raises for what happens inside the process."""
    run = SideRun(contender, repeat, limit_bytes)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        order_path, result_path, errors = (Path(folder) / name for name in ("order.json", "result.json", "errors.txt"))
        order.write(order_path)
        command = [sys.executable, "-m", MODULE, str(order_path), str(result_path)]
        group = stack.enter_context(MemoryGroup(hierarchy, limit_bytes)) if hierarchy else None
        code = _run(group.command(command) if group else command, errors, timeout_seconds)
        if result_path.is_file():
            for name, value in json.loads(result_path.read_text(encoding="utf-8")).items():
                setattr(run, name, value)
        run.peak_memory_bytes = group.peak_bytes if group else None
        if code != 0 or len(run.legs) < len(order.legs):
            run.failure = _failure(code, errors, group, limit_bytes, timeout_seconds)
    return run


def _run(command: list[str], errors: Path, timeout_seconds: float) -> int | None:
    """The exit code; None when it had to be ended."""
    with errors.open("wb") as sink:
        try:
            done = subprocess.run(
                command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=sink, timeout=timeout_seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return None
    return done.returncode


def _failure(
    code: int | None, errors: Path, group: MemoryGroup | None, limit_bytes: int | None, timeout_seconds: float
) -> str:
    if code is None:
        return f"not finished after {timeout_seconds:g} seconds and ended; raise --timeout or ask for fewer tokens"
    if group is not None and group.was_killed:
        limit = "" if limit_bytes is None else f" of {readable(limit_bytes)}"
        return f"killed by the kernel: more than the memory limit{limit}, page cache included"
    lines = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = lines[-1] if lines else "nothing on standard error"
    if "ModuleNotFoundError" in last:
        return f"{last}; {INSTALL}"
    return f"exit code {code}: {last}"
