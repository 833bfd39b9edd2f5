"""Lists of words and numbers on a command line: read leniently, refused with what to write."""

from types import SimpleNamespace

import pytest

from configs.checks import at_least, chosen, whole_numbers, words
from configs.load import UserError


def test_words_are_taken_once_and_without_blanks() -> None:
    assert words("a, b,,a,c ") == ["a", "b", "c"]
    assert words("") == []


def test_what_is_chosen_is_known_whatever_way_it_is_written() -> None:
    assert chosen("b,a", ("a", "b"), flag="--x") == ["b", "a"]
    assert chosen("0, 0.50", (0.0, 0.5, 1.0), flag="--x") == [0.0, 0.5]


@pytest.mark.parametrize("text", ["", "c", "a,c"])
def test_what_is_not_known_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=rf"--x '{text[-1:]}' is not known; write some of a,b"):
        chosen(text, ("a", "b"), flag="--x")
    with pytest.raises(UserError, match=r"--x '.*' is not known; write some of 0\.0,0\.5"):
        chosen(text, (0.0, 0.5), flag="--x")


def test_numbers_are_whole_and_taken_once() -> None:
    assert whole_numbers("3,0,3", flag="--x", example="1") == [3, 0]
    with pytest.raises(UserError, match=r"--x '4;6' is no list of numbers; write for example 4,6"):
        whole_numbers("4;6", flag="--x", example="4,6")


def test_a_number_below_its_least_is_refused_by_its_flag() -> None:
    class Options:
        some_steps, other = 0, None

    at_least(Options(), other=1)
    with pytest.raises(UserError, match="--some-steps is 0; write at least 1"):
        at_least(Options(), some_steps=1)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_a_number_that_is_too_small_or_no_finite_number_is_refused(value: float) -> None:
    with pytest.raises(UserError, match=rf"--prefetch is {value}; write at least 0"):
        at_least(SimpleNamespace(prefetch=value), prefetch=0)
    at_least(SimpleNamespace(prefetch=None), prefetch=0)
