"""Answers as OpenAI's API words them: whole bodies and the chunks of a stream, for completions and for chat."""

import json
import secrets
import time
from collections.abc import Sequence
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

    def whole(self, deltas: Sequence[Delta], done: Done) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        by_index: dict[int, list[Delta]] = {}
        for delta in deltas:
            by_index.setdefault(delta.index, []).append(delta)
        choices = [self._whole_choice(_joined(by_index[index])) for index in sorted(by_index)]
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
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": self._logprobs(delta.logprobs),
            "finish_reason": delta.finish_reason,
        }

    def _chunk_choice(self, delta: Delta) -> dict[str, Any]:
        return self._whole_choice(delta)

    def _logprobs(self, items: list[TokenLogprob]) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        return {
            "tokens": [item.token for item in items],
            "token_logprobs": [item.logprob for item in items],
            "top_logprobs": [dict([*item.top, (item.token, item.logprob)]) for item in items],
            "text_offset": [item.text_offset for item in items],
        }


class ChatCompletions(Completions):
    """The answer to `POST /v1/chat/completions`."""

    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def first_chunks(self, choices: int) -> list[dict[str, Any]]:
        """The role of the speaker, for every choice."""
        return [
            self._chunk([_chat_choice(i, {"role": "assistant", "content": ""}, None, None)]) for i in range(choices)
        ]

    def _whole_choice(self, delta: Delta) -> dict[str, Any]:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return _chat_choice(delta.index, message, self._logprobs(delta.logprobs), delta.finish_reason, key="message")

    def _chunk_choice(self, delta: Delta) -> dict[str, Any]:
        content = {"content": delta.text} if delta.text else {}
        return _chat_choice(delta.index, content, self._logprobs(delta.logprobs), delta.finish_reason)

    def _logprobs(self, items: list[TokenLogprob]) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        content = [
            {**_token(item.token, item.logprob), "top_logprobs": [_token(*other) for other in item.top]}
            for item in items
        ]
        return {"content": content, "refusal": None}


def sse(data: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


SSE_END = "data: [DONE]\n\n"


def _chat_choice(
    index: int, said: dict[str, Any], logprobs: dict[str, Any] | None, finish_reason: str | None, *, key: str = "delta"
) -> dict[str, Any]:
    return {"index": index, key: said, "logprobs": logprobs, "finish_reason": finish_reason}


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
