"""Bandwidths: of the size and depths asked for, and honest about O_DIRECT."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.benchmark.bandwidth import disk_rate, memory_bandwidth, products_beside


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(bytes(1 << 20))
    return path


def test_every_depth_is_measured_and_the_best_is_known(file: Path) -> None:
    found = disk_rate([file], 5000, depths=(1, 3), seconds=0.05)
    assert found.read_bytes == 8192
    assert set(found.by_depth) == {1, 3}
    assert found.best == max(found.by_depth.values()) > 0


def test_a_refused_o_direct_is_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_open = os.open

    def refuse(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return plain_open(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    found = disk_rate([file], 4096, depths=(1,), seconds=0.01)
    assert not found.direct
    assert found.best > 0


def test_a_file_smaller_than_an_expert_is_read_as_it_is(file: Path) -> None:
    assert disk_rate([file], 4 << 20, depths=(1,), seconds=0.01).best > 0


def test_memory_bandwidth_is_a_rate() -> None:
    assert memory_bandwidth(1, size_bytes=1 << 22, rounds=2) > 1e8


def test_products_go_on_beside_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, multiplied, real = torch.get_num_threads(), threading.Event(), torch.mm
    seen: list[int] = []

    def mm(*args: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        multiplied.set()
        return real(*args)

    monkeypatch.setattr(torch, "mm", mm)
    with products_beside(1):
        assert multiplied.wait(timeout=30)
    assert set(seen) == {1}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("products")]
    assert torch.get_num_threads() == threads
