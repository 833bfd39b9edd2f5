"""The `remoe` command: every sub-command is a module, has help with an example, and tells mistakes in one message."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from launch.bench import SUBJECTS
from launch.cli import COMMANDS, GROUPS, main

ROOT = Path(__file__).parents[2]
TINY = "configs/evaluation/tiny.yaml"
GENERATE = ["--expert-cache", "1MiB", "--prompt", "x", "--max-new-tokens", "4", "--output", "runs/x.json"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: remoe {command}" in shown
    assert f"  remoe {command} " in shown.split("example")[1]


@pytest.mark.parametrize("command", [*COMMANDS, *(f"bench {subject}" for subject in SUBJECTS)])
def test_help_says_something_of_every_flag(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    shown = "\n".join(line.strip("│|")[1:].rstrip() for line in capsys.readouterr().out.splitlines())
    flags = re.findall(r"^ ?(--[a-z][\w-]*)((?: [A-Z{][\w|{},.]*)*.*(?:\n {6,}\S.*)*)", shown, flags=re.MULTILINE)
    assert flags or command in ("run", "frontier", "search", "bench", "lm-eval"), "no flag was found"
    no_words = r"\((default|required|repeatable)[^)]*\)|(?<= )[A-Z]+\b|\{.*?\}"
    without_words = [flag for flag, words in flags if not re.sub(no_words, "", words, flags=re.DOTALL).strip()]
    assert without_words == []


def test_usage_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {command} " in shown for command in COMMANDS)
    assert [line[:-1] for line in shown.splitlines() if line.endswith(":")] == list(GROUPS)


def test_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "unknown command 'trian'; write one of train, run" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings GNU's OpenMP on Linux only")
@pytest.mark.parametrize(
    ("given", "spins"), [({}, 10_000), ({"GOMP_SPINCOUNT": "7"}, 7), ({"OMP_WAIT_POLICY": "PASSIVE"}, 0)]
)
def test_threads_that_wait_sleep_soon(given: dict[str, str], spins: int) -> None:
    """What torch's OpenMP itself says that it reads: the setting came before torch was loaded, and a user's own is kept."""
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    ended = subprocess.run(
        [sys.executable, "-m", "launch.cli", "plan", "--help"],
        env=environment | {"OMP_DISPLAY_ENV": "VERBOSE"} | given, cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"GOMP_SPINCOUNT = '{spins}'" in ended.stderr


def test_console_script_is_this_main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["scripts"] == {"remoe": "launch.cli:main"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "configs/train/tiny.yaml", "lerning_rate=1"], "did you mean learning_rate?"),
        (["train", "configs/train/tyni.yaml"], "did you mean configs/train/tiny.yaml?"),
        (["evaluate", "--model", "nowhere/at/all", "--config", TINY, "--output", "runs/x"], "nowhere/at/all does not exist"),
        (["run", "configs/run/demo.yaml", "sedes=[1]"], "did you mean seeds?"),
        (["generate", "--model", "nowhere/at/all", *GENERATE], "nowhere/at/all does not exist"),
        (["trace", "--model", "nowhere/at/all", "--text-file", "README.md", "--output", "runs/x.npz"], "nowhere/at/all does not"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_no_traceback(arguments: list[str], words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert words in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("error: ")
