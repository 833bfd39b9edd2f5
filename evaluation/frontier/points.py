"""What a point of a frontier costs and saves beside the untouched model.

Letters: R texts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from evaluation.frontier.result import Interval, Measure
from evaluation.frontier.steps import Steps

RESAMPLES = 2000
CONFIDENCE = 0.95
Numbers = npt.NDArray[Any]


@dataclass(frozen=True)
class Found:
    """What was measured of a combination: for each seed, what was found of every text."""

    seeds: list[Steps]

    def sums(self, name: str) -> Numbers:
        """[R]: of each text the mean over seeds."""
        return np.mean([getattr(steps, name) for steps in self.seeds], axis=0)


def compare(here: Found, base: Found, shape: tuple[int, ...], *, expert_bytes: int | None) -> Measure:
    """Beside the untouched model with LRU.

    Args:
        shape: of the texts.
        expert_bytes: of an expert as it is stored; None where that is not known.
    """
    texts, predicted = shape[0], shape[1] - 1
    tokens = texts * predicted
    losses, loads = ((here.sums(name), base.sums(name)) for name in ("losses_R", "loads_R"))
    return Measure(
        cost=with_interval(lambda picks: relative_cost(*losses, picks, predicted), texts),
        fewer=with_interval(lambda picks: share_saved(*loads, picks), texts),
        loads_per_token=float(loads[0].sum()) / tokens,
        bytes_per_token=None if expert_bytes is None else float(loads[0].sum()) / tokens * expert_bytes,
        swapped_per_token=float(np.mean([steps.swapped for steps in here.seeds])) / tokens,
        lost_weight_per_token=float(np.mean([steps.lost_weight for steps in here.seeds])) / tokens,
        costs_of_seeds=[
            float(relative_cost(steps.losses_R, losses[1], np.arange(texts), predicted)) for steps in here.seeds
        ],
        fewer_of_seeds=[float(share_saved(steps.loads_R, loads[1], np.arange(texts))) for steps in here.seeds],
    )


def relative_cost(losses_R: Numbers, base_R: Numbers, picks: Numbers, tokens: int) -> Numbers:
    """Of some texts the relative change of perplexity, from losses that are sums over so many tokens of each."""
    return np.asarray(np.expm1((losses_R - base_R)[picks].mean(-1) / tokens))


def share_saved(loads_R: Numbers, base_R: Numbers, picks: Numbers) -> Numbers:
    """Of some texts the share of loads that there are fewer."""
    return np.asarray(1 - loads_R[picks].sum(-1) / base_R[picks].sum(-1))


def with_interval(of: Callable[[Numbers], Numbers], texts: int) -> Interval:
    """A number of all texts, and its bootstrap over texts; the draws are the same for all."""
    draw = np.random.default_rng(0).integers(0, texts, size=(RESAMPLES, texts))
    low, high = np.quantile(of(draw), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(of(np.arange(texts))), float(low), float(high))
