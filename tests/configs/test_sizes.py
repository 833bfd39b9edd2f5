"""Sizes: what is understood, what is refused with what to write instead, and what is printed."""

import pytest

from configs.load import UserError
from configs.sizes import parse_size, readable, size_text


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("512KiB", 2**19),
        ("2MiB", 2**21),
        ("1.5 GiB", 3 * 2**29),
        ("3B", 3),
        ("25%", 8000),
    ],
)
def test_sizes_are_understood(text: int | str, size_bytes: int) -> None:
    assert parse_size(text, whole_bytes=32000) == size_bytes


@pytest.mark.parametrize("text", ["", "0", "0%", "2MB", "lots", "-5", "auto", "1e9", "%", -1])
def test_other_sizes_are_refused_with_what_to_write(text: int | str) -> None:
    with pytest.raises(UserError, match=r"is not understood; write bytes as 2097152, 512KiB, 2MiB or 8GiB, or .* 25%"):
        parse_size(text, whole_bytes=32000)


def test_a_share_is_refused_where_there_is_no_whole_and_the_flag_is_named() -> None:
    with pytest.raises(
        UserError, match=r"--size '25%' is not understood; write bytes as 2097152, 512KiB, 2MiB or 8GiB$"
    ):
        parse_size("25%", what="--size")


def test_more_than_everything_is_refused_as_a_share() -> None:
    with pytest.raises(UserError, match="more than there is; write at most 100%"):
        parse_size("101%", whole_bytes=32000)


def test_readable_sizes_are_never_too_small() -> None:
    for size_bytes in (1, 1023, 1024, 1_600_000, 2**21 + 1, 5 * 2**30 - 1):
        assert parse_size(readable(size_bytes)) >= size_bytes
    assert (readable(2**21), readable(1_600_000), readable(900)) == ("2MiB", "1.6MiB", "900B")


def test_sizes_in_text_have_three_digits() -> None:
    assert (size_text(13_800_000_000), size_text(2**21), size_text(0)) == ("12.9 GiB", "2 MiB", "0 B")
