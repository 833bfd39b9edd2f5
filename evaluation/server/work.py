"""Jobs and events: they pass between the event loop, which talks HTTP, and the one thread that owns the model."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from evaluation.server.errors import ApiError


@dataclass(frozen=True)
class Work:
    """One request, as token ids; where a field is None, the model's generation_config.json or transformers decides."""

    prompts: list[list[int]]
    max_new_tokens: list[int]  # of each prompt
    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stops: tuple[str, ...] = ()
    top_logprobs: int | None = None  # alternatives beside each token's own; None: no log probabilities at all
    echo: bool = False  # whether choices begin with their prompt

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its log probability, in the model's distribution before temperature, top_k and top_p."""

    token: str
    logprob: float | None  # None of a prompt's first token, which nothing comes before
    top: list[tuple[str, float]]
    text_offset: int  # characters of its choice before it


@dataclass(frozen=True)
class Delta:
    """The part of one choice that became certain."""

    index: int
    text: str
    logprobs: list[TokenLogprob]
    finish_reason: str | None


@dataclass(frozen=True)
class Done:
    """The last event of a request that was served."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt; they were not computed again
    remoe: dict[str, Any]  # what the engine did for it


Event = Delta | Done | ApiError
"""The last one of a request is `Done`, or the `ApiError` that says why it could not be served."""


class Cancelled(Exception):
    """Raised where a job ends because nobody waits for it any more."""


class Job:
    """One request's work, with where its events go and whether anybody still waits for them."""

    def __init__(self, work: Work, send: Callable[[Event], None]) -> None:
        self.work, self.send = work, send  # `send` is called from the worker's thread
        self.submitted_seconds = time.perf_counter()
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Ask for its end, wherever it is; this does nothing once it is over."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()
