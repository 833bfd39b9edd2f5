"""However a side's process ends, its run says how, and keeps what was measured before."""

import signal
from pathlib import Path

import pytest

from evaluation.benchmark import processes
from evaluation.benchmark.memory_group import find_hierarchy
from evaluation.benchmark.order import COLD, WARM, Leg, Order
from evaluation.benchmark.processes import Child, Limits, SideRun, run_side

LEGS = [Leg(COLD, [1], 2), Leg(WARM, [1], 2)]
ORDER = Order("remoe", "nowhere", LEGS, 1, expert_cache="1MiB")


@pytest.fixture
def side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that runs in place of the side; write its code there."""
    monkeypatch.setattr(processes, "PROJECT", tmp_path)
    monkeypatch.setattr(processes, "MODULE", "made_side")
    return tmp_path / "made_side.py"


def result_of(limit_bytes: int | None = None, timeout_seconds: float = 30) -> SideRun:
    hierarchy = find_hierarchy() if limit_bytes else None
    if limit_bytes and hierarchy is None:
        pytest.skip("no memory controller in which this user may make groups")
    return run_side(ORDER, Limits(timeout_seconds, limit_bytes, hierarchy), contender="c", repeat=3)


def test_a_whole_result_has_no_failure(side: Path) -> None:
    side.write_text(
        "import json, sys\n"
        "legs = [leg['name'] for leg in json.load(open(sys.argv[1]))['legs']]\n"
        "json.dump({'load_seconds': 2.0, 'peak_rss_bytes': 5, 'settings': {'a': 1}, 'legs': {n: {} for n in legs}},"
        " open(sys.argv[2], 'w'))\n"
    )
    run = result_of()
    assert (run.failure, run.load_seconds, run.settings, list(run.legs)) == (None, 2.0, {"a": 1}, [COLD, WARM])
    assert (run.contender, run.repeat, run.limit_bytes, run.peak_memory_bytes) == ("c", 3, None, None)


def test_the_kernel_s_kill_is_told_and_the_first_leg_kept(side: Path) -> None:
    side.write_text(
        "import json, sys\n"
        "json.dump({'legs': {'cold': {'tpot_ms': 1.0}}}, open(sys.argv[2], 'w'))\n"
        "x = b'1' * (256 << 20)\n"
    )
    run = result_of(limit_bytes=96 << 20)
    assert run.failure == "killed by the kernel: more than the memory limit of 96MiB, page cache included"
    assert run.legs == {"cold": {"tpot_ms": 1.0}}
    assert run.peak_memory_bytes == 96 << 20


def test_a_missing_package_says_what_to_install(side: Path) -> None:
    side.write_text("import no_such_package_anywhere\n")
    failure = result_of().failure
    assert failure is not None
    assert failure.startswith("ModuleNotFoundError: No module named 'no_such_package_anywhere'; install the opponents")


def test_another_error_is_its_last_line(side: Path) -> None:
    side.write_text("raise ValueError('the weights are gone')\n")
    assert result_of().failure == "exit code 1: ValueError: the weights are gone"


def test_an_endless_side_is_ended(side: Path) -> None:
    side.write_text("while True: pass\n")
    assert result_of(timeout_seconds=0.5).failure == (
        "not finished after 0.5 seconds and ended; raise --timeout or ask for fewer tokens"
    )


def test_orders_survive_the_way_to_the_process(tmp_path: Path) -> None:
    ORDER.write(tmp_path / "order.json")
    assert Order.read(tmp_path / "order.json") == ORDER


def test_a_child_is_spoken_to_in_lines_and_its_last_words_are_kept(side: Path) -> None:
    side.write_text("import sys\nprint('ready', flush=True)\ninput()\nprint('done')\nsys.exit('error: no more')\n")
    with Child("made_side") as child:
        assert child.line() == "ready\n"
        child.nudge()
        assert [child.line(), child.line()] == ["done\n", ""]
        assert (child.wait(), child.last_words) == (1, "no more")


def test_a_child_ends_with_its_block(side: Path) -> None:
    side.write_text("print('ready', flush=True)\nwhile True: pass\n")
    with Child("made_side", environment={"ANY": "thing"}) as child:
        child.line()
        assert child.last_words == "nothing on standard error"
    assert child.process.returncode == -signal.SIGKILL
