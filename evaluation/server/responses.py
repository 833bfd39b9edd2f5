"""Answers as OpenAI's API words them: whole bodies and the chunks of a stream, for completions and for chat."""

import json
import secrets
import time
from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any

from evaluation.server.choice import utf8
from evaluation.server.work import Delta, Done, TokenLogprob


class Completions:
    """The answer to `POST /v1/completions`."""

    whole_object = chunk_object = "text_completion"
    prefix = "cmpl"

    def __init__(self, served_name: str, *, wants_logprobs: bool) -> None:
        self._wants_logprobs = wants_logprobs
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": served_name}

    def whole(self, events: Sequence[Delta | Done]) -> dict[str, Any]:
        """The body of an answer that is not streamed, of all that came."""
        index = attrgetter("index")
        deltas = sorted((event for event in events if isinstance(event, Delta)), key=index)
        choices = [self._whole_choice(_joined(list(of_one))) for _, of_one in groupby(deltas, index)]
        (done,) = (event for event in events if isinstance(event, Done))
        return {**self._head, "object": self.whole_object, "choices": choices, **_account(done)}

    def first_chunks(self, choices: int) -> list[dict[str, Any]]:
        """The chunks that a stream begins with."""
        return []

    def chunk(self, delta: Delta, *, wants_usage: bool) -> dict[str, Any]:
        """One event of a stream; where usage comes at the end, the others say that theirs is null."""
        return {**self._chunk([self._chunk_choice(delta)]), **({"usage": None} if wants_usage else {})}

    def usage_chunk(self, done: Done) -> dict[str, Any]:
        """The event after the last choice has ended."""
        return {**self._chunk([]), **_account(done)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_object, "choices": choices}

    def _whole_choice(self, delta: Delta) -> dict[str, Any]:
        return _choice(delta, self._logprobs(delta.logprobs), text=delta.text)

    def _chunk_choice(self, delta: Delta) -> dict[str, Any]:
        return self._whole_choice(delta)

    def _logprobs(self, items: list[TokenLogprob]) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        return {
            "tokens": [item.token for item in items],
            "token_logprobs": [item.logprob for item in items],
            "top_logprobs": [
                None if item.logprob is None else dict([*item.top, (item.token, item.logprob)]) for item in items
            ],
            "text_offset": [item.text_offset for item in items],
        }


class ChatCompletions(Completions):
    """The answer to `POST /v1/chat/completions`."""

    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def first_chunks(self, choices: int) -> list[dict[str, Any]]:
        """The role of the speaker, for every choice."""
        role = {"role": "assistant", "content": ""}
        return [self._chunk([_choice(Delta(i, "", [], None), None, delta=role)]) for i in range(choices)]

    def _whole_choice(self, delta: Delta) -> dict[str, Any]:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return _choice(delta, self._logprobs(delta.logprobs), message=message)

    def _chunk_choice(self, delta: Delta) -> dict[str, Any]:
        content = {"content": delta.text} if delta.text else {}
        return _choice(delta, self._logprobs(delta.logprobs), delta=content)

    def _logprobs(self, items: list[TokenLogprob]) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        tops = [[_token(*other) for other in item.top] for item in items]
        own = [_token(item.token, item.logprob or 0.0) for item in items]
        return {"content": [{**o, "top_logprobs": t} for o, t in zip(own, tops, strict=True)], "refusal": None}


def sse(data: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


SSE_END = "data: [DONE]\n\n"


def _choice(of: Delta, logprobs: dict[str, Any] | None, **said: Any) -> dict[str, Any]:
    return {"index": of.index, **said, "logprobs": logprobs, "finish_reason": of.finish_reason}


def _token(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": utf8(token)}


def _joined(deltas: list[Delta]) -> Delta:
    """Everything of one choice in one piece."""
    logprobs = [item for delta in deltas for item in delta.logprobs]
    return Delta(deltas[0].index, "".join(delta.text for delta in deltas), logprobs, deltas[-1].finish_reason)


def _account(done: Done) -> dict[str, Any]:
    """OpenAI's usage, and what the engine did under a name of our own."""
    usage = {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": done.cached_tokens},
    }
    return {"usage": usage, "remoe": done.remoe}
