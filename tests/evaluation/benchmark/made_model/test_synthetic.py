"""The parts of the made model do what its file says: windows by distance, standardised projections."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeRotaryEmbedding, apply_rotary_pos_emb

from evaluation.benchmark.made_model import synthetic
from evaluation.benchmark.made_model.calibration import angle_for, reuse_rate
from evaluation.benchmark.made_model.synthetic import Projection, Source
from tests.evaluation.benchmark.conftest import TINY

WIDE = replace(TINY, hidden=512)


def test_heads_weigh_the_past_by_a_power_of_its_distance() -> None:
    weights = synthetic.attention(Source(0, 1), WIDE)
    config = WIDE.config("float32", bos_token_id=0, pad_token_id=1)
    cos, sin = Qwen2MoeRotaryEmbedding(config)(torch.zeros(1, 65, 64), torch.arange(65)[None])
    query = weights["q_proj.bias"].view(1, WIDE.heads, 1, 64).expand(1, -1, 65, 64)
    key = weights["k_proj.bias"][:64].view(1, 1, 1, 64).expand(1, 1, 65, 64)
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    scores_HS = (query[0, :, -1:] * key[0]).sum(-1) / math.sqrt(64)
    distance = np.arange(64, 0, -1)
    for head, power in enumerate(np.linspace(*synthetic.POWERS, WIDE.heads)):
        slope = np.polyfit(np.log(distance), scores_HS[head, :-1].numpy(), 1)[0]
        assert slope == pytest.approx(-power, rel=0.25)


def test_a_projection_is_standardised_at_both_ends() -> None:
    sample_TH = Source(0, 1).normal(500, 128) * 3 + 1
    sample_TH[:, synthetic.CONSTANT] = 7
    projection = Projection.on(Source(0, 2), 16, sample_TH)
    for angle in (0.0, math.pi / 2):
        output_TE = sample_TH @ projection.at(angle).T
        torch.testing.assert_close(output_TE.mean(0), torch.zeros(16), atol=1e-3, rtol=0)
        torch.testing.assert_close(output_TE.std(0), torch.ones(16), atol=1e-3, rtol=0)
    context = synthetic.Parts.of(128).context
    assert not projection.at(0.0)[:, context].any()
    assert projection.at(math.pi / 2)[:, context].all()


def test_reuse_rate_by_hand() -> None:
    logits_TE = torch.tensor([[3.0, 2, 1, 0], [3, 0, 2, 1], [0, 1, 2, 3], [9, 8, 0, 0], [9, 8, 0, 0], [0, 0, 9, 8]])
    # chosen two: {0,1} {0,2} {3,2} | {0,1} {0,1} {2,3}; rows do not touch
    assert reuse_rate(logits_TE, 2, rows=2) == pytest.approx((0.5 + 0.5 + 1 + 0) / 4)


def test_angle_is_found_by_bisection() -> None:
    assert angle_for(0.5, math.sin) == pytest.approx(math.pi / 6, abs=1e-3)


@pytest.mark.parametrize(
    ("changed", "words"),
    [({"hidden": 100}, "no multiple of 128"), ({"top_k": 8}, "top_k is 8 of 8"), ({"layers": 0}, "0 layers")],
)
def test_sizes_that_do_not_fit_are_refused(changed: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(TINY, **changed)


def test_places_are_independent_and_repeatable() -> None:
    assert torch.equal(Source(3, 1).normal(8), Source(3, 1).normal(8))
    assert not torch.equal(Source(3, 1).normal(8), Source(3, 2).normal(8))
    assert not torch.equal(Source(3, 1).normal(8), Source(4, 1).normal(8))
