"""How fast the device under a checkpoint can be read, and with how many reads in flight; measured once per device.

The measurement takes two seconds and is kept in `$XDG_CACHE_HOME/remoe/read_bandwidth.json` (`~/.cache` if unset). Small
checkpoints are not worth it. Reads are what the engine's are: pieces of experts, past the page cache where that works.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from configs.files import write_json
from evaluation.engine.store.reader import PIECE_BYTES, READS_IN_FLIGHT, Reader, Request, Span
from training.model.host_memory import huge_pages

DEPTHS = (4, 8, 16)
ROUNDS = 2
WORTH_BYTES = 512 * 2**20
"""Shards smaller than this together are read with `READS_IN_FLIGHT`, unmeasured."""
ENOUGH = 0.9
"""The fewest reads in flight that reach this share of the best are taken: more threads cost time elsewhere."""


@dataclass(frozen=True)
class ReadBandwidth:
    """How fast a device was read, and with how many reads in flight."""

    reads_in_flight: int
    bytes_per_second: float


def reads_in_flight_for(shards: Sequence[Path]) -> int:
    """How many reads to keep in flight; calibrates the device if that was not done before and is worth it."""
    return calibrated(shards).reads_in_flight if is_worth_it(shards) else READS_IN_FLIGHT


def is_worth_it(shards: Sequence[Path]) -> bool:
    """Whether there is so much to read that the device's speed matters."""
    return sum(shard.stat().st_size for shard in shards) >= WORTH_BYTES


def calibrated(shards: Sequence[Path]) -> ReadBandwidth:
    """The remembered calibration of the device that holds the largest shard, or a new one, which is then remembered."""
    largest = max(shards, key=lambda shard: shard.stat().st_size)
    device, path = str(largest.stat().st_dev), _cache_path()
    known = _read_cache(path)
    if device not in known:
        known[device] = calibrate(largest)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {key: asdict(one) for key, one in known.items()})
        except OSError:
            pass  # a home that cannot be written to costs two seconds every time, nothing else
    return known[device]


def calibrate(shard: Path, *, seconds: float = 2.0) -> ReadBandwidth:
    """Read pieces from random places with several depths, in turns, the best of each; see `ENOUGH`."""
    each_seconds = seconds / (ROUNDS * len(DEPTHS))
    rounds = [[read_speed(shard, depth, seconds=each_seconds) for depth in DEPTHS] for _ in range(ROUNDS)]
    speeds = [max(of_depth) for of_depth in zip(*rounds, strict=True)]
    chosen = next(i for i, speed in enumerate(speeds) if speed >= ENOUGH * max(speeds))
    return ReadBandwidth(DEPTHS[chosen], speeds[chosen])


def read_speed(shard: Path, reads_in_flight: int, *, seconds: float) -> float:
    """Bytes per second of pieces at random places, `depth` of them in flight all the time."""
    landed: SimpleQueue[Request] = SimpleQueue()
    draw = np.random.default_rng(0)
    length = min(PIECE_BYTES, shard.stat().st_size)
    places = max(1, shard.stat().st_size // length)
    memory = np.frombuffer(huge_pages(reads_in_flight * length), np.uint8, count=reads_in_flight * length)
    targets = memory.reshape(reads_in_flight, length)
    done_bytes = 0
    with Reader([shard], reads_in_flight=reads_in_flight) as reader:

        def start(number: int) -> None:
            span = Span(shard, int(draw.integers(places)) * length, targets[number])
            reader.start((0, number), [span], landed, what="the calibration")

        started = time.perf_counter()
        for number in range(reads_in_flight):
            start(number)
        while time.perf_counter() - started < seconds:
            request = landed.get()
            if request.error is not None:
                raise request.error
            done_bytes += length
            start(request.key[1])
        elapsed_seconds = time.perf_counter() - started
    return done_bytes / elapsed_seconds


def _cache_path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "remoe" / "read_bandwidth.json"


def _read_cache(path: Path) -> dict[str, ReadBandwidth]:
    """What was measured before; a damaged file counts as none."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {device: ReadBandwidth(**one) for device, one in known.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
