"""A thousand malformed requests: each is refused in OpenAI's words or served, none breaks the server."""

import asyncio
import json
import shutil
import string
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from evaluation.engine.options import EngineOptions
from evaluation.server.app import create_app
from evaluation.server.application import ServerOptions, application
from evaluation.server.protocol import HARMLESS, NEUTRAL, ChatCompletionRequest, CompletionRequest
from tests.evaluation.server.conftest import TEMPLATE

REQUESTS = 1500
MALFORMED, SERVED = 1000, 50
"""At least so many of them."""
SOUND: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "ab", "max_tokens": 2, "seed": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 2, "seed": 1},
}
NAMES = sorted({*CompletionRequest.model_fields, *ChatCompletionRequest.model_fields, *HARMLESS, *NEUTRAL})

numbers = st.one_of(
    st.integers(-3, 40), st.integers(), st.floats(), st.sampled_from([2**63, -(2**64), 10**400, 1e-320, 1e308])
)
texts = st.one_of(st.text(max_size=12), st.sampled_from(["", "\ud800", "\x00", "user", "text", "a" * 3000]))
leaves = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(texts, st.sampled_from(["role", "content", "type", "text"])), inner, max_size=3),
    ),
    max_leaves=6,
)
names = st.one_of(st.sampled_from(NAMES), st.text(string.ascii_letters + "_\ud800é", max_size=6))


ids = st.lists(st.integers(0, 270), min_size=1, max_size=45)
NEAR: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.one_of(
        st.text(max_size=50), st.lists(st.text(max_size=5), max_size=3), ids, st.lists(ids, max_size=2)
    ),
    "messages": st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": texts}), max_size=2
    ),
    "max_tokens": st.integers(1, 42),
    "temperature": st.floats(0, 2.1),
    "top_p": st.floats(0, 1.1),
    "top_k": st.integers(0, 300),
    "seed": st.integers(),
    "n": st.integers(1, 17),
    "stop": st.one_of(st.text("ab", max_size=2), st.lists(st.text(max_size=1), max_size=5)),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "logprobs": st.one_of(st.integers(0, 21), st.booleans()),
    "top_logprobs": st.integers(0, 21),
}
"""Values on both sides of what is sound."""


@st.composite
def bodies(draw: st.DrawFn, path: str) -> bytes:
    """A sound body with other values, parts of a sound body, or no body of ours at all."""
    kind = draw(st.sampled_from(["near", "near", "changed", "changed", "changed", "other", "cut", "bytes"]))
    if kind == "other":
        return _json(draw(values))
    if kind == "bytes":
        return draw(st.binary(max_size=40))
    if kind == "near":
        chosen = draw(st.lists(st.sampled_from(sorted(NEAR)), max_size=3, unique=True))
        return _json({**SOUND[path], **{name: draw(NEAR[name]) for name in chosen}})
    body = _json({**SOUND[path], **draw(st.dictionaries(names, values, min_size=1, max_size=3))})
    if kind == "cut":
        start = draw(st.integers(0, len(body)))
        return body[:start] + draw(st.binary(max_size=3)) + body[start + draw(st.integers(0, 4)) :]
    return body


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    path = draw(st.sampled_from(sorted(SOUND)))
    kind = draw(
        st.sampled_from(["application/json"] * 8 + ["text/plain", "application/json; charset=utf-16", "\xff", ""])
    )
    return {
        "method": draw(st.sampled_from(["POST"] * 12 + ["GET", "PUT", "DELETE", "HEAD"])),
        "url": draw(st.sampled_from([path] * 12 + [path + "/", "/v1", "/v1/models/%00", "//"])),
        "content": draw(bodies(path)),
        "headers": {"Content-Type": kind.encode("latin-1")},
    }


def _json(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a character can only be escaped
        return json.dumps(value).encode()


def check(response: httpx2.Response) -> str:
    """An answer or an OpenAI error; says which."""
    if response.status_code == 200:
        if response.headers["content-type"].startswith("text/event-stream"):
            *events, end = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
            assert end == "[DONE]"
            assert all("choices" in json.loads(event) for event in events)
        elif response.request.method == "POST":
            assert response.json()["choices"]
        return "served"
    assert 400 <= response.status_code < 500, response.text
    if response.request.method != "HEAD":
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert error["type"] == "invalid_request_error"
    return "refused"


@pytest.mark.slow
def test_malformed_requests_are_refused_and_the_server_answers_as_before(
    model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_dir("olmoe"), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    options = ServerOptions(max_model_len=40, max_request_bytes=3000)
    outcomes: Counter[str] = Counter()
    with asyncio.Runner() as runner, application(str(folder), EngineOptions("50%"), options, name="m") as loaded:
        client = httpx2.AsyncClient(transport=httpx2.ASGITransport(create_app(loaded)), base_url="http://test")

        def ask(**request: Any) -> httpx2.Response:
            return runner.run(client.request(**request))

        sound = [{"method": "POST", "url": path, "json": {**body, "temperature": 0}} for path, body in SOUND.items()]
        before = [ask(**request).json()["choices"] for request in sound]

        @settings(
            max_examples=REQUESTS,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(requests())
        def fuzz(request: dict[str, Any]) -> None:
            outcomes[check(ask(**request))] += 1

        fuzz()
        assert [ask(**request).json()["choices"] for request in sound] == before
        assert ask(method="GET", url="/health").json() == {"status": "ok"}
        runner.run(client.aclose())
    assert outcomes["refused"] >= MALFORMED, outcomes
    assert outcomes["served"] >= SERVED, outcomes
