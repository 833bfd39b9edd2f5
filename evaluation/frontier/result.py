"""What `frontier.json` holds, as models that are checked when they are built and when a file is read."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from configs.load import UserError
from evaluation.results import Difference, Quality, Reproduction, naming_the_place

FORMAT_VERSION = 1
NO_LEVER, UNTOUCHED = "none", "untouched"
FRONTIER = Path("frontier/frontier.json")
"""Beside the results of a run."""


class Interval(NamedTuple):
    """A number with its paired 95 % interval over texts."""

    value: float
    low: float
    high: float


class Part(BaseModel):
    """An object of `frontier.json`."""

    model_config = ConfigDict(allow_inf_nan=False)


class Measure(Part):
    """What was found of a point on one set of texts.

    Attributes:
        cost: relative change of perplexity against the untouched model without a lever.
        fewer: share of the expert loads that are saved, against the untouched model with LRU and as many slots.
        loads_per_token: experts that were read, over all layers.
        bytes_per_token: the same in bytes, as the checkpoint stores them; None where that is not known.
        swapped_per_token: experts that levers replaced or dropped.
        lost_weight_per_token: mixing weight that went with them.
        costs_of_seeds, fewer_of_seeds: of each seed alone.
    """

    cost: Interval
    fewer: Interval
    loads_per_token: float
    bytes_per_token: float | None
    swapped_per_token: float
    lost_weight_per_token: float
    costs_of_seeds: list[float]
    fewer_of_seeds: list[float]


class Combination(Part):
    """Routers, a lever, and a cache."""

    model_config = ConfigDict(frozen=True)

    arm: str
    lever: str
    slots: int
    policy: str


class Point(Combination):
    """One combination, measured on the texts that are chosen by and on those that are reported."""

    chosen_by: Measure
    reported: Measure

    @property
    def combination(self) -> Combination:
        """What was measured."""
        return Combination(arm=self.arm, lever=self.lever, slots=self.slots, policy=self.policy)


class Choice(Part):
    """The best of a kind of combination at one price; None where none is within it."""

    kind: str
    gate: float  # perplexity that may be lost at most, relative
    slots: int
    point: Point | None


class WritingPrice(Part):
    """What was found in freely generated text, with intervals over texts.

    Attributes:
        cost: relative change of the perplexity that the untouched model gives to what was written, against what it writes itself.
        kl: nats a token by which predictions are away from the untouched model's, in what was written.
        kl_given: the same, at the same places, in the texts' own words.
        ratio: by how much the first is larger; None where there is no distance.
        same: tokens until the first that the untouched model, with the same random numbers, did not write.
    """

    cost: Interval
    kl: Interval
    kl_given: Interval
    ratio: Interval | None
    same: Interval


class Price(Part):
    """Of one combination; tasks against the untouched model with LRU, paired over items."""

    at: Combination
    written: WritingPrice | None
    quality: Quality | None
    tasks: Difference | None


class FrontierResult(Part):
    """All of it; the points on the Pareto line are those that no other beats in both, on the texts to choose by."""

    format_version: int = FORMAT_VERSION
    model: str
    scope: str
    gates: list[float]
    points: list[Point]
    chosen: list[Choice]
    pareto: list[Combination]
    prices: list[Price]
    reproduce: Reproduction


def read_frontier(path: str | Path) -> FrontierResult:
    """A `frontier.json` as `remoe frontier` writes it; a `UserError` says what is wrong with it and where."""
    try:
        content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); write it with `remoe frontier`") from error
    except ValueError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); it may be cut off: write it with `remoe frontier`"
        ) from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format_version is {version!r}, {FORMAT_VERSION} is read; run `remoe frontier` again")
    with naming_the_place(str(path)):
        return FrontierResult.model_validate(content)
