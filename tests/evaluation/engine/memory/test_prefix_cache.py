"""The prefix cache against a slow, plain model of what it must hold; distances; room that is not granted."""

from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.engine.memory.prefix_cache import Block, PrefixCache, block_names

BLOCK_BYTES = 2 * 4 * 4
"""Keys and values of one layer, [1, 1, 2, 2] in float32."""
prompts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=25)


def block(number: int) -> Block:
    return [(torch.full((1, 1, 2, 2), float(number)), torch.full((1, 1, 2, 2), -float(number)))]


def use(cache: PrefixCache, token_ids: Sequence[int]) -> int:
    """Use a prompt whose blocks hold their end; returns how many of its blocks were found."""
    names = block_names(token_ids, 2)
    found = cache.find(names)
    assert [int(keys[0, 0, 0, 0]) for [(keys, _)] in found] == [2 * i + 2 for i in range(len(found))]
    cache.use(names, lambda index: block(2 * index + 2))
    return len(found)


def test_names_stand_for_everything_before_them() -> None:
    one, other = block_names([1, 2, 3, 4, 5], 2), block_names([1, 2, 9, 4, 5, 6], 2)
    assert (len(one), len(other)) == (2, 3)
    assert one[0] == other[0]
    assert one[1] != other[1]
    assert len({*block_names([1, 2, 1, 2], 2)}) == 2, "the same tokens in another place are another block"


@given(prompts=prompts, capacity=st.integers(0, 8))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_beginnings_that_were_used_last_are_held(prompts: list[list[int]], capacity: int) -> None:
    cache = PrefixCache(capacity * BLOCK_BYTES + BLOCK_BYTES // 2)
    recent: list[tuple[int, ...]] = []  # beginnings, most recent first
    for token_ids in prompts:
        beginnings = [tuple(token_ids[: 2 * i + 2]) for i in range(len(token_ids) // 2)]
        held = set(recent[:capacity])
        expected = next((i for i, one in enumerate(beginnings) if one not in held), len(beginnings))
        distances = [recent.index(one) + 1 if one in recent else 0 for one in beginnings]
        assert cache.distances(block_names(token_ids, 2)) == distances
        assert use(cache, token_ids) == expected == sum(0 < d <= capacity for d in distances)
        recent = [*beginnings, *(one for one in recent if one not in beginnings)]
        assert cache.held_bytes == min(capacity, len(recent)) * BLOCK_BYTES


def test_a_smaller_cache_holds_less_and_a_larger_one_fills_up_again() -> None:
    cache = PrefixCache(4 * BLOCK_BYTES)
    assert [use(cache, [1] * 8), use(cache, [1] * 8)] == [0, 4]
    cache.shrink(2 * BLOCK_BYTES)
    assert cache.held_bytes == 2 * BLOCK_BYTES
    assert [use(cache, [1] * 8), use(cache, [1] * 8)] == [2, 4], (
        "the end was given up first; the capacity was still there"
    )
    cache.resize(BLOCK_BYTES)
    assert [use(cache, [1] * 8), use(cache, [1] * 8)] == [1, 1]


def test_nothing_is_held_where_no_room_is_made() -> None:
    asked = []

    def make_room(held_bytes: int) -> bool:
        asked.append(held_bytes)
        return held_bytes <= 2 * BLOCK_BYTES

    cache = PrefixCache(100 * BLOCK_BYTES, make_room=make_room)
    assert [use(cache, [1] * 8), use(cache, [1] * 8)] == [0, 2]
    assert max(asked) == 3 * BLOCK_BYTES
    assert use(cache, [2] * 4) == 0
    assert [use(cache, [2] * 4), use(cache, [1] * 8)] == [2, 0], "what is older gives way"
