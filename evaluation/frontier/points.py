"""Points of a frontier: what a point is, how each is measured, and what it costs and saves beside the untouched model.

Letters: P points' seeds, R texts.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configs.load import UserError
from data.groups import own_pieces
from data.pieces import spread_pieces
from evaluation.engine.levers.spec import levers_of
from evaluation.frontier.arguments import NO_LEVER, UNTOUCHED, FrontierArguments
from evaluation.frontier.steps import CacheKind, Steps, read_in_steps
from evaluation.quality.batches import Answers, identity_of
from training.model.loading import load_pretrained
from training.model.routers import copy_into_routers, most_chosen, router_parameters
from training.run_folder.router_delta import load_for

RESAMPLES = 2000
CONFIDENCE = 0.95
Texts = npt.NDArray[np.integer]


class Interval(NamedTuple):
    """A number with its paired 95 % interval over texts."""

    value: float
    low: float
    high: float


class Measure(BaseModel):
    """What was found of a point on one set of texts.

    Attributes:
        cost: relative change of perplexity against the untouched model without a lever.
        fewer: share of the expert loads that are saved, against the untouched model with LRU and as many slots.
        loads_per_token: experts that were read, over all layers.
        swapped_per_token: experts that levers replaced or dropped.
        lost_weight_per_token: mixing weight that went with them.
        costs_of_seeds, fewer_of_seeds: of each seed alone.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    cost: Interval
    fewer: Interval
    loads_per_token: float
    swapped_per_token: float
    lost_weight_per_token: float
    costs_of_seeds: list[float]
    fewer_of_seeds: list[float]


class Point(BaseModel):
    """One combination, measured on the texts that are chosen by and on those that are reported."""

    arm: str
    lever: str
    slots: int
    policy: str
    chosen_by: Measure
    reported: Measure


@dataclass(frozen=True)
class Found:
    """What was measured of a combination: for each seed, what was found of every text."""

    seeds: list[Steps]

    def sums(self, name: str) -> npt.NDArray[np.float64]:
        """[R]: of each text the mean over seeds."""
        return np.mean([getattr(steps, name) for steps in self.seeds], axis=0)


def texts_of(args: FrontierArguments, tokenizer: PreTrainedTokenizerBase) -> dict[str, Texts]:
    """[R, S]: the texts that are chosen by, and other ones that are reported.

    Raises:
        UserError: there are too few of that length.
    """
    tokens, count = args.max_length, args.texts_per_domain
    if not args.groups:
        apart: dict[str, Any] = {"tokens": tokens, "at_least": tokens, "every": tokens, "per_domain": count}
        splits = {"chosen_by": args.choose_split, "reported": args.report_split}
        return {
            name: np.stack(spread_pieces(tokenizer, split, args.domains, **apart)) for name, split in splits.items()
        }
    found: dict[str, list[Any]] = {"chosen_by": [], "reported": []}
    for name, pieces in own_pieces(tokenizer, args.groups, tokens=tokens, per_group=2 * count).items():
        whole = [piece for piece in pieces if len(piece) == tokens]
        if len(whole) < 4:
            raise UserError(f"group {name} has {len(whole)} pieces of {tokens} tokens, 4 are needed; lower max_length")
        found["chosen_by"] += whole[::2]
        found["reported"] += whole[1::2]
    return {name: np.stack(pieces) for name, pieces in found.items()}


def measure(
    args: FrontierArguments, model_dir: str, tokenizer: PreTrainedTokenizerBase, device: Any, *, kept: Path,
    found: Callable[[Point], None] = lambda _: None,
) -> list[Point]:  # fmt: skip
    """Measure every combination; `found` is told of each as it comes.

    Args:
        kept: a folder where what was measured is kept, so that a frontier that was killed goes on.

    Raises:
        UserError: see the parts; everything that can be known is found out before the first is measured.
    """
    texts = texts_of(args, tokenizer)
    routers: dict[str, list[Any]] = {UNTOUCHED: [{}]}
    for arm in args.arms:
        routers[arm] = [load_for(model_dir, folder) for folder in args.folders(arm)]
    model = load_pretrained(model_dir, dtype=args.dtype, device=device)
    if (smallest := most_chosen(model)) > min(args.slots):
        raise UserError(f"slots={min(args.slots)}: one token uses {smallest} experts of a layer; write at least that")
    measurement = _Measurement(args, model, model_dir, texts, kept)
    points, base = [], {}
    with tqdm(total=measurement.passes(routers), desc="frontier", unit="pass", leave=False) as bar:
        for arm, seeds in routers.items():
            for lever, slots, policy in itertools.product([NO_LEVER, *args.levers], args.slots, args.policies):
                if arm == UNTOUCHED and slots not in base:
                    base[slots] = measurement.of(UNTOUCHED, seeds, NO_LEVER, CacheKind(slots, "lru", args.scope), bar)
                here = measurement.of(arm, seeds, lever, CacheKind(slots, policy, args.scope), bar)
                compared = {name: compare(here[name], base[slots][name], texts[name].shape) for name in texts}
                points.append(Point(arm=arm, lever=lever, slots=slots, policy=policy, **compared))
                found(points[-1])
    return points


@dataclass
class _Measurement:
    """What is measured of every combination alike; a combination that was measured is not measured again."""

    args: FrontierArguments
    model: PreTrainedModel
    model_dir: str
    texts: dict[str, Texts]
    kept: Path

    def passes(self, routers: dict[str, list[Any]]) -> int:
        """How often all texts are read."""
        args = self.args
        per_seed = (1 + len(args.levers)) * len(args.slots) * len(args.policies)
        return 2 * (per_seed * sum(map(len, routers.values())) + len(args.slots))

    def of(self, arm: str, seeds: list[Any], lever: str, cache: CacheKind, bar: Any) -> dict[str, Found]:
        """One combination on both sets of texts."""
        found: dict[str, list[Steps]] = {name: [] for name in self.texts}
        for routers in seeds:
            with (
                _these_routers(self.model, routers),
                Answers(self.kept, identity_of(self.model, self.model_dir, None)) as answers,
            ):
                for name, texts_RS in self.texts.items():
                    asked = ["frontier", texts_RS.tolist(), lever, [cache.slots, cache.policy, cache.scope]]
                    read = partial(self._read, texts_RS, lever, cache)
                    (values,) = answers.of([asked], read, engine=None)
                    found[name].append(_from_json(values))
                    bar.update()
        return {name: Found(steps) for name, steps in found.items()}

    def _read(self, texts_RS: Texts, lever: str, cache: CacheKind, _: int) -> dict[str, Any]:
        steps = read_in_steps(self.model, texts_RS, () if lever == NO_LEVER else levers_of(lever), cache)
        return {name: part.tolist() if isinstance(part, np.ndarray) else part for name, part in steps._asdict().items()}


def _from_json(values: dict[str, Any]) -> Steps:
    arrays: dict[str, Any] = {name: np.array(part) if isinstance(part, list) else part for name, part in values.items()}
    return Steps(**arrays)


@contextmanager
def _these_routers(model: PreTrainedModel, routers: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the model has these routers if there are any; afterwards those that it had."""
    before = {name: weight.detach().clone() for name, weight in router_parameters(model).items()}
    copy_into_routers(model, routers or before)
    try:
        yield
    finally:
        copy_into_routers(model, before)


def compare(here: Found, base: Found, shape: tuple[int, ...]) -> Measure:
    """Beside the untouched model with LRU: intervals by a bootstrap over texts, the same ones for both."""
    texts, tokens = shape[0], shape[0] * (shape[1] - 1)
    draw = np.random.default_rng(0).integers(0, texts, size=(RESAMPLES, texts))
    predicted = shape[1] - 1

    def cost(losses_R: npt.NDArray[Any], picks: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        return np.expm1((losses_R - base.sums("losses_R"))[picks].mean(-1) / predicted)

    def fewer(loads_R: npt.NDArray[Any], picks: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        return 1 - loads_R[picks].sum(-1) / base.sums("loads_R")[picks].sum(-1)

    every = np.arange(texts)
    bounds = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    intervals = {}
    for name, of, values_R in (("cost", cost, here.sums("losses_R")), ("fewer", fewer, here.sums("loads_R"))):
        low, high = np.quantile(of(values_R, draw), bounds)
        intervals[name] = Interval(float(of(values_R, every)), float(low), float(high))
    return Measure(
        **intervals,
        loads_per_token=float(here.sums("loads_R").sum()) / tokens,
        swapped_per_token=float(np.mean([steps.swapped for steps in here.seeds])) / tokens,
        lost_weight_per_token=float(np.mean([steps.lost_weight for steps in here.seeds])) / tokens,
        costs_of_seeds=[float(cost(steps.losses_R, every)) for steps in here.seeds],
        fewer_of_seeds=[float(fewer(steps.loads_R, every)) for steps in here.seeds],
    )
