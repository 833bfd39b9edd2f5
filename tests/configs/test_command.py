"""How a command ends: a code and at most one line."""

import errno
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest

from configs.command import run
from configs.load import UserError


def failing_with(error: BaseException) -> Callable[[Sequence[str] | None], None]:
    def main(argv: Sequence[str] | None) -> None:
        raise error

    return main


def test_success_is_code_0_and_the_arguments_arrive() -> None:
    seen: list[Sequence[str] | None] = []
    assert run(seen.append, ["a", "b"]) == 0
    assert seen == [["a", "b"]]


def test_a_users_mistake_is_code_2_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(failing_with(UserError("x=3 is wrong:\n  write   x=4"))) == 2
    assert capsys.readouterr() == ("", "error: x=3 is wrong: write x=4\n")


@pytest.mark.parametrize(("name", "where"), [(None, ""), ("runs/x/file", " while writing runs/x/file")])
def test_a_full_disk_is_code_2_and_says_so(name: str | None, where: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    assert run(failing_with(error)) == 2
    assert capsys.readouterr().err.startswith(f"error: the disk is full{where}; free some space")


def test_another_system_error_is_not_hidden() -> None:
    with pytest.raises(PermissionError):
        run(failing_with(PermissionError(errno.EACCES, "no")))


def test_a_programming_error_is_not_hidden() -> None:
    with pytest.raises(AssertionError, match="ours"):
        run(failing_with(AssertionError("ours")))


def test_an_interruption_is_code_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(failing_with(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_a_reader_that_leaves_ends_the_command_without_a_word() -> None:
    code = "import sys; from configs.command import run; sys.exit(run(lambda _: print('x' * 10**6)))"
    command = f"{sys.executable} -c {shlex.quote(code)} | head -c 10; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (141, "x" * 10, "")


def test_output_that_ascii_cannot_say_is_escaped_and_closed_output_goes_nowhere() -> None:
    program = "from configs.command import run; import sys; sys.exit(run(lambda _: print('caf\u00e9 \u2013')))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    assert (said.returncode, said.stdout, said.stderr) == (0, b"caf\\xe9 \\u2013\n", b"")
    closed = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} >&-"
    assert subprocess.run(closed, shell=True, check=False).returncode == 0
