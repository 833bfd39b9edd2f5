"""Strengths for each layer: equal worth everywhere, never above the price, and noise does not lead astray."""

import numpy as np
import pytest

from evaluation.frontier.allocation import allocate

DELTAS = [0.04, 0.08, 0.16]


def test_the_next_load_saved_costs_the_same_in_every_layer() -> None:
    d = np.array(DELTAS)
    prices, worth = np.array([1.0, 4.0]), np.array([1.0, 1.0])
    cost, saved = prices[:, None] * d**2, worth[:, None] * (d - 2 * d**2)
    for within in (0.0005, 0.002, 0.006):
        found = np.array(allocate(DELTAS, cost, saved, within=within))
        assert (prices * found**2).sum() == pytest.approx(within, rel=0.1)
        marginal = (worth * (1 - 4 * found)) / (2 * prices * found)
        assert marginal[0] == pytest.approx(marginal[1], rel=0.15)
    assert found[0] > 2 * found[1]


def test_no_strength_is_above_what_was_tried_and_what_saves_nothing_gets_none() -> None:
    d = np.array(DELTAS)
    cost, saved = np.stack([d * 1e-6, d * 0.01]), np.stack([d, 0 * d])
    assert allocate(DELTAS, cost, saved, within=1.0) == [0.16, 0.0]
    assert allocate(DELTAS, cost, saved, within=0.0)[1] == 0.0


def test_a_cost_that_noise_has_made_negative_is_free_and_not_a_gain() -> None:
    cost = np.array([[-0.001, -0.0005, -0.002], [0.002, 0.004, 0.008]])
    saved = np.array([[0.05, 0.08, 0.1], [0.05, 0.08, 0.1]])
    free, dear = allocate(DELTAS, cost, saved, within=0.002)
    assert free == pytest.approx(0.16)
    assert dear == pytest.approx(0.04, abs=0.002), "there is no more to spend because another layer seemed to gain"
