"""One request through the model: transformers' own `generate`, watched token by token.

Greedy choices are the tokens of `model.generate(do_sample=False)`. Sampled ones are those of
`torch.manual_seed(seed); model.generate(do_sample=True, num_return_sequences=n, ...)`, prompt by prompt. With a prefix
cache, prompts of a single choice are computed in blocks (`prefill_chunk_size`), see `engine/sessions/conversations.py`.
Of threads it knows only that another one may cancel a job, which ends it between tokens or between layers.
"""

import itertools
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from evaluation.engine.cache.counts import PHASES
from evaluation.engine.engine import Engine
from evaluation.engine.pager import PagedLayer
from evaluation.engine.sessions.controller import MemoryController
from evaluation.engine.sessions.conversations import Conversations
from evaluation.engine.stats import EngineStats
from evaluation.server.choice import Choice, Detokenizer, token_logprob
from evaluation.server.metrics import Metrics
from evaluation.server.work import Cancelled, Delta, Done, Job, Work
from training.model.loading import plain_head

SCORED_TOGETHER = 64
"""Positions of a prompt whose logits are made at once: so many rows of a large vocabulary still fit a budget."""


@dataclass
class Generator:
    """The model with all it takes to serve jobs, one at a time, always from the same thread."""

    model: PreTrainedModel
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    metrics: Metrics
    chat: Conversations | None = None
    controller: MemoryController | None = None
    _job: Job | None = None

    def __post_init__(self) -> None:
        for module in self.model.modules():
            if isinstance(getattr(module, "paged", None), PagedLayer):
                module.register_forward_pre_hook(self._end_if_cancelled)

    def run(self, job: Job) -> Done:
        """Serve one job; returns its last event, which the caller sends.

        Raises `Cancelled` once nobody waits for it, and a `UserError` or `OSError` if an expert cannot be read.
        """
        self._job, before, clock = job, self.engine.stats(), _JobClock(job, self.metrics)
        found_before = self._found_tokens()
        self.metrics.queue_seconds.observe(time.perf_counter() - job.submitted_seconds)
        try:
            with torch.random.fork_rng():
                tokens = sum(self._answer(job, position, clock) for position in range(len(job.work.prompts)))
        finally:
            self._job = None
            if self.controller is not None:
                self.controller.request_done()  # also of a job that was broken off: it forgets what is old
        after = self.engine.stats()
        changes = {"changed_by": self.engine.options.changes, "swapped": after.swapped - before.swapped}
        remoe = {**_engine_figures(before, after), **clock.figures(), **({} if self.engine.is_exact else changes)}
        done = Done(job.work.prompt_tokens, tokens, self._found_tokens() - found_before, remoe)
        self.metrics.request_done(done, tpot_seconds=clock.tpot_seconds)
        return done

    def _answer(self, job: Job, position: int, clock: "_JobClock") -> int:
        """Generate all choices of one prompt; returns how many tokens they have."""
        work, limit = job.work, job.work.max_new_tokens[position]
        rows = range(position * work.n, (position + 1) * work.n)
        end_ids = self._end_ids()
        prompt = self._echo(job, position, rows) if work.echo else ""
        if limit == 0:
            return 0
        told: dict[str, Any] = {"work": work, "max_new_tokens": limit, "end_ids": end_ids, "begins": len(prompt)}
        choices, scores = [Choice(i, self.tokenizer, **told) for i in rows], _Scores()
        clock.last = None  # the time until a prompt's first token is no gap between tokens
        watcher = _Watcher(choices, scores, clock, job.send, self._end_if_cancelled)
        torch.manual_seed(secrets.randbits(63) if work.seed is None else work.seed)
        prompt_BT = torch.tensor([work.prompts[position]], device=self.model.device)
        options: dict[str, Any] = {"attention_mask": torch.ones_like(prompt_BT)}
        generate: Any = self.model.generate
        if self.chat is not None and work.n == 1:
            generate, options = self.chat.generate, {}
        options |= {"max_new_tokens": limit, "num_beams": 1, "stopping_criteria": StoppingCriteriaList([watcher])}
        looks = LogitsProcessorList([scores] if work.top_logprobs is not None else [])
        generate(prompt_BT, **options, logits_processor=looks, **self._sampling(work))
        return sum(choice.tokens for choice in choices)

    def _echo(self, job: Job, position: int, rows: range) -> str:
        """Send the prompt as the beginning of every choice, with its log probabilities if they are wanted; its text."""
        work, ids = job.work, job.work.prompts[position]
        detokenizer, text, items = Detokenizer(self.tokenizer), "", []
        scores = self._prompt_scores(ids) if work.top_logprobs is not None else itertools.repeat(None)
        for token_id, scores_V in zip(ids, itertools.chain([None], scores), strict=False):
            if work.top_logprobs is not None:
                items.append(
                    token_logprob(self.tokenizer, token_id, scores_V, work.top_logprobs, text_offset=len(text))
                )
            text += detokenizer.push(token_id)
        text += detokenizer.flush()
        over = "length" if work.max_new_tokens[position] == 0 else None
        for index in rows:
            job.send(Delta(index, text, items, over))
        return text

    @torch.no_grad()
    def _prompt_scores(self, ids: list[int]) -> Iterator[torch.Tensor]:
        """Logits [V] after each token of a prompt, made of the last hidden states some positions at a time."""
        ids_1T, head = torch.tensor([ids], device=self.model.device), self._head
        if head is None:
            yield from self.model(input_ids=ids_1T, use_cache=False).logits[0]
            return
        for hidden_TD in self.model.base_model(input_ids=ids_1T, use_cache=False)[0][0].split(SCORED_TOGETHER):
            yield from head(hidden_TD)

    @cached_property
    def _head(self) -> nn.Module | None:
        return plain_head(self.model)

    def _sampling(self, work: Work) -> dict[str, Any]:
        """The sampling options for `generate`, which takes what is left out from the model's generation_config."""
        default = self.model.generation_config.temperature
        temperature = (1.0 if default is None else default) if work.temperature is None else work.temperature
        if temperature == 0:
            return {"do_sample": False}
        said = {"temperature": float(temperature), "top_p": work.top_p, "top_k": work.top_k}
        given = {name: value for name, value in said.items() if value is not None}
        return {"do_sample": True, "num_return_sequences": work.n, **given}

    def _found_tokens(self) -> int:
        return self.chat.found_tokens if self.chat is not None else 0

    def _end_ids(self) -> frozenset[int]:
        ids: Any = self.model.generation_config.eos_token_id
        return frozenset([ids] if isinstance(ids, int) else ids or [])

    def _end_if_cancelled(self, *_: Any) -> None:
        if self._job is not None and self._job.is_cancelled:
            raise Cancelled


class _Scores(LogitsProcessor):
    """A look at the scores of the token that is chosen next, before temperature, top_k and top_p; it changes nothing."""

    def __init__(self) -> None:
        self.last_BV: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.last_BV = scores
        return scores


@dataclass
class _Watcher(StoppingCriteria):
    """The hook that `generate` calls after every step: gives the new tokens to their choices, says which are over."""

    choices: list[Choice]
    scores: _Scores
    clock: "_JobClock"
    send: Callable[[Delta], None]
    check: Callable[[], None]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.check()
        self.clock.step()
        for row, (choice, token_id) in enumerate(zip(self.choices, input_ids[:, -1].tolist(), strict=True)):
            if choice.finish_reason is not None:
                continue  # padding
            scores_V = None if self.scores.last_BV is None else self.scores.last_BV[row]
            if (delta := choice.push(token_id, scores_V)) is not None:
                self.send(delta)
        return torch.tensor([choice.finish_reason is not None for choice in self.choices], device=input_ids.device)


@dataclass
class _JobClock:
    """The times at which the steps of a job were done."""

    job: Job
    metrics: Metrics
    ttft_seconds: float | None = None
    gaps: list[float] = field(default_factory=list)  # seconds between steps of the same prompt
    last: float | None = None  # when the last step of this prompt was done

    def step(self) -> None:
        now = time.perf_counter()
        if self.ttft_seconds is None:
            self.ttft_seconds = now - self.job.submitted_seconds
            self.metrics.ttft_seconds.observe(self.ttft_seconds)
        if self.last is not None:
            self.gaps.append(now - self.last)
            self.metrics.itl_seconds.observe(self.gaps[-1])
        self.last = now

    @property
    def tpot_seconds(self) -> float | None:
        """Mean time of the tokens after the first; None without any."""
        return sum(self.gaps) / len(self.gaps) if self.gaps else None

    def figures(self) -> dict[str, float | None]:
        """Times in milliseconds, under vLLM's names."""
        seconds = {"ttft_ms": self.ttft_seconds, "tpot_ms": self.tpot_seconds}
        return {name: None if value is None else 1e3 * value for name, value in seconds.items()}


def _engine_figures(before: EngineStats, after: EngineStats) -> dict[str, Any]:
    """The difference between two readings of the counters; a rate of nothing is None."""

    def change(field: str) -> dict[str, Any]:
        return {name: getattr(after, field)[name] - getattr(before, field)[name] for name in PHASES}

    accesses, misses = change("accesses_by_phase"), change("misses_by_phase")
    return {
        "hit_rate": {name: 1 - misses[name] / accesses[name] if accesses[name] else None for name in PHASES},
        "accesses": sum(accesses.values()),
        "misses": sum(misses.values()),
        "bytes_read": after.bytes_read - before.bytes_read,
        "stall_seconds": change("stall_seconds"),
    }
