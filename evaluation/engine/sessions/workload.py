"""What conversations cost at every division of memory between experts and kept keys and values: run once, replayed for all.

The run keeps nothing, so its routing trace holds every call that any division could need; of those, a division with room
for some number of blocks leaves out the calls whose blocks it would have found, and replays the rest with its slots.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configs.load import UserError
from evaluation.engine.cache.counts import PHASES, PREFILL
from evaluation.engine.cache.replay import replay
from evaluation.engine.cache.trace import RouteTrace
from evaluation.engine.engine import Engine
from evaluation.engine.memory.prefix_cache import PrefixCache
from evaluation.engine.sessions.conversations import Conversations
from evaluation.engine.stats import EngineStats

EXAMPLE = '{"prompt": "all that was said so far", "max_tokens": 32}'
SHARES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
"""Divisions that are tried: kept keys and values, in parts of what can be divided."""


@dataclass(frozen=True)
class ChatRequest:
    """One request of a workload, in order of arrival."""

    token_ids: list[int]
    max_new_tokens: int


@dataclass(frozen=True)
class Rates:
    """Measured seconds, by phase as in `PHASES`: what a division of memory costs in computing tokens and waiting for misses."""

    token_seconds: Sequence[float]  # of computing a token
    miss_seconds: Sequence[float]  # that computing waits for a miss

    def seconds(self, *, tokens: Sequence[Any], misses: Sequence[Any]) -> Any:
        """What it takes to compute these tokens and to wait for these misses, both by phase.

        Numbers give the seconds of one division; arrays, those of as many divisions as they are long.
        """
        phases = range(len(PHASES))
        return sum(self.token_seconds[p] * tokens[p] + self.miss_seconds[p] * misses[p] for p in phases)


@dataclass(frozen=True)
class Workload:
    """A run of all requests that kept nothing.

    Attributes:
        distances: of every request's blocks, see `PrefixCache.distances`.
        usable: of every request, blocks that need not be computed if they are held.
        rates: measured as it ran.
    """

    trace: RouteTrace
    distances: list[list[int]]
    usable: list[int]
    block_bytes: int
    rates: Rates


@dataclass(frozen=True)
class Split:
    """One division, and what the workload would take with it."""

    prefix_cache_bytes: int
    slots: int
    found_tokens: int
    computed_tokens: int  # of prompts
    misses: int
    expected_seconds: float


def read_requests(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[ChatRequest]:
    """Requests from JSON lines as `EXAMPLE`, every prompt with all that was said before it, or `UserError`."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"workload {path} does not exist; write one request per line, as {EXAMPLE}")
    requests = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            said = json.loads(line)
            prompt, max_tokens = said["prompt"], said["max_tokens"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: {error!r}; a line is {EXAMPLE}") from error
        if not isinstance(prompt, str) or not prompt or type(max_tokens) is not int or max_tokens < 1:
            raise UserError(f"{path}, line {number}: a prompt is text and max_tokens at least 1, as {EXAMPLE}")
        requests.append(ChatRequest(tokenizer(prompt)["input_ids"], max_tokens))
    if not requests:
        raise UserError(f"{path} is empty; write one request per line, as {EXAMPLE}")
    return requests


def serve_all(chat: Conversations, requests: Sequence[ChatRequest], *, progress: str | None = None) -> list[list[int]]:
    """The new tokens of every request, greedily."""
    answers = []
    for request in tqdm(requests, desc=progress, disable=progress is None, unit="request"):
        prompt_BT = torch.tensor([request.token_ids])
        output_BT = chat.generate(prompt_BT, max_new_tokens=request.max_new_tokens, do_sample=False, num_beams=1)
        answers.append(output_BT[0, len(request.token_ids) :].tolist())
    return answers


def run_once(model: PreTrainedModel, engine: Engine, requests: Sequence[ChatRequest], *, block_tokens: int) -> Workload:
    """Serve everything once, keeping nothing, recorded and timed; `UserError` if no prompt fills a block."""
    if all(len(request.token_ids) < block_tokens for request in requests):
        raise UserError(f"no prompt of the workload has {block_tokens} tokens: there is no block to keep")
    warm_up = Conversations(model, PrefixCache(0), block_tokens=block_tokens)
    serve_all(warm_up, [ChatRequest(requests[0].token_ids[:8], 2)])
    distances: list[list[int]] = []
    chat = Conversations(model, PrefixCache(0), block_tokens=block_tokens, watch=distances.append)
    engine.record_routing()
    engine.reset_stats()
    for request in tqdm(requests, desc="run once", unit="request"):
        engine.begin_request_in_trace()
        serve_all(chat, [request])
    assert chat.kept.block_bytes is not None, "some prompt filled a block"
    return Workload(
        trace=engine.trace(),
        distances=distances,
        usable=[(len(request.token_ids) - 1) // block_tokens for request in requests],
        block_bytes=chat.kept.block_bytes,
        rates=_rates(engine.stats()),
    )


def _rates(stats: EngineStats) -> Rates:
    computing = {name: stats.seconds[name] - stats.stall_seconds[name] for name in PHASES}
    return Rates(
        token_seconds=[computing[name] / max(1, stats.tokens[name]) for name in PHASES],
        miss_seconds=[stats.stall_seconds[name] / max(1, stats.misses_by_phase[name]) for name in PHASES],
    )


def splits(workload: Workload, engine: Engine, *, policy: str) -> list[Split]:
    """What the workload takes with every division in `SHARES`."""
    division = engine.division
    assert division is not None, "without a memory budget there is nothing to divide"
    counts = [int(share * division.shared_bytes) // workload.block_bytes for share in SHARES]
    divisions = [(blocks, division.slots_beside(blocks * workload.block_bytes)) for blocks in counts]
    return [
        _split(workload, blocks, slots=slots, policy=policy, scope=engine.cache.scope)
        for blocks, slots in tqdm(divisions, desc="replay", unit="division")
    ]


def _split(workload: Workload, blocks: int, *, slots: int, policy: str, scope: str) -> Split:
    found = [
        min(usable, sum(0 < distance <= blocks for distance in distances))
        for usable, distances in zip(workload.usable, workload.distances, strict=True)
    ]
    trace = workload.trace
    needed = trace.where(~_calls_found(trace, found))
    result = replay(needed.as_one_request(), policy=policy, cache_scope=scope, slots=slots)
    misses = (result.prefill.misses, result.decode.misses)
    tokens = [int((needed.phase == phase).sum()) for phase in range(len(PHASES))]
    return Split(
        prefix_cache_bytes=blocks * workload.block_bytes,
        slots=slots,
        found_tokens=int((trace.phase == PREFILL).sum()) - tokens[PREFILL],
        computed_tokens=tokens[PREFILL],
        misses=sum(misses),
        expected_seconds=workload.rates.seconds(tokens=tokens, misses=misses),
    )


def _calls_found(trace: RouteTrace, found: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Whether a token is in one of the first `found[i]` calls of the i-th request, by token."""
    requests, request_T = np.unique(trace.request_id, return_inverse=True)
    first_call = np.array([trace.call[request_T == i][0] for i in range(len(requests))])
    call_in_request_T = trace.call - first_call[request_T]
    return call_in_request_T < np.asarray(found)[request_T]
