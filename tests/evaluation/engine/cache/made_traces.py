"""Traces, events and policies that several tests share; no test in here."""

from collections.abc import Mapping

import numpy as np
from hypothesis import strategies as st

from evaluation.engine.cache.counts import DECODE, PREFILL
from evaluation.engine.cache.policies import NEVER, ONLINE, Belady, Key, Policy, Static
from evaluation.engine.cache.trace import RouteTrace

Events = list[list[int]]
POLICY_NAMES = (*ONLINE, "static", "belady")
PROFILE: Mapping[Key, int] = {(0, expert): expert * 5 % 7 for expert in range(9)}
"""What `static` gets: no two of the first seven experts are used equally often, others are not used at all."""


def policy_for(name: str, events: Events) -> Policy:
    """A fresh policy, about to see these events of layer 0."""
    if name == "static":
        return Static(PROFILE)
    if name != "belady":
        return ONLINE[name]()
    times: dict[Key, list[int]] = {}
    for time, event in enumerate(events):
        for expert in event:
            times.setdefault((0, expert), []).append(time)
    return Belady({key: iter([*uses[1:], NEVER]) for key, uses in times.items()})


def events_of(experts: int, largest: int) -> st.SearchStrategy[Events]:
    """Events of one layer: distinct experts each, in event order."""
    event = st.lists(st.integers(0, experts - 1), min_size=1, max_size=largest, unique=True)
    return st.lists(event, min_size=1, max_size=40)


@st.composite
def traces(draw: st.DrawFn, top_k: int | None = None, longest_call: int = 5) -> RouteTrace:
    """Some requests, each a call of several tokens (its prompt) or none, then calls of one token."""
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(2, 9))
    top_k = top_k or draw(st.integers(1, min(3, experts)))
    calls = draw(st.lists(st.tuples(st.integers(1, longest_call), st.booleans()), min_size=1, max_size=30))
    lengths = [length for length, _ in calls]
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = random.random((sum(lengths), layers, experts)) + draw(st.sampled_from([0.0, 1.0])) * random.random(experts)
    return RouteTrace(
        np.argsort(scores, axis=-1)[..., :top_k].astype(np.uint8),
        phase=np.repeat([PREFILL if length > 1 else DECODE for length in lengths], lengths),
        request_id=np.repeat(np.cumsum([starts for _, starts in calls]), lengths),
        call=np.repeat(np.arange(len(calls)), lengths),
        num_experts=experts,
        layer_ids=tuple(range(layers)),
    )


def teacher_forced(
    expert_ids: list[list[list[int]]], *, requests: list[int] | None = None, experts: int = 8
) -> RouteTrace:
    """Every token is its own decode call."""
    tokens = len(expert_ids)
    return RouteTrace(
        np.array(expert_ids, dtype=np.uint8),
        phase=np.ones(tokens, np.uint8),
        request_id=np.array(requests or [0] * tokens, np.int32),
        call=np.arange(tokens, dtype=np.int32),
        num_experts=experts,
        layer_ids=tuple(range(len(expert_ids[0]))),
        expert_bytes=100,
    )


def fixed_trace(tokens: int = 600) -> RouteTrace:
    """600 tokens, 3 layers, 3 of 12 experts, 2 requests, drifting preferences; integer arithmetic only."""
    state, rows = 12345, []
    for token in range(tokens):
        layers = []
        for layer in range(3):
            chosen: list[int] = []
            while len(chosen) < 3:
                state = (1103515245 * state + 12345) % 2**31
                expert = (token // 40 + layer + min((state >> 16) % 12, (state >> 8) % 12)) % 12
                if expert not in chosen:
                    chosen.append(expert)
            layers.append(chosen)
        rows.append(layers)
    return teacher_forced(rows, requests=[token // 300 for token in range(tokens)], experts=12)
