"""`remoe serve`: the flags reach the engine, mistakes end in one message, signals end the process in order."""

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from configs.command import parse
from configs.load import UserError
from evaluation.server.application import HttpServer
from evaluation.server.choice import Choice
from evaluation.server.work import Job
from launch.serve import Serve, main, opened
from tests.evaluation.server.running import our_threads, serve, threads_left

Checkpoint = Callable[..., Path]
WAIT_SECONDS = 60


def test_engine_flags_reach_the_engine(model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = str(model_dir("olmoe")), []

    def load_for(*given: str) -> dict[str, torch.Tensor]:
        asked.append(given)
        return {f"model.layers.{layer}.mlp.gate.weight": torch.randn(8, 16) for layer in range(2)}

    monkeypatch.setattr("launch.engine_flags.load_for", load_for)
    flags = ["--expert-cache", "50%", "--cache-policy", "lfu", "--cache-scope", "per_layer", "--dtype", "bfloat16"]
    command = parse(Serve, ["--model", folder, "--router-delta", "some/delta", *flags], prog="remoe serve")
    with opened(command) as loaded:
        assert asked == [(folder, "some/delta")]
        assert loaded.engine.dtype == torch.bfloat16
        assert loaded.engine.cache.total_slots == 8
        assert HttpServer(loaded, timeout_keep_alive=command.server.timeout_keep_alive).config.timeout_keep_alive == 75
    for flag, value in (("--cache-policy", "best"), ("--cache-scope", "both"), ("--dtype", "int3")):
        with pytest.raises(UserError, match=value):
            main(["--model", folder, "--expert-cache", "50%", "--port", "0", flag, value])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-queue", "-1"], "--max-queue is -1; write at least 0"),
        (["--max-request-bytes", "0"], "--max-request-bytes is 0; write at least 1"),
        (["--max-model-len", "1"], "--max-model-len is 1; write at least 2"),
        (["--block-tokens", "0"], "--block-tokens is 0; write at least 1"),
        (["--max-model-len", "65"], "--max-model-len 65 is more than the 64 positions this model has"),
        (["--api-key-env", "NO_SUCH_KEY"], "--api-key-env names NO_SUCH_KEY, which is not set"),
        (["--expert-cache", "1KiB"], "too small: .* the smallest that works is"),
        (["--port", "{taken}"], r"cannot listen at 127\.0\.0\.1 port \d+: Address already in use; choose another"),
        (["--port", "65536"], "--port is 65536; it must be between 0 and 65535"),
        (["--host", "no host at all"], "cannot listen at no host at all port"),
    ],
)
def test_mistakes_are_named(model_dir: Callable[[str], Path], flags: list[str], words: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = str(other.getsockname()[1])
        given = [flag.replace("{taken}", taken) for flag in flags]
        with pytest.raises(UserError, match=words):
            main(["--model", str(model_dir("olmoe")), "--expert-cache", "50%", "--port", "0", *given])


@pytest.mark.parametrize(
    ("host", "flags", "warned"),
    [("0.0.0.0", [], True), ("0.0.0.0", ["--api-key-env", "SOME_KEY"], False), ("127.0.0.1", [], False)],
)
def test_a_server_that_is_open_to_others_says_so(
    model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str], host: str, flags: list[str], warned: bool,
) -> None:  # fmt: skip
    monkeypatch.setenv("SOME_KEY", "x")
    monkeypatch.setattr(HttpServer, "run", lambda *_, **__: None)
    main(["--model", str(model_dir("olmoe")), "--expert-cache", "50%", "--port", "0", "--host", host, *flags])
    assert ("whoever reaches http://" in caplog.text) is warned
    assert f"at http://{host}:" in capsys.readouterr().out


def test_a_server_that_stops_breaks_off_what_does_not_end(
    model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = our_threads()
    left, push, cancel = threading.Event(), Choice.push, Job.cancel

    def pushed(choice: Choice, *args: Any) -> Any:
        if choice.tokens == 4:
            assert left.wait(WAIT_SECONDS)
        return push(choice, *args)

    def cancelled(job: Job) -> None:
        cancel(job)
        left.set()

    monkeypatch.setattr(Choice, "push", pushed)
    monkeypatch.setattr(Job, "cancel", cancelled)
    monkeypatch.setattr("evaluation.server.application.GRACE_SECONDS", 0.05)
    body = {"prompt": "x", "max_tokens": 20, "temperature": 0, "stream": True}
    with httpx2.Client() as client:
        with serve(model_dir("olmoe")) as served:
            request = client.build_request("POST", f"{served.url}/v1/completions", json=body)
            lines = client.send(request, stream=True).iter_lines()
            next(lines)
        assert left.is_set()
        assert "the server is stopping" in [line for line in lines if line][-1], "the client is told"
    assert not threads_left(threads)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_finish_and_ends_the_process_in_order(
    model_dir: Callable[[str], Path], number: signal.Signals
) -> None:
    flags = ["--model", str(model_dir("olmoe")), "--expert-cache", "50%", "--port", "0"]
    command = [sys.executable, "-m", "launch.cli", "serve", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        assert "with 8 of 16 experts" in ready
        url = ready.split(" at ")[1].split()[0]
        body = {"prompt": "ab", "max_tokens": 60, "temperature": 0, "stream": True}
        with httpx2.stream("POST", f"{url}/completions", json=body, timeout=WAIT_SECONDS) as answer:
            lines = answer.iter_lines()
            assert json.loads(next(lines).removeprefix("data: "))["choices"]
            process.send_signal(number)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        out, err = process.communicate(timeout=WAIT_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "Traceback" not in out + err
