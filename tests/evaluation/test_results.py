"""Results files that are not as they should be: what is wrong is said, and where."""

from pathlib import Path
from typing import Any

import pytest

from configs import command
from configs.load import UserError
from evaluation.results import Routing, checked_results, naming_the_place, read_results
from launch.report import main
from tests.evaluation.made_results import changed, made_content, made_results


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("format_version",), 2, "format_version is 2, this report reads 1"),
        (("arms",), {}, "arms has no 'base'"),
        (("arms", "cache", "runs"), [], "arms.cache.runs is empty"),
        (("arms", "cache", "runs"), None, "arms.cache.runs must be a list, found null"),
        (
            ("arms", "base", "runs", 0, "replay", 3),
            {},
            r"arms.base.runs\[0\].replay\[3\].policy is missing; write null",
        ),
        (
            ("arms", "base", "runs", 0, "routing", "nll"),
            "low",
            "routing.nll must be a finite number, or null.*found str 'low'",
        ),
        (
            ("arms", "base", "runs", 0, "routing", "nll"),
            float("nan"),
            "routing.nll must be a finite number.*found float nan",
        ),
        (
            ("arms", "base", "runs", 0, "routing", "nll"),
            float("-inf"),
            "routing.nll must be a finite number.*found float -inf",
        ),
        (
            ("arms", "base", "runs", 0, "routing", "nll"),
            True,
            "routing.nll must be a finite number.*found bool True",
        ),
        (
            ("arms", "base", "runs", 0, "replay", 0, "slots"),
            4.5,
            r"replay\[0\].slots must be a whole number.*found float 4.5",
        ),
        (
            ("arms", "base", "runs", 0, "replay", 0, "cache_scope"),
            "global",
            r"replay\[0\].cache_scope must be .*per_layer.*found str 'global'",
        ),
        (("plans", 0), {}, r"plans\[0\].division is missing"),
        (("model", "dtype"), 16, "model.dtype must be text or null, found int 16"),
        (("reproduce", "machine"), "laptop", "reproduce.machine must be an object"),
    ],
)
def test_results_that_are_not_as_they_should_be_are_refused_by_place(
    path: tuple[str | int, ...], value: Any, words: str
) -> None:
    content = made_content()
    checked_results(content)
    with pytest.raises(UserError, match=words):
        checked_results(changed(content, *path, value=value))


def test_what_is_written_is_what_was_read_with_keys_that_nobody_knows() -> None:
    content = changed(made_content(), "arms", "base", "runs", 0, "routing", "of_later_versions", value=[1.5])
    written = checked_results(content).model_dump(by_alias=True)
    run = written["arms"]["base"]["runs"][0]
    assert run["routing"] == content["arms"]["base"]["runs"][0]["routing"] | {"groups": {}}
    assert run["lru_curves"] == content["arms"]["base"]["runs"][0]["lru_curves"]
    assert checked_results(written) == checked_results(content)


def test_a_measurement_that_is_no_number_is_refused_by_name_when_it_is_made() -> None:
    routing = made_results().arms["base"].runs[0].routing
    assert routing is not None
    with (
        pytest.raises(UserError, match=r"remoe: nll must be a finite number, or null .*found float nan"),
        naming_the_place("remoe"),
    ):
        Routing(**{**dict(routing), "nll": float("nan")})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist; name the results.json of a finished run"),
        (b'{"format_version": 1,', "is not valid JSON.*may be cut off"),
        (b"[1, 2]", "must hold one JSON object, found list"),
        (b"\xff\xfe{}", "is not UTF-8 text"),
    ],
)
def test_a_missing_or_damaged_file_is_one_clear_message_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, words: str
) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_results(path)
    assert command.run(main, [str(path), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {'results file ' if content is None else ''}{path}")
    assert not (tmp_path / "out").exists()
