"""What every policy has to do, whatever it prefers; and how replay makes them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.engine.cache.policies import ONLINE, Decayed, Key, Policy, Static
from evaluation.engine.cache.pool import Pool
from evaluation.engine.cache.replay import policy_maker
from tests.evaluation.engine.cache.made_traces import POLICY_NAMES, Events, events_of, fixed_trace, policy_for

every_policy = pytest.mark.parametrize("name", POLICY_NAMES)
many = settings(max_examples=60, deadline=None, derandomize=True)


def keys(event: list[int]) -> list[tuple[int, int]]:
    return [(0, expert) for expert in event]


@every_policy
@given(events=events_of(9, 4), slots=st.integers(4, 8))
@many
def test_victims_are_residents_outside_the_event_and_each_leaves_once(name: str, events: Events, slots: int) -> None:
    policy, resident = policy_for(name, events), set()
    for event in events:
        policy.touch(keys(event))
        resident |= set(keys(event))
        while len(resident) > slots:
            victim = policy.evict(keys(event))
            assert victim in resident
            assert victim not in keys(event)
            resident.remove(victim)
    left = {policy.evict(()) for _ in range(len(resident))}
    assert left == resident


@every_policy
@given(events=events_of(9, 4))
@many
def test_the_same_events_give_the_same_victims(name: str, events: Events) -> None:
    def victims() -> list[tuple[int, int]]:
        policy = policy_for(name, events)
        for event in events:
            policy.touch(keys(event))
        return [policy.evict(()) for _ in {expert for event in events for expert in event}]

    assert victims() == victims()


@every_policy
@given(events=events_of(9, 9), slots=st.integers(2, 12))
@many
def test_every_expert_of_an_event_has_one_place_and_no_two_share_a_slot(name: str, events: Events, slots: int) -> None:
    pool = Pool(slots, policy_for(name, events), first_slot=100)
    for event in events:
        before = pool.resident
        leaving, staying, coming, passing = pool.serve(keys(event))
        assert sorted([*leaving, *staying, *coming, *passing]) == sorted(keys(event))
        assert before & set(keys(event)) == {*leaving, *staying}
        assert pool.resident & set(keys(event)) == {*staying, *coming}
        assert len(pool.resident) == min(slots, len(before | set(keys(event))))
        if len(event) <= slots:
            assert not leaving
            assert not passing
        for together in (leaving | staying, staying | coming):
            assert len(set(together.values())) == len(together)
            assert all(100 <= slot < 100 + slots for slot in together.values())


@every_policy
@given(events=events_of(7, 7))
@many
def test_a_pool_for_all_experts_misses_first_touches_only(name: str, events: Events) -> None:
    pool, seen = Pool(7, policy_for(name, events)), set()
    for event in events:
        assert set(pool.serve(keys(event)).misses) == set(keys(event)) - seen
        seen |= set(keys(event))


@every_policy
@given(events=events_of(9, 3), slots=st.integers(3, 6))
@many
def test_what_was_just_used_hits(name: str, events: Events, slots: int) -> None:
    twice = [event for event in events for _ in range(2)]
    pool = Pool(slots, policy_for(name, twice))
    for number, event in enumerate(twice):
        before, misses = pool.resident, pool.serve(keys(event)).misses
        if number % 2:
            assert not misses
            assert pool.resident == before


@pytest.mark.parametrize("name", [name for name in POLICY_NAMES if name != "decayed"])
@given(before=events_of(7, 4), after=events_of(7, 4))
@many
def test_what_left_is_forgotten_by_all_but_decayed(name: str, before: Events, after: Events) -> None:
    def victims(policy: Policy, events: Events) -> list[tuple[int, int]]:
        for event in events:
            policy.touch(keys(event))
        return [policy.evict(()) for _ in {expert for event in events for expert in event}]

    used = policy_for(name, before + after)
    victims(used, before)
    assert victims(used, after) == victims(policy_for(name, after), after)


def test_static_gives_up_what_the_profile_uses_least_then_the_least_recent() -> None:
    policy = Static({(0, 1): 9, (0, 2): 4, (1, 2): 5})
    policy.touch([(1, 7), (0, 1), (1, 2), (0, 2), (0, 8)])
    policy.touch([(1, 7)])
    assert [policy.evict(()) for _ in range(5)] == [(0, 8), (1, 7), (0, 2), (1, 2), (0, 1)]


def test_static_keeps_its_experts_but_for_the_slots_an_event_needs() -> None:
    """Profile 3 > 2 > 1 > 0: of four slots two go to whatever event is served, 3 and 2 stay through all of them."""
    pool = Pool(4, Static({(0, expert): expert for expert in range(4)}))
    misses = [len(pool.serve(keys(event)).misses) for event in [[3, 2], [1, 0], [8, 9], [6, 7], [3, 2], [9, 3]]]
    assert misses == [2, 2, 2, 2, 0, 1]


def test_decayed_remembers_what_left_and_forgets_with_time() -> None:
    """0 was used three times before it left, 1 twice since; after some half-lives the old uses count for nothing."""
    victims = []
    for calls_between in (1, 5 * Decayed.HALF_LIFE):
        policy = Decayed()
        for _ in range(3):
            policy.touch(keys([0]))
        assert policy.evict(()) == (0, 0)
        for _ in range(calls_between):
            policy.touch(keys([5]))
        for event in [[0], [1], [1]]:
            policy.touch(keys(event))
        order = [policy.evict(()) for _ in range(3)]
        victims.append(next(victim for victim in order if victim != (0, 5)))
    assert victims == [(0, 1), (0, 0)]


layers_of_calls = st.lists(st.tuples(*[events_of(5, 3).map(lambda events: events[0])] * 3), min_size=2, max_size=12)


@given(calls=layers_of_calls, slots=st.integers(3, 12))
@many
def test_decayed_counts_uses_for_less_the_further_away_their_layers_turn_is(
    calls: list[tuple[list[int], ...]], slots: int
) -> None:
    """Three layers share the slots, all of them known from the first call on; worth by the definition, from all uses."""
    policy, resident = Decayed(), {(layer, 9) for layer in range(3)}
    uses: dict[Key, list[int]] = {key: [0] for key in sorted(resident)}
    for key in uses:
        policy.touch([key])
    for number, call in enumerate(calls, start=1):
        for layer, experts in enumerate(call):
            event = [(layer, expert) for expert in experts]
            policy.touch(event)
            resident |= set(event)
            for key in event:
                uses.setdefault(key, []).append(number)
            while len(resident) > slots:
                victim = policy.evict(event)
                worth = {key: plain_worth(key, uses[key], number, layer) for key in resident - set(event)}
                assert worth[victim] == pytest.approx(min(worth.values()))
                resident.remove(victim)


def plain_worth(key: Key, uses: list[int], now: int, layer: int) -> float:
    """`now` is the call being served; layers that come after `layer` were last served in the call before."""
    calls = now if key[0] <= layer else now - 1
    until_turn = {0: 3, 1: 1, 2: 2}[(key[0] - layer) % 3] / 3
    return sum(2 ** -((calls - use) / Decayed.HALF_LIFE) for use in uses) * (1 - Decayed.TURN * until_turn)


@pytest.mark.parametrize("name", [*ONLINE, "static"])
def test_every_policy_is_made_afresh(name: str) -> None:
    make = policy_maker(name, [], fixed_trace(30) if name == "static" else None)
    first, second = make(), make()
    first.touch([(0, 1)])
    second.touch([(0, 2)])
    assert (first.evict(()), second.evict(())) == ((0, 1), (0, 2))


def test_a_profile_counts_what_its_tokens_chose() -> None:
    profile = fixed_trace(50)
    policy = policy_maker("static", [], profile)()
    everything = [(layer, expert) for layer in range(3) for expert in range(12)]
    policy.touch(everything)
    order = [policy.evict(()) for _ in everything]
    uses = [int((profile.expert_ids[:, layer] == expert).sum()) for layer, expert in order]
    assert uses == sorted(uses)
    assert len(set(uses)) > 5
    assert np.array_equal(profile.expert_uses.sum(axis=1), [150, 150, 150])
