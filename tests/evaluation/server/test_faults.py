"""What goes wrong around one request does not reach the next: clients that leave, reads that fail, a full queue."""

import errno
import json
import os
import shutil
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from configs.load import UserError
from evaluation.server.work import Job
from evaluation.server.worker import Worker
from tests.evaluation.server.running import Plain, Served, our_threads, serve, threads_left

PROMPT = "It was a bright cold day"
WAIT_SECONDS = 60
BeforeToken = Callable[[int, Callable[[], Any]], None]


def greedy(served: Served, max_tokens: int = 20, **options: Any) -> Any:
    return served.client.completions.create(
        model=served.name, prompt=PROMPT, max_tokens=max_tokens, temperature=0, **options
    )


def waiting_for(event: threading.Event) -> Callable[[], None]:
    def wait() -> None:
        assert event.wait(WAIT_SECONDS)

    return wait


def signalled(monkeypatch: pytest.MonkeyPatch, cls: type, method: str) -> threading.Event:
    """An event that is set after each call of the method."""
    done, original = threading.Event(), getattr(cls, method)

    def signalling(*args: Any) -> Any:
        result = original(*args)
        done.set()
        return result

    monkeypatch.setattr(cls, method, signalling)
    return done


def test_a_request_that_the_memory_budget_does_not_hold_is_refused_and_the_next_is_served(chat_model: Path) -> None:
    with serve(chat_model, "--max-model-len", "60", memory=("--memory-budget", "300MiB")) as served:
        expected = greedy(served).choices[0].text
        division = served.engine.division
        assert division is not None
        assert division.context_tokens == 60
        dear = replace(division.needs, kv_bytes_per_token=2**20)
        tight_bytes = division.budget_bytes - division.shared_bytes  # nothing is left over
        served.engine.division = replace(
            division, needs=dear, kv_bytes=dear.kv_bytes(4), budget_bytes=tight_bytes, slots=division.smallest_slots
        )
        with pytest.raises(openai.BadRequestError, match=r"tokens need .* shorten the request") as refused:
            greedy(served)
        assert refused.value.code == "context_length_exceeded"
        served.engine.division = division
        assert greedy(served).choices[0].text == expected


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_generation_and_the_next_is_served(
    chat_model: Path, plain: Plain, before_token: BeforeToken, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    threads, files = our_threads(), len(os.listdir("/proc/self/fd"))
    started, left = threading.Event(), signalled(monkeypatch, Job, "cancel")
    before_token(3, lambda: (started.set(), waiting_for(left)()))
    with serve(chat_model) as served:
        body = {"prompt": PROMPT, "max_tokens": 400, "temperature": 0, "stream": stream}
        _leave_after(httpx2.URL(f"{served.url}/v1/completions"), body, started)
        assert greedy(served).choices[0].text == plain.greedy(PROMPT, 20)
        assert served.metric("remoe_requests_total", endpoint="/v1/completions", status="499") == 1
        assert served.metric("remoe_model_tokens_total", phase="decode") == 3 + 19, (
            "broken off in its third decode call"
        )
        assert served.metric("remoe_generation_tokens_total") == 20
    assert not threads_left(threads)
    assert len(os.listdir("/proc/self/fd")) == files, "no file or connection is left"


def _leave_after(url: httpx2.URL, body: dict[str, Any], started: threading.Event) -> None:
    """Send a request and close the connection once it is being served."""
    content = json.dumps(body).encode()
    head = f"POST {url.path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall(head.encode() + content)
        assert started.wait(WAIT_SECONDS)


def test_a_client_that_leaves_the_queue_frees_its_place(
    chat_model: Path, plain: Plain, before_token: BeforeToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, opened = threading.Event(), threading.Event()
    before_token(2, lambda: (running.set(), waiting_for(opened)()))
    with serve(chat_model, "--max-queue", "1") as served, ThreadPoolExecutor() as pool:
        first = pool.submit(greedy, served)
        assert running.wait(WAIT_SECONDS)
        queued, left = signalled(monkeypatch, Worker, "submit"), signalled(monkeypatch, Job, "cancel")
        _leave_after(httpx2.URL(f"{served.url}/v1/completions"), {"prompt": "x"}, queued)
        assert left.wait(WAIT_SECONDS)
        queued.clear()
        third = pool.submit(greedy, served)
        assert queued.wait(WAIT_SECONDS), "the third found a place"
        opened.set()
        assert {first.result().choices[0].text, third.result().choices[0].text} == {plain.greedy(PROMPT, 20)}


def test_a_full_queue_says_come_again_and_is_none_to_the_others(
    chat_model: Path, plain: Plain, before_token: BeforeToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, opened = threading.Event(), threading.Event()
    before_token(2, lambda: (running.set(), waiting_for(opened)()))
    with serve(chat_model, "--max-queue", "1") as served, ThreadPoolExecutor() as pool:
        answers = [pool.submit(greedy, served)]
        assert running.wait(WAIT_SECONDS)
        queued = signalled(monkeypatch, Worker, "submit")
        answers.append(pool.submit(greedy, served))
        assert queued.wait(WAIT_SECONDS)
        assert served.metric("remoe_num_requests_running") == served.metric("remoe_num_requests_waiting") == 1
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError, match="the queue is full") as refused:
                greedy(served, stream=stream)
            assert int(refused.value.response.headers["retry-after"]) >= 1
            assert refused.value.code == "queue_full"
        opened.set()
        assert {answer.result().choices[0].text for answer in answers} == {plain.greedy(PROMPT, 20)}
        assert served.metric("remoe_requests_total", endpoint="/v1/completions", status="429") == 2


def failing_read(*_: Any) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_read_error_fails_this_request_and_the_next_has_the_right_tokens(
    chat_model: Path, plain: Plain, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(chat_model) as served:
        greedy(served)
        for stream in (False, True):
            with monkeypatch.context() as broken:
                broken.setattr(os, "preadv", failing_read)
                with pytest.raises(
                    openai.InternalServerError, match=r"the model cannot be read: .*Input/output"
                ) as failed:
                    greedy(served, stream=stream)
            assert (failed.value.code, failed.value.type) == ("read_error", "server_error")
            assert served.engine.cache.counts.total().accesses > 0
            assert greedy(served).choices[0].text == plain.greedy(PROMPT, 20)
        assert served.metric("remoe_requests_total", endpoint="/v1/completions", status="500") == 2


def test_a_read_error_in_the_middle_of_a_stream_is_its_last_event(
    chat_model: Path, plain: Plain, before_token: BeforeToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    with serve(chat_model, "--expert-cache", "5%") as served:
        with monkeypatch.context() as broken:
            before_token(4, lambda: broken.setattr(os, "preadv", failing_read))
            stream = greedy(served, stream=True)
            with pytest.raises(openai.APIError, match="the model cannot be read"):
                shown.extend(chunk.choices[0].text for chunk in stream)
        monkeypatch.undo()
        text = plain.greedy(PROMPT, 20)
        assert len(shown) >= 3
        assert text.startswith("".join(shown))
        assert greedy(served).choices[0].text == text
        assert served.metric("remoe_requests_total", endpoint="/v1/completions", status="500") == 1


@pytest.mark.parametrize("change", ["written", "cut"])
def test_a_shard_that_changes_ends_in_no_wrong_token_and_health_says_so(
    chat_model: Path, tmp_path: Path, change: str
) -> None:
    folder = shutil.copytree(chat_model, tmp_path / "model")
    (shard,) = folder.glob("*.safetensors")
    with serve(folder, "--expert-cache", "5%") as served:
        greedy(served)
        with shard.open("r+b") as file:
            if change == "cut":
                file.truncate(shard.stat().st_size // 2)
            else:
                file.seek(-64, os.SEEK_END)
                file.write(bytes(64))
        for _ in range(2):
            with pytest.raises(openai.InternalServerError, match=r"the model cannot be read: .*shard|.*was changed"):
                greedy(served)
        health = httpx2.get(f"{served.url}/health")
        assert health.status_code == 503
        assert f"{shard} was changed while in use; restart the server" in health.text


def test_an_unforeseen_error_is_not_told_to_the_client(
    chat_model: Path, plain: Plain, before_token: BeforeToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("secret details")

    with serve(chat_model) as served:
        before_token(2, fail)
        with pytest.raises(openai.InternalServerError, match="internal error; the server's log says more"):
            greedy(served)
        monkeypatch.undo()
        assert greedy(served).choices[0].text == plain.greedy(PROMPT, 20)


def test_requests_are_only_so_long(chat_model: Path, plain: Plain) -> None:
    with serve(chat_model, "--max-request-bytes", "2000") as served:
        with pytest.raises(openai.APIStatusError, match="longer than 2000 bytes, which --max-request-bytes") as refused:
            served.client.completions.create(model=served.name, prompt="x" * 500_000)
        assert (refused.value.status_code, refused.value.code) == (413, "request_too_large")
        chunks = iter([b'{"prompt": "', *[b"x" * 1000] * 50, b'"}'])  # without Content-Length
        kind = {"Content-Type": "application/json"}
        assert httpx2.post(f"{served.url}/v1/completions", content=chunks, headers=kind).status_code == 413
        assert greedy(served).choices[0].text == plain.greedy(PROMPT, 20)


def test_with_a_key_only_its_holders_are_served(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "open sesame")
    with serve(chat_model, "--api-key-env", "SOME_KEY") as served:
        with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
            greedy(served)
        assert httpx2.get(f"{served.url}/v1/models").status_code == 401
        assert httpx2.get(f"{served.url}/health").status_code == 200
        with served.client.with_options(api_key="open sesame") as known:
            assert known.completions.create(model=served.name, prompt="x", max_tokens=1).choices


def test_a_shorter_context_may_be_asked_for(chat_model: Path) -> None:
    with serve(chat_model, "--max-model-len", "20", "--served-model-name", "tiny") as served:
        assert [model.id for model in served.client.models.list()] == ["tiny"]
        answer = served.client.completions.create(model="tiny", prompt=[5] * 15, temperature=0)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 5, "what is left of the context"
        with pytest.raises(openai.BadRequestError, match="maximum context length is 20 tokens") as refused:
            served.client.completions.create(model="tiny", prompt=[5] * 15, max_tokens=6)
        assert refused.value.code == "context_length_exceeded"


def test_pages_of_allowed_origins_may_call(chat_model: Path) -> None:
    asking = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    with serve(chat_model, "--allowed-origins", "https://chat.example,https://other.example") as served:
        allowed = httpx2.options(f"{served.url}/v1/chat/completions", headers=asking)
        assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
        refused = httpx2.options(
            f"{served.url}/v1/chat/completions", headers={**asking, "Origin": "https://evil.example"}
        )
        assert "access-control-allow-origin" not in refused.headers
    with serve(chat_model) as served:
        assert "access-control-allow-origin" not in httpx2.get(f"{served.url}/health", headers=asking).headers


def test_a_template_that_wants_parts_is_given_parts(chat_model: Path, tmp_path: Path) -> None:
    """As those of models that read pictures too: plain text would be lost."""
    folder = Path(shutil.copytree(chat_model, tmp_path / "m"))
    template = (
        "{% for m in messages %}[{{ m['role'] }}]{% for part in m['content'] %}{% if part['type'] == 'text' %}"
        " {{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    )
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    with serve(folder) as served:
        answers = [
            served.client.chat.completions.create(
                model=served.name, messages=[{"role": "user", "content": content}], max_tokens=4, temperature=0
            )
            for content in ("The sea was", [{"type": "text", "text": "The sea was"}], "Another thing")
        ]  # fmt: skip
        tokens = [answer.usage.prompt_tokens if answer.usage else 0 for answer in answers]
        assert tokens[0] == tokens[1] > 4
        assert answers[0].choices[0].message == answers[1].choices[0].message


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ({"stop_strings": ["e"]}, None), ({"return_dict_in_generate": True, "output_scores": True}, "whole"),
        ({"do_sample": True, "num_return_sequences": 3, "cache_implementation": "static"}, "whole"),
    ],
)  # fmt: skip
def test_settings_beside_the_model_do_not_break_answers(
    written: dict[str, Any], text: str | None, chat_model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(chat_model, tmp_path / "m"))
    path = folder / "generation_config.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**known, **written}))
    whole = Plain(chat_model).greedy("The sea was", 8)
    with serve(folder) as served:
        answer = served.client.completions.create(model=served.name, prompt="The sea was", max_tokens=8, temperature=0)
        assert answer.choices[0].text == (whole if text else whole.split("e")[0])


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("", "cannot be used"),
        ("{", "cannot be used"),
        ('{"token_healing": true}', "token_healing=True is not supported; remove it"),
    ],
)
def test_settings_that_cannot_be_served_are_refused_at_loading(
    written: str, words: str, chat_model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(chat_model, tmp_path / "m"))
    (folder / "generation_config.json").write_text(written)
    with pytest.raises(UserError, match=words), serve(folder):
        pass
