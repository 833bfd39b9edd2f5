"""How busy the machine was, from two readings of its counters."""

import os

import pytest

from evaluation.machine import ProcessorTimes, machine_load, processor_times


def test_shares_are_parts_of_all_processors_time_between_two_readings() -> None:
    before = ProcessorTimes(total=1000, idle=500, stolen=10, own=100, load_average=0.5)
    after = ProcessorTimes(total=1200, idle=520, stolen=20, own=230, load_average=2.5)
    assert dict(machine_load(before, after)) == pytest.approx(
        {
            "load_average_before": 0.5,
            "load_average_after": 2.5,
            "stolen_share": 10 / 200,
            "others_share": 40 / 200,  # 200 - 20 idle - 10 stolen - 130 our own
        }
    )


def test_others_never_have_less_than_nothing() -> None:
    reading = processor_times()
    assert machine_load(reading, reading).others_share == 0
    ahead = ProcessorTimes(reading.total + 10, reading.idle, reading.stolen, reading.own + 10.5, reading.load_average)
    assert machine_load(reading, ahead).others_share == 0


def test_a_reading_has_all_processors_and_this_process_in_it() -> None:
    reading = processor_times()
    assert reading.total > reading.idle > 0
    assert 0 < reading.own <= sum(os.times()[:4])
