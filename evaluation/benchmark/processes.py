"""Child processes: one of our modules in a process of its own, what it said last, and how a side of the benchmark ended."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.sizes import readable
from evaluation.benchmark.memory_group import Hierarchy, MemoryGroup
from evaluation.benchmark.order import Order

PROJECT = Path(__file__).parents[2]
MODULE = "evaluation.benchmark.sides.side"
INSTALL = 'install the opponents with pip install -e ".[bench]"'


class Child:
    """A running Python module. As a context manager: the process is killed when the block ends.

    It is spoken to in lines, over its standard input and output; what it writes on standard error is kept. It may run
    inside a memory group, with variables of `environment` on top of those of this process.
    """

    def __init__(
        self, module: str, *arguments: str, group: MemoryGroup | None = None, environment: Mapping[str, str] = {}
    ) -> None:
        command = [sys.executable, "-m", module, *arguments]
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed in __exit__
        self.process = subprocess.Popen(
            group.command(command) if group else command, cwd=PROJECT, env={**os.environ, **environment},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self._errors.close()

    def nudge(self, text: str = "") -> None:
        """Send a line: the process may go on."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{text}\n")
        self.process.stdin.flush()

    def line(self) -> str:
        """The next line of its standard output, as soon as it comes; empty when there will be no more."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def wait(self, timeout_seconds: float | None = None) -> int | None:
        """The exit code; None when it has not ended in time."""
        try:
            self.process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            return None
        return self.process.returncode

    @property
    def last_words(self) -> str:
        """The last line on standard error, without the `error: ` of our commands."""
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines()
        return said[-1].removeprefix("error: ") if said else "nothing on standard error"


@dataclass(frozen=True)
class Limits:
    """The limits of a side's process."""

    seconds: float
    memory_bytes: int | None = None  # page cache included; None: it is only measured
    hierarchy: Hierarchy | None = None  # where memory groups can be made, if anywhere


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


def run_side(order: Order, limits: Limits, *, contender: str, repeat: int) -> SideRun:
    """Run the order to its end, its death or the timeout. Never raises for what happens inside the process."""
    limit, place = limits.memory_bytes, limits.hierarchy
    in_group: AbstractContextManager[MemoryGroup | None] = MemoryGroup(place, limit) if place else nullcontext()
    with tempfile.TemporaryDirectory() as folder, in_group as group:
        order_path, result_path = Path(folder) / "order.json", Path(folder) / "result.json"
        order.write(order_path)
        with Child(MODULE, str(order_path), str(result_path), group=group) as child:
            code, last_words = child.wait(limits.seconds), child.last_words
        result = json.loads(result_path.read_text(encoding="utf-8")) if result_path.is_file() else {}
        run = SideRun(contender, repeat, limit, **result)
        run.peak_memory_bytes = group.peak_bytes if group else None
        if code != 0 or len(run.legs) < len(order.legs):
            run.failure = _failure(code, last_words, limits, killed=group is not None and group.was_killed)
    return run


def _failure(code: int | None, last_words: str, limits: Limits, *, killed: bool) -> str:
    if code is None:
        return f"not finished after {limits.seconds:g} seconds and ended; raise --timeout or ask for fewer tokens"
    if killed:
        limit = "" if limits.memory_bytes is None else f" of {readable(limits.memory_bytes)}"
        return f"killed by the kernel: more than the memory limit{limit}, page cache included"
    return f"exit code {code}: {last_words}" if "ModuleNotFoundError" not in last_words else f"{last_words}; {INSTALL}"
