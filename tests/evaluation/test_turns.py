"""Turns and paired ratios: orders, hand-worked medians, and an interval that holds what it promises."""

import random

import pytest

from evaluation.turns import Extent, PairedRatio, extent, in_turn, paired_ratio


def test_every_second_turn_goes_backwards() -> None:
    assert [list(in_turn("abc", turn)) for turn in range(4)] == [[*"abc"], [*"cba"], [*"abc"], [*"cba"]]


def test_an_extent_is_the_median_and_the_extremes_of_what_was_measured() -> None:
    assert extent([4.0, None, 1.0, 2.0]) == Extent(2.0, 1.0, 4.0, 3)
    assert extent([None]) is None


def test_ratios_are_taken_within_pairs_and_unmeasured_pairs_are_left_out() -> None:
    found = paired_ratio([2.0, 30.0, None, 8.0, 5.0], to=[1.0, 10.0, 1.0, 2.0, 0.0])
    assert found == PairedRatio(3.0, None, None, 3)
    assert paired_ratio([None], to=[1.0]) is None
    with pytest.raises(ValueError, match="zip"):
        paired_ratio([1.0, 2.0], to=[1.0])


@pytest.mark.parametrize(
    ("n", "interval"),
    [(5, None), (6, (1, 6)), (8, (1, 8)), (9, (2, 8)), (16, (4, 13)), (20, (6, 15))],  # tables of the sign test
)
def test_the_interval_of_the_median_is_that_of_the_sign_test(n: int, interval: tuple[int, int] | None) -> None:
    found = paired_ratio([float(value) for value in range(n, 0, -1)], to=[1.0] * n)
    assert found is not None
    assert (found.low, found.high) == (interval or (None, None))


def test_a_difference_shows_only_where_the_interval_excludes_it() -> None:
    def shows(*ratios: float) -> bool:
        found = paired_ratio(ratios, to=[1.0] * len(ratios))
        assert found is not None
        return found.shows

    assert shows(0.8, 0.85, 0.9, 0.95, 0.7, 0.99)
    assert shows(1.8, 1.85, 1.9, 1.95, 1.7, 1.01)
    assert not shows(0.8, 0.85, 0.9, 0.95, 0.7, 1.0)
    assert not shows(0.1, 0.1, 0.1, 0.1, 0.1), "five pairs are too few for an interval"


def test_where_there_is_no_difference_one_shows_in_less_than_one_of_twenty_even_with_wild_outliers() -> None:
    draw = random.Random(0)

    def measured() -> list[float]:
        return [draw.lognormvariate(0, 0.1) * (5 if draw.random() < 0.1 else 1) for _ in range(16)]

    claims = [paired_ratio(measured(), to=measured()) for _ in range(2000)]
    assert sum(claim is not None and claim.shows for claim in claims) / 2000 < 0.05
