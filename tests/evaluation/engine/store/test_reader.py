"""Reads in flight: every byte where it belongs, past the page cache or not, and every failure named."""

import os
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.load import UserError
from evaluation.engine.store import reader as module
from evaluation.engine.store.pages import PAGE_BYTES
from evaluation.engine.store.reader import PIECE_BYTES, Reader, Request, Span
from training.model.host_memory import HUGE_BYTES, huge_pages

SIZE = 3 * PIECE_BYTES + 777


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "model.safetensors"
    np.random.default_rng(3).integers(0, 256, SIZE, dtype=np.uint8).tofile(path)
    return path


def spans_of(shard: Path, ranges: list[tuple[int, int]]) -> list[Span]:
    return [Span(shard, offset, np.zeros(length, np.uint8)) for offset, length in ranges]


def read(reader: Reader, spans: list[Span]) -> Request:
    landed: SimpleQueue[Request] = SimpleQueue()
    reader.start((1, 2), spans, landed, what="layer 1 expert 2")
    return landed.get(timeout=30)


RANGES = st.integers(0, SIZE - 1).flatmap(lambda a: st.tuples(st.just(a), st.integers(1, SIZE - a)))


@pytest.mark.parametrize("direct", [True, False])
def test_spans_hold_the_bytes_of_the_file(shard: Path, direct: bool) -> None:
    content = np.fromfile(shard, dtype=np.uint8)
    with Reader([shard], reads_in_flight=3, direct=direct) as reader:

        @settings(max_examples=60, deadline=None)
        @given(st.lists(RANGES, min_size=1, max_size=4))
        def check(ranges: list[tuple[int, int]]) -> None:
            spans = spans_of(shard, ranges)
            request = read(reader, spans)
            assert request.error is None
            for offset, length in ranges:
                span = next(s for s in spans if (s.offset, len(s.target)) == (offset, length))
                assert np.array_equal(span.target, content[offset : offset + length])
            wanted_bytes = sum(length for _, length in ranges)
            pieces = sum(len(module._pieces(span)) for span in spans)
            assert wanted_bytes <= request.device_bytes <= wanted_bytes + 2 * PAGE_BYTES * pieces

        check()


def test_buffers_are_as_large_as_the_pages_around_the_longest_range(shard: Path) -> None:
    longest_bytes = 128 * PAGE_BYTES  # four of these are one huge page, so nothing is there by rounding up
    spans = spans_of(shard, [(PAGE_BYTES - 1, longest_bytes)])
    with Reader([shard], reads_in_flight=4, longest_bytes=longest_bytes) as reader:
        assert read(reader, spans).error is None
        assert reader.buffer_bytes == (2 * HUGE_BYTES if reader.direct else 0)
    content = np.fromfile(shard, dtype=np.uint8)
    assert np.array_equal(spans[0].target, content[PAGE_BYTES - 1 :][:longest_bytes])


@pytest.mark.parametrize(("offset", "pages", "start"), [(1, 3, 0), (0, 300, 0), (1, 3, 64), (2, 1, PAGE_BYTES)])
def test_whole_pages_are_not_copied_where_they_may_lie(
    shard: Path, monkeypatch: pytest.MonkeyPatch, offset: int, pages: int, start: int
) -> None:
    copied: list[int] = []
    real = np.copyto
    monkeypatch.setattr(module.np, "copyto", lambda to, source: copied.append(len(to)) or real(to, source))
    target = np.frombuffer(huge_pages(2**21), np.uint8)[start : start + pages * PAGE_BYTES]
    with Reader([shard], reads_in_flight=3) as reader:
        if not reader.direct:
            pytest.skip("this file system refuses O_DIRECT")
        request = read(reader, [Span(shard, offset * PAGE_BYTES, target)])
    assert request.error is None
    assert np.array_equal(target, np.fromfile(shard, np.uint8, len(target), offset=offset * PAGE_BYTES))
    assert request.device_bytes >= len(target)
    assert sum(copied) == (0 if start % PAGE_BYTES == 0 else len(target))


def test_many_requests_land_once_each_in_any_order(shard: Path) -> None:
    content = np.fromfile(shard, dtype=np.uint8)
    landed: SimpleQueue[Request] = SimpleQueue()
    spans = spans_of(shard, [(offset, 5000) for offset in range(0, SIZE - 5000, 40_000)])
    with Reader([shard], reads_in_flight=4) as reader:
        for number, span in enumerate(spans):
            reader.start((0, number), [span], landed, what="an expert")
        keys = [landed.get(timeout=30).key for _ in spans]
    assert sorted(keys) == [(0, number) for number in range(len(spans))]
    assert all(np.array_equal(s.target, content[s.offset : s.offset + 5000]) for s in spans)


@given(st.integers(0, 3 * PAGE_BYTES), st.integers(1, 4 * PIECE_BYTES))
def test_long_ranges_are_cut_between_pages_in_equal_parts_and_lose_nothing(offset: int, length: int) -> None:
    target = np.empty(length, np.uint8)
    pieces = module._pieces(Span(Path("it"), offset, target))
    assert [piece.offset for piece in pieces] == [
        offset + piece.target.ctypes.data - target.ctypes.data for piece in pieces
    ]
    assert sum(len(piece.target) for piece in pieces) == length
    ends = [piece.offset + len(piece.target) for piece in pieces]
    assert all(end % PAGE_BYTES == 0 for end in ends[:-1])
    assert ends[:-1] == [piece.offset for piece in pieces[1:]]
    pages = [-(-end // PAGE_BYTES) - piece.offset // PAGE_BYTES for end, piece in zip(ends, pieces, strict=True)]
    assert len(pieces) == -(-sum(pages) * PAGE_BYTES // PIECE_BYTES), "no more than need be"
    assert max(pages) * PAGE_BYTES <= PIECE_BYTES
    assert max(pages) - min(pages[:-1] or pages) == 0


class Gate:
    """Reads wait until they are let through, and are noted in the order they begin."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.offsets: SimpleQueue[int] = SimpleQueue()
        self._permits = threading.Semaphore(0)
        real = os.preadv

        def preadv(descriptor: int, buffers: Any, offset: int) -> int:
            self.offsets.put(offset)
            assert self._permits.acquire(timeout=30)
            return real(descriptor, buffers, offset)

        monkeypatch.setattr(os, "preadv", preadv)

    def began(self) -> int:
        return self.offsets.get(timeout=30)

    def let_through(self, reads: int = 1) -> None:
        self._permits.release(reads)


def test_what_nobody_waits_for_comes_last_until_somebody_does(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    landed: SimpleQueue[Request] = SimpleQueue()
    with Reader([shard], reads_in_flight=1, direct=False) as reader:
        gate = Gate(monkeypatch)
        begun, early, late = (
            reader.start((0, n), spans_of(shard, [(n, 1)]), None, what="an expert read ahead") for n in range(3)
        )
        assert gate.began() == 0
        reader.start((0, 3), spans_of(shard, [(3, 1)]), landed, what="an expert")
        reader.wait_for(late, landed)
        gate.let_through(4)
        assert [gate.began() for _ in range(3)] == [3, 2, 1]
        assert [landed.get(timeout=30).key for _ in range(2)] == [(0, 3), (0, 2)]
        for request in (begun, early):  # done long since, or not yet
            reader.wait_for(request, landed)
            assert landed.get(timeout=30) is request
    assert landed.empty(), "each lands once"


def test_of_what_is_dropped_no_further_piece_is_read(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    landed: SimpleQueue[Request] = SimpleQueue()
    with Reader([shard], reads_in_flight=1, direct=False) as reader:
        gate = Gate(monkeypatch)
        dropped = reader.start((0, 0), spans_of(shard, [(0, 2 * PIECE_BYTES)]), None, what="an expert read ahead")
        never = reader.start((0, 1), spans_of(shard, [(0, 3)]), None, what="an expert read ahead")
        gate.began()
        dropped.drop()
        never.drop()
        assert (never.is_done, never.wanted_bytes) == (True, 0)
        assert not dropped.is_done
        reader.start((0, 2), spans_of(shard, [(7, 1)]), landed, what="an expert")
        gate.let_through(2)
        assert gate.began() == 7
        assert landed.get(timeout=30).key == (0, 2)
        assert dropped.is_done
        assert dropped.wanted_bytes == dropped.device_bytes == PIECE_BYTES
        dropped.drop()
        reader.wait_for(dropped, landed)
        assert landed.get(timeout=30) is dropped
    assert gate.offsets.empty()
    assert landed.empty()


def test_the_clock_runs_while_something_is_read(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    landed: SimpleQueue[Request] = SimpleQueue()
    with Reader([shard], reads_in_flight=2, direct=False) as reader:
        gate = Gate(monkeypatch)
        for number in range(2):
            reader.start((0, number), spans_of(shard, [(number, 1)]), landed, what="an expert")
        for _ in range(2):
            gate.began()
        first = reader.clock.seconds()
        time.sleep(0.002)
        assert reader.clock.seconds() >= first + 0.002
        gate.let_through(2)
        for _ in range(2):
            landed.get(timeout=30)
        stopped = reader.clock.seconds()
        time.sleep(0.002)
        assert reader.clock.seconds() == stopped >= 0.002


@pytest.mark.parametrize("direct", [True, False])
def test_a_shard_that_was_cut_is_named_with_all_particulars(tmp_path: Path, direct: bool) -> None:
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(bytes(3 * PAGE_BYTES))
    with Reader([shard], direct=direct) as reader:
        os.truncate(shard, PAGE_BYTES + 100)
        request = read(reader, spans_of(shard, [(PAGE_BYTES + 50, 200)]))
        words = r"short read of layer 1 expert 2: .*model\.safetensors at offset 4146, wanted 200 bytes, got 50: "
        with pytest.raises(UserError, match=words):
            raise request.error or AssertionError("no error")


@pytest.mark.parametrize("direct", [True, False])
def test_a_shard_that_was_written_over_is_named(tmp_path: Path, direct: bool) -> None:
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(bytes(3 * PAGE_BYTES))
    with Reader([shard], direct=direct) as reader:
        assert read(reader, spans_of(shard, [(0, 10)])).error is None
        assert reader.changed_shards() == []
        with shard.open("r+b") as file:
            file.write(b"other")
        os.utime(shard, ns=(1, 1))
        assert reader.changed_shards() == [shard]
        request = read(reader, spans_of(shard, [(0, 10)]))
        with pytest.raises(UserError, match=r"layer 1 expert 2: .*model\.safetensors was changed while in use"):
            raise request.error or AssertionError("no error")


def test_a_file_system_without_direct_reads_is_read_through_the_page_cache(
    shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open

    def refusing(path: Any, flags: int, *args: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real_open(path, flags, *args)

    monkeypatch.setattr(os, "open", refusing)
    with Reader([shard]) as reader:
        assert not reader.direct
        spans = spans_of(shard, [(123, 456)])
        assert read(reader, spans).error is None
    assert np.array_equal(spans[0].target, np.fromfile(shard, dtype=np.uint8)[123:579])


def test_a_read_error_lands_with_its_cause(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with Reader([shard], direct=False) as reader:
        request = read(reader, spans_of(shard, [(0, 2 * PIECE_BYTES)]))
    assert isinstance(request.error, UserError)
    assert "layer 1 expert 2 cannot be read from" in str(request.error)
    assert "Input/output error" in str(request.error)


def test_a_closed_reader_ends_its_threads_and_says_so(shard: Path) -> None:
    before = threading.enumerate()

    def started() -> int:  # others of this process may end meanwhile
        return len([thread for thread in threading.enumerate() if thread not in before])

    reader = Reader([shard], reads_in_flight=3)
    assert started() == 0, "threads start with the first read"
    read(reader, spans_of(shard, [(0, 10)]))
    assert started() == 3
    reader.close()
    reader.close()
    assert started() == 0
    with pytest.raises(UserError, match="use the model inside the `with load"):
        read(reader, spans_of(shard, [(0, 10)]))
