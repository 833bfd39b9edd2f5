"""Greedy decoding of one prompt on a paged model, with everything measured; `generate` itself is transformers' own."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from configs.load import UserError
from evaluation.engine.engine import Engine
from evaluation.engine.stats import EngineStats, Timing

Listener = Callable[[list[int]], object]
"""What is told of new tokens."""


@dataclass(frozen=True)
class DecodeResult:
    """One request from a cold cache."""

    token_ids: list[int]  # the new ones
    timing: Timing
    stats: EngineStats  # of this request alone


def decode(
    model: PreTrainedModel, engine: Engine, *, prompt_ids: Sequence[int], max_new_tokens: int, tokenizer: Any = None
) -> DecodeResult:
    """Decode greedily, as `model.generate(do_sample=False)` does; ends early at the model's end-of-text token.

    With a tokenizer it ends at the model's own stop strings too. The cache is emptied and the counters are set to zero first.

    Raises:
        UserError: no prompt token, or no token to generate.
    """
    if not prompt_ids:
        raise UserError("the prompt has no tokens; write some text")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    engine.reset_cache()
    engine.reset_stats()
    token_seconds: list[float] = []
    start = time.perf_counter()

    def note(_: list[int]) -> None:
        token_seconds.append(time.perf_counter() - start)

    token_ids = greedy(model, prompt_ids, max_new_tokens=max_new_tokens, on_tokens=note, tokenizer=tokenizer)
    return DecodeResult(token_ids, Timing(token_seconds), engine.stats())


def greedy(
    model: PreTrainedModel, prompt_ids: Sequence[int], *, max_new_tokens: int, on_tokens: Listener | None = None,
    tokenizer: Any = None,
) -> list[int]:  # fmt: skip
    """The new tokens of any transformers model, paged or resident; `on_tokens` is told of each when it comes."""
    prompt_BT = torch.tensor([list(prompt_ids)], device=model.device)
    config: Any = copy.copy(model.generation_config)  # arguments beside it are deprecated (transformers 5.23)
    config.update(max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
    if tokenizer is None:
        config.stop_strings = None
    generate: Any = model.generate
    output_BT = generate(
        input_ids=prompt_BT,
        attention_mask=torch.ones_like(prompt_BT),
        streamer=on_tokens and _NewTokens(on_tokens),
        generation_config=config,
        tokenizer=tokenizer,
    )
    return output_BT[0, len(prompt_ids) :].tolist()


class _NewTokens(BaseStreamer):
    """Hands on what `generate` sends, but for the prompt, which comes first."""

    def __init__(self, on_tokens: Listener) -> None:
        self._on_tokens, self._prompt_seen = on_tokens, False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._on_tokens(value.flatten().tolist())
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing to do: every token was handed on."""
