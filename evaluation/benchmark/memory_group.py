"""A memory limit that counts the page cache: a process in a control group of its own, version 1 or 2.

Engines that leave residency to the page cache (mapped files) and engines that hold their own cache are compared at
equal memory only this way. Needs root, or a delegated part of the hierarchy.
Documented in the kernel's admin guide: cgroup-v1/memory.rst and cgroup-v2.rst.
"""

import os
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from configs.load import UserError

NUMBERS = count()
NO_CONTROLLER = (
    "needs a memory controller (cgroup v1 or v2) in which this user may make groups, and there is none; run as root on a "
    "machine that has it"
)
REMOVAL_SECONDS = 2.0  # pages of the dead process are given back after a moment


@dataclass(frozen=True)
class Version:
    """The files of one version of the controller."""

    name: str
    limit: str
    peak: str
    events: str  # `key value` lines, among them oom_kill


V1 = Version("cgroup v1", "memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control")
V2 = Version("cgroup v2", "memory.max", "memory.peak", "memory.events")


@dataclass(frozen=True)
class Hierarchy:
    """A place where groups can be made."""

    version: Version
    parent: Path


def find_hierarchy(proc: Path = Path("/proc/self")) -> Hierarchy | None:
    """The memory controller in which this process may make groups; None where there is none.

    Groups are made in the nearest one, from this process's own upwards, where a new one has a memory limit.
    """
    mounts = [line.split() for line in (proc / "mounts").read_text(encoding="utf-8").splitlines()]
    own = [line.split(":", 2) for line in (proc / "cgroup").read_text(encoding="utf-8").splitlines()]
    for _, point, kind, options, *_ in mounts:
        if kind == "cgroup" and "memory" in options.split(","):
            group = next((where for _, controllers, where in own if "memory" in controllers.split(",")), "/")
            return _nearest(V1, Path(point), group)
    for _, point, kind, *_ in mounts:
        controllers = Path(point) / "cgroup.controllers"
        if kind == "cgroup2" and controllers.is_file() and "memory" in controllers.read_text().split():
            return _nearest(V2, Path(point), next((where for number, _, where in own if number == "0"), "/"))
    return None


def _nearest(version: Version, point: Path, own: str) -> Hierarchy | None:
    inside = point / own.lstrip("/")
    parents = [parent for parent in (inside, *inside.parents) if parent.is_relative_to(point)]
    return next((Hierarchy(version, parent) for parent in parents if _can_limit(version, parent)), None)


def _can_limit(version: Version, parent: Path) -> bool:
    try:
        with MemoryGroup(Hierarchy(version, parent), None) as trial:
            return (trial.path / version.limit).is_file()
    except OSError:
        return False


class MemoryGroup:
    """A group for one process, as a context manager: leaving it removes the group.

    `limit_bytes` is for memory and page cache together; None only measures.
    """

    def __init__(self, hierarchy: Hierarchy, limit_bytes: int | None) -> None:
        self._version, self._limit_bytes = hierarchy.version, limit_bytes
        self.path = hierarchy.parent / f"remoe-{os.getpid()}-{next(NUMBERS)}"

    def __enter__(self) -> "MemoryGroup":
        self.path.mkdir()
        if self._limit_bytes is not None:
            self.limit(self._limit_bytes)
        return self

    def limit(self, limit_bytes: int) -> None:
        """Let the group hold at most that many bytes from now on."""
        (self.path / self._version.limit).write_text(str(limit_bytes), encoding="ascii")
        swap = self.path / "memory.swap.max"  # version 2: the limit is for memory alone
        if swap.is_file():
            swap.write_text("0", encoding="ascii")

    def __exit__(self, *_: object) -> None:
        deadline = time.monotonic() + REMOVAL_SECONDS
        while True:
            try:
                self.path.rmdir()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise UserError(f"memory group {self.path} is still in use ({error}); remove it by hand") from error
                time.sleep(0.05)

    def command(self, arguments: list[str]) -> list[str]:
        """The command that runs `arguments` inside the group from their first instruction on."""
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.path / "cgroup.procs"), *arguments]

    @property
    def peak_bytes(self) -> int | None:
        """The most the group ever held, page cache included; None where the kernel does not tell."""
        file = self.path / self._version.peak
        return int(file.read_text(encoding="ascii")) if file.is_file() else None

    @property
    def was_killed(self) -> bool:
        """Whether the kernel killed a process for the limit."""
        lines = (self.path / self._version.events).read_text(encoding="ascii").splitlines()
        return any(int(value) > 0 for key, value in (line.split() for line in lines) if key == "oom_kill")
