"""The meter's figures by hand, and that it counts what was really read."""

import os
from pathlib import Path

import pytest

from evaluation.benchmark.sides.meter import Meter, process_io


def test_figures_by_hand() -> None:
    meter = Meter(start_io={"rchar": 100, "read_bytes": 10})
    meter.token_ids = [7, 8, 9]
    meter.token_seconds = [1.0, 1.5, 2.5]
    meter.token_io = [{"rchar": n, "read_bytes": m} for n, m in ((150, 20), (170, 50), (190, 120))]
    result = meter.result()
    assert (result.ttft_ms, result.tpot_ms, result.itl_ms) == (1000, 750, [500, 1000])
    assert result.output_throughput == pytest.approx(3 / 2.5)
    assert result.prefill_io == {"rchar": 50, "read_bytes": 10}
    assert result.decode_io == {"rchar": 40, "read_bytes": 100}
    assert result.bytes_read_per_token == 50


def test_one_token_has_no_time_per_output_token() -> None:
    meter = Meter()
    meter.tokens([5])
    result = meter.result()
    assert (result.tpot_ms, result.bytes_read_per_token, result.itl_ms) == (None, None, [])


def test_reads_are_counted_where_they_happen(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    before = process_io()
    descriptor = os.open(file, os.O_RDONLY)
    os.read(descriptor, 1 << 20)
    os.close(descriptor)
    assert process_io()["rchar"] - before["rchar"] >= 1 << 20
