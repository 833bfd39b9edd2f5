"""Calibration: measured once per device, the fewest reads in flight that are fast enough, never in the way."""

from pathlib import Path

import numpy as np
import pytest

from evaluation.engine.store import bandwidth
from evaluation.engine.store.bandwidth import (
    DEPTHS,
    ROUNDS,
    ReadBandwidth,
    calibrate,
    calibrated,
    read_speed,
    reads_in_flight_for,
)
from evaluation.engine.store.reader import READS_IN_FLIGHT


@pytest.fixture
def shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "model.safetensors"
    np.zeros(3_000_000, np.uint8).tofile(path)
    return path


def pretend(monkeypatch: pytest.MonkeyPatch, speeds: dict[int, float]) -> list[int]:
    """Speeds by depth; returns the list of depths that are asked for."""
    asked: list[int] = []

    def speed(_: Path, depth: int, *, seconds: float) -> float:
        asked.append(depth)
        return speeds[depth]

    monkeypatch.setattr(bandwidth, "read_speed", speed)
    return asked


def test_a_real_device_has_a_speed(shard: Path) -> None:
    assert read_speed(shard, 3, seconds=0.05) > 0


def test_the_fewest_reads_that_are_fast_enough_are_taken(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretend(monkeypatch, {4: 89.9, 8: 90.1, 16: 100.0})
    assert calibrate(shard) == ReadBandwidth(8, 90.1)
    assert asked == [4, 8, 16] * ROUNDS


def test_a_slow_moment_does_not_decide(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = iter([40.0, 100.0, 100.0, 95.0, 70.0, 80.0])
    monkeypatch.setattr(bandwidth, "read_speed", lambda *_, **__: next(speeds))
    assert calibrate(shard) == ReadBandwidth(4, 95.0)


def test_a_device_is_measured_once(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretend(monkeypatch, dict.fromkeys(DEPTHS, 1.0))
    assert calibrated([shard]) == calibrated([shard]) == ReadBandwidth(4, 1.0)
    assert asked == list(DEPTHS) * ROUNDS


@pytest.mark.parametrize("content", ["", "{", "[]", '{"1": {"reads": 3}}'])
def test_a_damaged_memory_is_measured_anew(shard: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    asked = pretend(monkeypatch, dict.fromkeys(DEPTHS, 1.0))
    path = bandwidth._cache_path()
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert calibrated([shard]) == ReadBandwidth(4, 1.0)
    assert calibrated([shard]) == ReadBandwidth(4, 1.0)
    assert len(asked) == len(DEPTHS) * ROUNDS


def test_a_home_that_cannot_be_written_is_no_error(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, dict.fromkeys(DEPTHS, 1.0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(shard))  # a file where a folder should be
    assert calibrated([shard]) == ReadBandwidth(4, 1.0)


def test_small_checkpoints_are_not_measured(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretend(monkeypatch, dict.fromkeys(DEPTHS, 1.0))
    assert reads_in_flight_for([shard]) == READS_IN_FLIGHT
    assert not asked
    monkeypatch.setattr(bandwidth, "WORTH_BYTES", 1000)
    assert reads_in_flight_for([shard]) == 4
