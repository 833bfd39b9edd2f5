"""`remoe bench`: every subject has help with an example, and its flags reach it."""

from dataclasses import replace
from typing import Any

import pytest

from configs.load import UserError
from evaluation.benchmark.decode import DecodeBenchmark
from launch import bench
from launch.bench import SUBJECTS, main


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """No subject is measured; what was asked for is listed."""
    asked: list[Any] = []
    for name, subject in SUBJECTS.items():
        monkeypatch.setitem(bench.SUBJECTS, name, subject._replace(benchmark=asked.append))
    return asked


@pytest.mark.parametrize("subject", SUBJECTS)
def test_help_of_a_subject_shows_an_example(subject: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([subject, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: remoe bench {subject} " in shown
    assert f"  remoe bench {subject} " in shown.split("example")[1]


def test_help_names_every_subject(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    shown = capsys.readouterr().out
    assert all(f"  {subject} " in shown for subject in SUBJECTS)


def test_flags_reach_the_subject(asked: list[Any]) -> None:
    main(["decode", "--model", "m", "--expert-cache", "25%,50%", "--against", "", "--timeout", "5"])
    assert asked == [replace(DecodeBenchmark(model="m", expert_cache="25%,50%"), against="", timeout=5.0)]


@pytest.mark.parametrize("subject", ["training", "scaling"])
def test_a_config_and_its_overrides_stand_among_flags(asked: list[Any], subject: str) -> None:
    main([subject, "c.yaml", "max_length=8", "--repeats", "2", "seed=1"])
    (options,) = asked
    assert (options.config, options.overrides, options.repeats) == ("c.yaml", ("max_length=8", "seed=1"), 2)


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError, match="unknown subject 'speed'; write one of decode, memory"):
        main(["speed"])
    with pytest.raises(UserError, match="--repeats is 0; write at least 1"):
        main(["curve", "--repeats", "0"])
