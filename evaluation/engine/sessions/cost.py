"""What a division of memory between experts and kept keys and values costs: computing tokens, and waiting for misses.

Where the misses come from is the caller's business: the plan replays a whole workload (`workload.py`), the controller reads
them off the LRU curve of the last requests (`controller.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.engine.cache.counts import PHASES


@dataclass(frozen=True)
class Rates:
    """Measured seconds, by phase as in `PHASES`."""

    token_seconds: Sequence[float]  # of computing a token
    miss_seconds: Sequence[float]  # that computing waits for a miss

    def seconds(self, *, tokens: Sequence[Any], misses: Sequence[Any]) -> Any:
        """What it takes to compute these tokens and to wait for these misses, both by phase.

        Numbers give the seconds of one division; arrays, those of as many divisions as they are long.
        """
        phases = range(len(PHASES))
        return sum(self.token_seconds[p] * tokens[p] + self.miss_seconds[p] * misses[p] for p in phases)
