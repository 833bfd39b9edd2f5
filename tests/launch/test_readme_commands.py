"""Every `remoe` command that a README or a `--help` shows is understood by the command it names."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from configs import command as command_module
from launch.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]


class Understood(Exception):
    """The line was parsed; nothing is run."""


def shown() -> Iterator[tuple[str, str]]:
    """File and command line of every `remoe ...` in a code block, a table's cell or a help's example; prose may name parts."""
    listed = subprocess.run(["git", "ls-files", "*.md", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        text = (ROOT / name).read_text(encoding="utf-8")
        if name.endswith(".py"):
            found = re.findall(r"^ {6}(remoe .*)$", text.replace("\\\\\n", " "), re.MULTILINE)
            yield from ((name, words) for words in found if not name.startswith("tests"))
            continue
        for line in text.replace("\\\n", " ").splitlines():
            spans = re.findall(r"`(remoe [^`]+ [^`]+)`", line) if line.startswith("|") else []
            block = re.match(r" {4}(?:\.venv/bin/)?(remoe .*)", line)
            yield from ((name, words) for words in [*spans, *([block[1]] if block else [])] if "COMMAND" not in words)


def test_there_are_commands_to_look_at() -> None:
    commands = {words.split()[1] for _, words in shown()}
    assert commands >= {"train", "run", "evaluate", "generate", "plan", "replay", "export", "bench"}


@pytest.mark.parametrize(("name", "line"), list(dict.fromkeys(shown())))
def test_a_command_that_is_shown_is_understood(name: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = command_module.parse

    def only_parse(*arguments: Any, **options: Any) -> None:
        parse(*arguments, **options)
        raise Understood

    words = shlex.split(line, comments=True)[1:]
    if "|" in line:  # names several commands at once
        return
    assert words[0] in COMMANDS, f"{name} shows {line}"
    if words[0] == "lm-eval":  # is parsed by the harness
        from lm_eval._cli import HarnessCLI  # type: ignore[import-untyped, unused-ignore]

        monkeypatch.setattr(HarnessCLI, "execute", only_look)
        monkeypatch.setattr(sys, "argv", [])
    else:
        monkeypatch.setattr(import_module(COMMANDS[words[0]]), "parse", only_parse)
    with pytest.raises(Understood):
        main(words)


def only_look(_: Any, parsed: Any) -> None:
    assert parsed.model == "remoe"
    assert {"pretrained"} < set(parsed.model_args)
    raise Understood
