"""Reads of expert weights, many in flight: threads that bring byte ranges of shards into memory, in whatever order.

`O_DIRECT` goes past the page cache, so that a memory budget is one: what is read lies in the slots and nowhere else.
The kernel then wants whole pages, of the file and of memory: what lies so goes straight where it belongs, and of the
rest each thread reads the pages around a piece into a buffer of its own and copies the piece out (numpy copies without
the GIL). Where the file system refuses, reads go through the page cache. Knows files and bytes; no experts, no slots
and no torch.
"""

import mmap
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from configs.load import UserError
from evaluation.engine.pages import PAGE_BYTES, huge_pages
from evaluation.engine.shards import AGAIN

PIECE_BYTES = 2**20
"""Longer ranges are cut here, so that one expert keeps several reads in flight."""
BUFFER_BYTES = PIECE_BYTES + 2 * PAGE_BYTES
"""Memory of a reading thread: a piece and the pages around it."""
READS_IN_FLIGHT = 8

Bytes = npt.NDArray[np.uint8]


class Span(NamedTuple):
    """A byte range of a shard and the memory of the same length it belongs into."""

    shard: Path
    offset: int
    target: Bytes


class Landing(Protocol):
    """Where requests go when they are done: a queue, for example."""

    def put(self, request: "Request") -> None: ...


@dataclass
class Request:
    """Spans that are read together; it lands in the queue it was started with when all are there or one has failed."""

    key: tuple[int, int]  # the caller's
    what: str  # for messages
    pieces_left: int
    landed: Landing
    device_bytes: int = 0  # what the read calls returned, pages around the spans included
    error: Exception | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def piece_done(self, device_bytes: int, error: Exception | None) -> None:
        with self.lock:
            self.pieces_left -= 1
            self.device_bytes += device_bytes
            self.error = self.error or error
            last = self.pieces_left == 0
        if last:
            self.landed.put(self)


class Reader:
    """Reading threads over some files; a context manager that ends the threads and closes the files.

    Args:
        shards: the files, all opened at once.
        reads_in_flight: threads.
        direct: go past the page cache where the file system allows it.

    Attributes:
        direct: whether reads do go past the page cache.
    """

    def __init__(self, shards: Iterable[Path], *, reads_in_flight: int = READS_IN_FLIGHT, direct: bool = True) -> None:
        self.reads_in_flight = reads_in_flight
        self._jobs: SimpleQueue[tuple[Request, Span] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        shards = sorted(set(shards))
        self.direct = direct and all(takes_direct_reads(shard) for shard in shards)
        self._buffers = huge_pages(reads_in_flight * BUFFER_BYTES if self.direct else 0)
        flags = os.O_RDONLY | (os.O_DIRECT if self.direct else 0)
        self._descriptors = {shard: os.open(shard, flags) for shard in shards}
        self._versions = {shard: _version(descriptor) for shard, descriptor in self._descriptors.items()}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()

    def start(self, key: tuple[int, int], spans: Sequence[Span], landed: Landing, *, what: str) -> None:
        """Begin to read; `landed` gets the request when it is done. The targets must stay until then.

        Raises:
            UserError: the reader is closed.
        """
        if not self._descriptors:
            raise UserError("the checkpoint is closed; use the model inside the `with load(...)` block")
        self._start_threads()
        pieces = [piece for span in spans for piece in _pieces(span)]
        request = Request(key, what, len(pieces), landed)
        for piece in pieces:
            self._jobs.put((request, piece))

    def changed_shards(self) -> list[Path]:
        """Files that were written to or cut since they were opened: their experts cannot be read any more."""
        now = {shard: _version(descriptor) for shard, descriptor in self._descriptors.items()}
        return [shard for shard, version in now.items() if version != self._versions[shard]]

    def close(self) -> None:
        """Finish what was started, end the threads, close the files. May be called again."""
        for _ in self._threads:
            self._jobs.put(None)
        while self._threads:
            self._threads.pop().join()
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _start_threads(self) -> None:
        while len(self._threads) < self.reads_in_flight:
            number = len(self._threads)
            thread = threading.Thread(target=self._work, args=[number], name="expert-reader", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self, number: int) -> None:
        buffer = _PageBuffer(self._buffers, number) if self.direct else None
        while (job := self._jobs.get()) is not None:
            request, span = job
            read_bytes, error = 0, None
            try:
                descriptor = self._descriptors[span.shard]
                read_bytes = _read(descriptor, span) if buffer is None else buffer.read(descriptor, span)
                if _version(descriptor) != self._versions[span.shard]:
                    raise _ChangedError
            except Exception as caught:  # carried to the thread that waits for the request
                error = _named(caught, request, span)
            request.piece_done(read_bytes, error)


class _PageBuffer:
    """A thread's part of the buffers, and reads in whole pages."""

    def __init__(self, buffers: mmap.mmap, number: int) -> None:
        self._bytes = np.frombuffer(buffers, np.uint8, count=BUFFER_BYTES, offset=number * BUFFER_BYTES)

    def read(self, descriptor: int, span: Span) -> int:
        """Fill the span's target; returns the bytes the device was asked for."""
        if span.offset % PAGE_BYTES == len(span.target) % PAGE_BYTES == span.target.ctypes.data % PAGE_BYTES == 0:
            return _read(descriptor, span)
        start = span.offset // PAGE_BYTES * PAGE_BYTES
        before = span.offset - start
        wanted_bytes = before + len(span.target)
        asked_bytes = -(-wanted_bytes // PAGE_BYTES) * PAGE_BYTES
        got_bytes = os.preadv(descriptor, [self._bytes[:asked_bytes].data], start)
        if got_bytes < wanted_bytes:
            raise EOFError(max(0, got_bytes - before))
        np.copyto(span.target, self._bytes[before:wanted_bytes])
        return got_bytes


def _read(descriptor: int, span: Span) -> int:
    got_bytes = os.preadv(descriptor, [span.target.data], span.offset)
    if got_bytes < len(span.target):
        raise EOFError(got_bytes)
    return got_bytes


class _ChangedError(Exception):
    """The file is no longer what was opened."""


def _version(descriptor: int) -> tuple[int, int]:
    """What changes when a file is written to."""
    status = os.fstat(descriptor)
    return status.st_mtime_ns, status.st_size


def _named(error: Exception, request: Request, span: Span) -> Exception:
    if isinstance(error, _ChangedError):
        return UserError(f"{request.what}: {span.shard} was changed while in use; {AGAIN}, and load it anew")
    if isinstance(error, EOFError):
        return UserError(
            f"short read of {request.what}: {span.shard} at offset {span.offset}, wanted {len(span.target)} bytes, "
            f"got {error}: the shard changed while it was in use; {AGAIN}"
        )
    if isinstance(error, OSError):
        return UserError(f"{request.what} cannot be read from {span.shard} at offset {span.offset}: {error}")
    return error


def _pieces(span: Span) -> list[Span]:
    """The span cut at multiples of `PIECE_BYTES` in the file, so that no page is read twice."""
    first, end = span.offset, span.offset + len(span.target)
    cuts = [first, *range((first // PIECE_BYTES + 1) * PIECE_BYTES, end, PIECE_BYTES), end]
    return [Span(span.shard, a, span.target[a - first : b - first]) for a, b in pairwise(cuts)]


def takes_direct_reads(shard: Path) -> bool:
    """Whether the file system lets this file be read past the page cache."""
    try:
        descriptor = os.open(shard, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return False
    try:
        os.preadv(descriptor, [mmap.mmap(-1, PAGE_BYTES)], 0)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
