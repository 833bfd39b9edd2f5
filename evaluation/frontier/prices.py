"""What a chosen combination costs beside perplexity on given text: in text that it writes itself, and in tasks.

Letters: R texts, N tokens written of each.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from evaluation.frontier.generation import Written
from evaluation.frontier.points import Numbers, relative_cost, with_interval
from evaluation.frontier.result import Combination, Interval, Price, WritingPrice
from evaluation.quality.differences import differences, summarize
from evaluation.quality.scores import Scores, TaskScores


def price_of(
    at: Combination, written: Sequence[Written], scores: Sequence[Scores], base_written: Sequence[Written],
    base_scores: Sequence[Scores], *, new: int,
) -> Price:  # fmt: skip
    """Beside the untouched model; seeds are averaged text by text and item by item."""
    return Price(
        at=at,
        written=_of_writing(written, base_written[0], new) if written else None,
        quality=summarize(_averaged(scores)) if scores else None,
        tasks=differences(base_scores[0], _averaged(scores)) if scores else None,
    )


def _of_writing(seeds: Sequence[Written], base: Written, new: int) -> WritingPrice:
    losses_R, kl_R, kl_given_R = (
        np.mean([getattr(seed, name) for seed in seeds], axis=0) for name in ("losses_R", "kl_R", "kl_given_R")
    )
    same_R = np.mean([_same_until(seed.ids_RN, base.ids_RN) for seed in seeds], axis=0)
    texts = len(losses_R)

    def mean(values_R: Numbers) -> Interval:
        return with_interval(lambda picks: np.asarray(values_R[picks].mean(-1)), texts)

    return WritingPrice(
        cost=with_interval(lambda picks: relative_cost(losses_R, base.losses_R, picks, new), texts),
        kl=mean(kl_R / new),
        kl_given=mean(kl_given_R / new),
        ratio=with_interval(lambda picks: np.asarray(kl_R[picks].sum(-1) / kl_given_R[picks].sum(-1)), texts)
        if (kl_given_R > 1e-3).all()
        else None,
        same=mean(same_R),
    )


def _same_until(ids_RN: Numbers, others_RN: Numbers) -> Numbers:
    """[R]: how many tokens two have in common before the first that differs."""
    return np.asarray(np.cumprod(ids_RN == others_RN, axis=1).sum(1), dtype=float)


def _averaged(seeds: Sequence[Scores]) -> Scores:
    """Every item's mean over seeds; what is no mean over items is that of the first seed."""
    averaged: Scores = {}
    for name, first in seeds[0].items():
        of_seeds = [seed[name] for seed in seeds]
        is_mean = all(not isinstance(one, TaskScores) or one.value is None for one in of_seeds)
        averaged[name] = replace(first, values=np.mean([one.values for one in of_seeds], axis=0)) if is_mean else first
    return averaged
