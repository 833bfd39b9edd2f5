"""What a division costs is the sum over both phases of computing and of waiting, for one division or for many."""

import numpy as np

from evaluation.engine.sessions.cost import Rates


def test_tokens_and_misses_cost_what_they_took() -> None:
    rates = Rates(token_seconds=(2.0, 3.0), miss_seconds=(0.5, 0.25))
    assert rates.seconds(tokens=(10, 1), misses=(4, 8)) == 20 + 3 + 2 + 2
    many = rates.seconds(tokens=(np.array([10, 0]), 1), misses=np.array([[4, 0], [8, 4]]))
    assert many.tolist() == [27.0, 4.0]
