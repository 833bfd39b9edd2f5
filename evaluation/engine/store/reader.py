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
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from queue import PriorityQueue, SimpleQueue
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from configs.load import UserError
from evaluation.engine.store.pages import PAGE_BYTES
from training.model.host_memory import huge_pages
from training.model.shards import AGAIN

PIECE_BYTES = 3 * 2**19
"""Longer ranges are cut into equal pieces of at most this size, so that one expert keeps several reads in flight;
each reading thread has a buffer for the pages of one."""
READS_IN_FLIGHT = 8
FIRST, BEHIND, LAST = range(3)
"""Priorities: what somebody waits for, what nobody waits for yet, the end."""

Bytes = npt.NDArray[np.uint8]


class Span(NamedTuple):
    """A byte range of a shard and the memory of the same length it belongs into."""

    shard: Path
    offset: int
    target: Bytes


@dataclass
class Request:
    """Spans that are read together; it lands in a queue when all are there or one has failed."""

    key: tuple[int, int]  # the caller's
    what: str  # for messages
    pieces: deque[Span]  # that no thread has begun to read
    landed: "SimpleQueue[Request] | None"
    device_bytes: int = 0  # what the read calls returned, pages around the spans included
    error: Exception | None = None
    wanted_bytes: int = field(init=False)  # of all pieces, but for those that were dropped
    pieces_left: int = field(init=False)  # that are not done
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.pieces_left = len(self.pieces)
        self.wanted_bytes = sum(len(piece.target) for piece in self.pieces)

    @property
    def is_done(self) -> bool:
        """Whether no piece of it is being read or will be."""
        return self.pieces_left == 0

    def next_piece(self) -> Span | None:
        """The next piece to read, for the thread that asks; None if all have begun."""
        try:
            return self.pieces.popleft()
        except IndexError:
            return None

    def land_in(self, landed: "SimpleQueue[Request]") -> None:
        """Name the queue of a request that was started without one: it lands there now, or when it is done."""
        with self.lock:
            self.landed = landed
            if self.is_done:
                landed.put(self)

    def drop(self) -> None:
        """Read no piece that has not begun; the request is done when the others are."""
        while (piece := self.next_piece()) is not None:
            self.wanted_bytes -= len(piece.target)
            self.piece_done()

    def piece_done(self, device_bytes: int = 0, error: Exception | None = None) -> None:
        with self.lock:
            self.pieces_left -= 1
            self.device_bytes += device_bytes
            self.error = self.error or error
            if self.is_done and self.landed is not None:
                self.landed.put(self)


class Reader(AbstractContextManager["Reader"]):
    """Reading threads over some files; a context manager that ends the threads and closes the files.

    Args:
        direct: go past the page cache where the file system allows it.
        longest_bytes: of the ranges that will be read, where that is known: short ones need less of a buffer.

    Attributes:
        direct: whether reads do go past the page cache.
        buffer_bytes: of all threads.
        clock: runs while something is being read.
    """

    def __init__(
        self,
        shards: Iterable[Path],
        *,
        reads_in_flight: int = READS_IN_FLIGHT,
        direct: bool = True,
        longest_bytes: int = PIECE_BYTES,
    ) -> None:
        self.reads_in_flight = reads_in_flight
        self._entries: PriorityQueue[tuple[int, int, Request | None]] = PriorityQueue()  # one for every piece
        self._numbers = count()  # of entries, in order of arrival
        self.clock = BusyClock()
        self._threads: list[threading.Thread] = []
        shards = sorted(set(shards))
        self.direct = direct and all(takes_direct_reads(shard) for shard in shards)
        around_bytes = (-(-longest_bytes // PAGE_BYTES) + 1) * PAGE_BYTES  # it may begin and end within a page
        self._buffers = huge_pages(reads_in_flight * min(PIECE_BYTES, around_bytes) if self.direct else 0)
        self.buffer_bytes = len(self._buffers) if self.direct else 0
        flags = os.O_RDONLY | (os.O_DIRECT if self.direct else 0)
        self._descriptors = {shard: os.open(shard, flags) for shard in shards}
        self._versions = {shard: _version(descriptor) for shard, descriptor in self._descriptors.items()}

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(
        self, key: tuple[int, int], spans: Sequence[Span], landed: SimpleQueue[Request] | None, *, what: str
    ) -> Request:
        """Begin to read; `landed` gets the request when it is done. The targets must stay until then.

        Without `landed` nobody waits for it, so it comes behind everything somebody waits for.
        """
        if not self._descriptors:
            raise UserError("the checkpoint is closed; use the model inside the `with load(...)` block")
        self._start_threads()
        request = Request(key, what, deque(piece for span in spans for piece in _pieces(span)), landed)
        self._enter(request, BEHIND if landed is None else FIRST)
        return request

    def wait_for(self, request: Request, landed: SimpleQueue[Request]) -> None:
        """Let a request that was started without a queue land in `landed`, and be read like others that somebody waits for."""
        self._enter(request, FIRST)
        request.land_in(landed)

    def _enter(self, request: Request, priority: int) -> None:
        """Queue an entry for every piece that has not begun; an entry too many finds nothing to do."""
        for _ in range(len(request.pieces)):
            self._entries.put((priority, next(self._numbers), request))

    def changed_shards(self) -> list[Path]:
        """Files that were written to or cut since they were opened: their experts cannot be read any more."""
        now = {shard: _version(descriptor) for shard, descriptor in self._descriptors.items()}
        return [shard for shard, version in now.items() if version != self._versions[shard]]

    def close(self) -> None:
        """Finish what was started, end the threads, close the files. May be called again."""
        for _ in self._threads:
            self._entries.put((LAST, next(self._numbers), None))
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
        length_bytes = self.buffer_bytes // self.reads_in_flight // PAGE_BYTES * PAGE_BYTES
        buffer = np.frombuffer(self._buffers, np.uint8)[number * length_bytes :][:length_bytes]
        while (request := self._entries.get()[2]) is not None:
            span = request.next_piece()
            if span is None:
                continue
            read_bytes, error = 0, None
            try:
                descriptor = self._descriptors[span.shard]
                with self.clock:
                    read_bytes = _read(descriptor, span, buffer)
                if _version(descriptor) != self._versions[span.shard]:
                    raise UserError(f"{request.what}: {span.shard} was changed while in use; {AGAIN}, and load it anew")
            except Exception as caught:  # carried to the thread that waits for the request
                error = _named(caught, request, span)
            request.piece_done(read_bytes, error)


def _read(descriptor: int, span: Span, buffer: Bytes) -> int:
    """Fill the span's target, through `buffer` if there is one and they are not whole pages; return the bytes that were read."""
    in_pages = span.offset % PAGE_BYTES == len(span.target) % PAGE_BYTES == span.target.ctypes.data % PAGE_BYTES == 0
    if in_pages or not len(buffer):
        got_bytes = os.preadv(descriptor, [span.target.data], span.offset)
        if got_bytes < len(span.target):
            raise EOFError(got_bytes)
        return got_bytes
    before = span.offset % PAGE_BYTES
    wanted_bytes = before + len(span.target)
    asked_bytes = -(-wanted_bytes // PAGE_BYTES) * PAGE_BYTES
    got_bytes = os.preadv(descriptor, [buffer[:asked_bytes].data], span.offset - before)
    if got_bytes < wanted_bytes:
        raise EOFError(max(0, got_bytes - before))
    np.copyto(span.target, buffer[before:wanted_bytes])
    return got_bytes


def _version(descriptor: int) -> tuple[int, int]:
    """What changes when a file is written to."""
    status = os.fstat(descriptor)
    return status.st_mtime_ns, status.st_size


def _named(error: Exception, request: Request, span: Span) -> Exception:
    if isinstance(error, EOFError):
        return UserError(
            f"short read of {request.what}: {span.shard} at offset {span.offset}, wanted {len(span.target)} bytes, "
            f"got {error}: the shard changed while it was in use; {AGAIN}"
        )
    if isinstance(error, OSError):
        return UserError(f"{request.what} cannot be read from {span.shard} at offset {span.offset}: {error}")
    return error


def _pieces(span: Span) -> list[Span]:
    """The span in equal parts, cut between pages of the file, so that no page is read twice."""
    first, end = span.offset, span.offset + len(span.target)
    start = first // PAGE_BYTES * PAGE_BYTES
    pages = -(-(end - start) // PAGE_BYTES)
    pages_each = -(-pages // -(-pages // (PIECE_BYTES // PAGE_BYTES)))
    cuts = [first, *range(start + pages_each * PAGE_BYTES, end, pages_each * PAGE_BYTES), end]
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


class BusyClock:
    """Time in which at least one thread was inside; a context manager for each of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside, self._since, self._seconds = 0, 0.0, 0.0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._since = time.perf_counter()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._seconds += time.perf_counter() - self._since

    def seconds(self) -> float:
        """Seconds up to now."""
        with self._lock:
            return self._seconds + (time.perf_counter() - self._since if self._inside else 0.0)
