"""The limits of the machine: reads of expert size from the model's own files at several depths, and memory reads."""

import os
import random
import threading
import time
import timeit
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from evaluation.engine.store.pages import PAGE_BYTES
from evaluation.engine.store.reader import takes_direct_reads
from training.model.host_memory import huge_pages

DEPTHS = (1, 2, 4, 8, 16)
SECONDS = 1.0  # for each depth
MEMORY_BYTES = 1 << 29  # far beyond any cache of a processor
MEMORY_ROUNDS = 8
MATRIX, MATRICES = 1024, 64  # 128 MiB in 16-bit precision


@dataclass(frozen=True)
class DiskRate:
    """Bytes per second of random reads by how many are in flight; the yardstick of the engine's own reader."""

    read_bytes: int  # of each read
    direct: bool  # past the page cache
    by_depth: dict[int, float]

    @property
    def best(self) -> float:
        return max(self.by_depth.values())


def disk_rate(
    files: Sequence[Path], read_bytes: int, *, depths: Sequence[int] = DEPTHS, seconds: float = SECONDS
) -> DiskRate:
    """Measure on files that are there already; where O_DIRECT is refused, through the page cache, and the result says so."""
    length = -(-read_bytes // PAGE_BYTES) * PAGE_BYTES
    direct = takes_direct_reads(files[0])
    descriptors = [os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0)) for path in files]
    try:
        return DiskRate(length, direct, {depth: _rate(descriptors, length, depth, seconds) for depth in depths})
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _rate(descriptors: Sequence[int], length: int, depth: int, seconds: float) -> float:
    start = time.perf_counter()
    with ThreadPoolExecutor(depth) as pool:
        done = list(pool.map(lambda n: _read_until(descriptors, length, start + seconds, seed=n), range(depth)))
    return sum(done) / (time.perf_counter() - start)


def _read_until(descriptors: Sequence[int], length: int, end: float, *, seed: int) -> int:
    """Read random places until `end`; returns how many bytes were read."""
    draw, buffer, total = random.Random(seed), memoryview(huge_pages(length))[:length], 0
    sizes = [os.fstat(descriptor).st_size for descriptor in descriptors]
    while not total or time.perf_counter() < end:
        number = draw.choices(range(len(descriptors)), weights=sizes)[0]
        offset = draw.randrange(max(1, (sizes[number] - length) // PAGE_BYTES)) * PAGE_BYTES
        total += os.preadv(descriptors[number], [buffer], offset)
    return total


@contextmanager
def products_beside(threads: int) -> Iterator[None]:
    """Let `threads` threads multiply one row by one matrix after the other meanwhile, as decoding does."""
    ended = threading.Event()
    matrices = torch.ones(MATRICES, MATRIX, MATRIX, dtype=torch.bfloat16)

    def multiply() -> None:
        while not ended.is_set():
            for matrix in matrices:
                torch.mm(matrix[:1], matrix.T)

    with _threads(threads), ThreadPoolExecutor(1, thread_name_prefix="products") as worker:
        worker.submit(multiply)
        try:
            yield
        finally:
            ended.set()


def memory_bandwidth(threads: int, *, size_bytes: int = MEMORY_BYTES, rounds: int = MEMORY_ROUNDS) -> float:
    """Bytes per second at which `threads` threads read memory: the best of several sums over a large array."""
    with _threads(threads):
        numbers = torch.ones(size_bytes // 4)
        return size_bytes / min(timeit.repeat(numbers.sum, number=1, repeat=rounds))


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
