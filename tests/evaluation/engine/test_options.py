"""Options that no model could run with are refused before anything is loaded."""

from typing import Any

import pytest

from configs.load import UserError
from evaluation.engine.options import EngineOptions


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"expert_cache": None}, "give exactly one of expert_cache .* and memory_budget"),
        ({"memory_budget": "1GiB"}, "give exactly one of expert_cache .* and memory_budget"),
        ({"cache_policy": "belady"}, "unknown cache policy 'belady'; known: lru, fifo, lfu, lfru, decayed$"),
        ({"cache_policy": "static"}, "unknown cache policy 'static'"),
        ({"cache_scope": "both"}, "unknown cache scope 'both'; known: global, per_layer"),
        ({"reads_in_flight": 0}, "--reads-in-flight is 0; write at least 1"),
        ({"context_tokens": 0}, "--context-tokens is 0; write at least 1"),
        ({"prefetch": -1}, "--prefetch is -1; write at least 0"),
        ({"lever": "prior:delta=-0.1"}, r"lever prior: delta=-0\.1: .* greater than or equal to 0"),
        ({"lever": "drop:below=0.02", "record_trace": True}, "a lever that drops some leaves fewer"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        EngineOptions(**{"expert_cache": "100%", **options})
