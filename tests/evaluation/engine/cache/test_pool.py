"""The cache and its policies against a slow, plain simulation that shares no code with them."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.engine.cache.counts import DECODE
from evaluation.engine.cache.policies import ONLINE, Decayed
from evaluation.engine.cache.pool import ExpertCache, Pool, event_order
from tests.evaluation.engine.cache.made_traces import POLICY_NAMES, PROFILE, Events, events_of, policy_for


def simulate(name: str, events: Events, slots: int) -> list[list[int]]:
    """Misses of every event, in event order, through the cache under test."""
    pool = Pool(slots, policy_for(name, events))
    misses = []
    for event in events:
        missing = set(pool.serve([(0, expert) for expert in event]).misses)
        misses.append([expert for expert in event if (0, expert) in missing])
    return misses


def plain(name: str, events: Events, slots: int) -> list[list[int]]:
    """The rules of the README, written down without any thought of speed."""
    resident: dict[int, int] = {}  # expert -> when it came in
    uses: dict[int, list[int]] = {}  # expert -> times of its uses since it came in
    calls: dict[int, list[int]] = {}  # of all its uses, as numbers of events
    clock = itertools.count()
    all_misses: list[list[int]] = []
    for number, event in enumerate(events):
        all_misses.append([expert for expert in event if expert not in resident])
        for expert in event:
            time = next(clock)
            if expert not in resident:
                resident[expert], uses[expert] = time, []
            uses[expert].append(time)
            calls.setdefault(expert, []).append(number)
        pinned = event if len(event) <= slots else []
        while len(resident) > slots:
            candidates = [expert for expert in resident if expert not in pinned]
            rank = {e: plain_rank(name, e, uses[e], [number - n for n in calls[e]]) for e in candidates}
            if name == "belady":
                rank = {e: (-next_use(e, events[number + 1 :]),) for e in candidates}
            victim = min(candidates, key=rank.__getitem__)
            del resident[victim], uses[victim]
    return all_misses


def plain_rank(name: str, expert: int, uses: list[int], ages: list[int]) -> tuple[float, ...]:
    """The lowest leaves; `uses` are times, `ages` how many events ago."""
    return {
        "lru": (uses[-1],),
        "fifo": (uses[0],),
        "lfu": (len(uses), uses[-1]),
        "lfru": (len(uses) / (ages[-1] + 1), uses[-1]),
        "decayed": (sum(2 ** (-age / Decayed.HALF_LIFE) for age in ages), uses[-1]),
        "static": (PROFILE.get((0, expert), 0), uses[-1]),
        "belady": (),
    }[name]


def next_use(expert: int, future: Events) -> int:
    return next((n for n, event in enumerate(future) if expert in event), 10**9)


def count(misses: Sequence[Sequence[int]]) -> int:
    return sum(len(event) for event in misses)


@pytest.mark.parametrize("name", POLICY_NAMES)
@given(events=events_of(7, 3), slots=st.integers(3, 7))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_misses_are_those_of_the_plain_simulation(name: str, events: Events, slots: int) -> None:
    found, expected = simulate(name, events, slots), plain(name, events, slots)
    if name == "belady":  # experts that are not needed again may leave in any order
        assert count(found) == count(expected)
    else:
        assert found == expected


@pytest.mark.parametrize("name", POLICY_NAMES)
@given(events=events_of(9, 9), slots=st.integers(2, 5))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_events_larger_than_the_pool_are_seen_whole_before_anything_leaves(
    name: str, events: Events, slots: int
) -> None:
    found, expected = simulate(name, events, slots), plain(name, events, slots)
    if name == "belady":
        assert count(found) == count(expected)
    else:
        assert found == expected


@given(events=events_of(8, 5), slots=st.integers(3, 8))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_belady_is_never_above_a_policy(events: Events, slots: int) -> None:
    optimum = count(simulate("belady", events, slots))
    assert all(optimum <= count(simulate(name, events, slots)) for name in POLICY_NAMES)


@given(events=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=2, unique=True), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_belady_is_the_optimum_over_all_choices_of_victims(events: Events) -> None:
    slots = 3
    reachable: dict[frozenset[int], int] = {frozenset(): 0}
    for event in events:
        following: dict[frozenset[int], int] = {}
        for content, misses in reachable.items():
            everything, needed = content | set(event), misses + len(set(event) - content)
            for size in range(min(slots, len(everything)) + 1):
                for kept in itertools.combinations(sorted(everything), size):
                    if set(event) <= set(kept):
                        following[frozenset(kept)] = min(needed, following.get(frozenset(kept), needed))
        reachable = following
    assert count(simulate("belady", events, slots)) == min(reachable.values())


@pytest.mark.parametrize(("name", "largest", "smallest"), [("lru", 9, 1), ("belady", 3, 3)])
@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_more_slots_never_cost_misses(name: str, largest: int, smallest: int, data: st.DataObject) -> None:
    """LRU at any size; Belady where every event fits, since a pool that is too small for an event may let it pass by."""
    events = data.draw(events_of(9, largest))
    by_size = [count(simulate(name, events, slots)) for slots in range(smallest, 10)]
    assert by_size == sorted(by_size, reverse=True)


def test_lookups_are_against_the_cache_before_the_event() -> None:
    """One access at a time, 1 would push out 2 before 2 is looked up, and 2 would miss."""
    assert simulate("lru", [[2, 3], [1, 2]], 2) == [[2, 3], [1]]


def test_victims_come_from_outside_the_event() -> None:
    """1 came in first and is the oldest of all, but it is in use."""
    assert simulate("fifo", [[1, 2], [3], [1, 4], [1]], 3) == [[1, 2], [3], [4], []]


def test_the_heavier_expert_is_the_more_recent() -> None:
    """Event order is lighter first: of 1 and 2, both used last in the first event, 1 leaves."""
    assert simulate("lru", [[1, 2], [3], [2]], 2) == [[1, 2], [3], []]


def test_lfu_forgets_the_uses_of_what_left() -> None:
    assert simulate("lfu", [[1], [1], [2], [3], [2], [3], [1]], 2) == [[1], [], [2], [3], [2], [3], []]


def test_after_a_large_event_the_last_of_it_remain() -> None:
    pool = Pool(3, ONLINE["lru"]())
    service = pool.serve([(0, expert) for expert in range(8)])
    assert service.passing == [(0, expert) for expert in range(5)]
    assert pool.resident == set(service.coming) == {(0, 5), (0, 6), (0, 7)}
    service = pool.serve([(0, expert) for expert in (5, 6, 1, 2, 7)])
    assert (set(service.leaving), set(service.staying)) == ({(0, 5), (0, 6)}, {(0, 7)})
    assert (set(service.coming), service.passing) == ({(0, 1), (0, 2)}, [])


def test_event_order_is_by_token_then_by_weight_and_the_last_occurrence_counts() -> None:
    assert event_order(np.array([[4, 2, 9]])) == [9, 2, 4]
    assert event_order(np.array([[4, 2], [7, 4], [1, 2]])) == [4, 7, 2, 1]


def test_scopes_share_or_separate_the_slots() -> None:
    shared = ExpertCache(2, 2, scope="global", make_policy=ONLINE["lru"])
    split = ExpertCache(2, 2, scope="per_layer", make_policy=ONLINE["lru"])
    for cache in (shared, split):
        for _ in range(2):
            for layer in range(2):
                cache.serve(layer, [(layer, 0), (layer, 1)], phase=DECODE)
    assert (shared.total_slots, split.total_slots) == (2, 4)
    assert (shared.counts.total().misses, split.counts.total().misses) == (8, 4)
    assert (shared.counts.total().first_touches, split.counts.total().first_touches) == (4, 4)
    assert split.resident() == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_reset_empties_the_cache_and_keeps_the_counters() -> None:
    cache = ExpertCache(2, 1, scope="global", make_policy=ONLINE["lru"])
    cache.serve(0, [(0, 0)], phase=DECODE)
    cache.reset()
    assert not cache.resident()
    cache.serve(0, [(0, 0)], phase=DECODE)
    total = cache.counts.total()
    assert (total.accesses, total.misses, total.first_touches) == (2, 2, 2)


def test_unknown_scope_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="scope 'both'"):
        ExpertCache(2, 1, scope="both", make_policy=ONLINE["lru"])


@pytest.mark.parametrize("scope", ["global", "per_layer"])
@pytest.mark.parametrize("policy", sorted(ONLINE))
def test_what_is_held_is_kept_up_to_date(policy: str, scope: str) -> None:
    """Through misses, events larger than the cache, smaller and larger caches, and cold starts."""
    draw, layers, experts = np.random.default_rng(0), 3, 9
    cache = ExpertCache(5, layers, scope=scope, make_policy=ONLINE[policy])
    for step in range(300):
        layer = int(draw.integers(layers))
        event = draw.permutation(experts)[: int(draw.integers(1, 8))]
        cache.serve(layer, [(layer, int(expert)) for expert in event], phase=DECODE)
        if step % 50 == 20:
            cache.resize(3)
        if step % 50 == 40:
            cache.resize(5)
        if step % 100 == 99:
            cache.reset()
        for asked in draw.permutation(layers)[: int(draw.integers(1, layers + 1))].tolist():
            expected = [(asked, expert) in cache.resident() for expert in range(experts)]
            assert cache.holds(asked, experts).tolist() == expected
