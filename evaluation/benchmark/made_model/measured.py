"""The routing of a finished checkpoint, measured by the engine: reuse, load, and misses of an LRU cache."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from data.corpus import DOMAINS
from data.pieces import document_beginnings
from evaluation.engine.cache.counts import DECODE
from evaluation.engine.cache.curve import lru_curve
from evaluation.engine.cache.reuse import routing_summary
from evaluation.engine.cache.trace import RouteTrace
from evaluation.engine.greedy import decode
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions

CACHE = "30%"  # of the experts, while the checkpoint is measured
PROMPT_TOKENS = 256
MISS_SHARES = (0.125, 0.25, 0.5, 0.75)  # of a layer's experts, for which LRU misses are given


def measure(folder: Path, tokenizer: PreTrainedTokenizerBase, *, new_tokens: int) -> dict[str, Any]:
    """Routing on test text (teacher-forced) and while decoding greedily, by the engine, one prompt of each domain.

    `distinct_tokens` is how many of the greedy tokens differ, `distinct_tokens_in_text` how many do in as much real text.
    """
    rows = document_beginnings(tokenizer, "test", tokens=PROMPT_TOKENS, count=len(DOMAINS))
    generated: list[list[int]] = []
    with load(folder, EngineOptions(CACHE, record_trace=True, warn=False)) as (model, engine):
        for row in tqdm(rows, desc="measure", unit="prompt"):
            decoded = decode(model, engine, prompt_ids=row, max_new_tokens=1 + new_tokens)
            generated.append(decoded.token_ids[:new_tokens])
        trace = engine.trace()
    return {
        "split": "test",
        "teacher_forced": _routing(_of_phase(trace, decoded=False)),
        "greedy": _routing(_of_phase(trace, decoded=True)) if new_tokens > 1 else None,
        "distinct_tokens": _distinct(generated),
        "distinct_tokens_in_text": _distinct([row[:new_tokens] for row in rows]),
        "most_common_share": _most_common_share(generated) if new_tokens else None,
    }


def _of_phase(trace: RouteTrace, *, decoded: bool) -> RouteTrace:
    """The tokens of one phase, each as a call of its own."""
    kept_T = (trace.phase == DECODE) == decoded
    tokens = kept_T.sum()
    return replace(trace.where(kept_T), phase=np.full(tokens, DECODE), call=np.arange(tokens))


def _routing(trace: RouteTrace) -> dict[str, Any]:
    """EOR, load, and the misses of an LRU cache that holds a share of a layer's experts, cold for every prompt."""
    curve = lru_curve(trace, cache_scope="per_layer")
    misses, accesses = curve.misses.sum((0, 1)), int(curve.accesses.sum())
    slots = {share: round(share * trace.num_experts) for share in MISS_SHARES}
    return {
        **routing_summary(trace),
        "lru_miss_rate": {str(share): int(misses[count]) / accesses for share, count in slots.items()},
    }


def _distinct(rows: Sequence[Sequence[int]]) -> float:
    return float(np.mean([len(set(row)) for row in rows]))


def _most_common_share(rows: Sequence[Sequence[int]]) -> float:
    return float(np.mean([Counter(row).most_common(1)[0][1] / len(row) for row in rows]))
