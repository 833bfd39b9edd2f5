"""Arms of a frontier: experts that are rounded to a format are those of a checkpoint that is written in it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from evaluation.engine.store.experts import ExpertStore
from evaluation.export.quantised_folder import write_quantised
from evaluation.frontier.measure import rounded_experts
from training.model.loading import load_pretrained

Checkpoint = Callable[..., Path]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("qwen3_moe_blocks", "mxfp4"),
        ("qwen3_moe_blocks", "fp8"),
        ("qwen3_moe_blocks", "int4"),
        ("gpt_oss_blocks", "mxfp4"),
    ],
)
def test_rounded_experts_are_those_of_a_quantised_checkpoint(
    checkpoint: Checkpoint, tmp_path: Path, family: str, kind: str, dtype: torch.dtype
) -> None:
    folder, quantised = checkpoint(family), tmp_path / "q"
    write_quantised(folder, quantised, kind)
    expected = load_pretrained(str(quantised), dtype=dtype).state_dict()
    model = load_pretrained(str(folder), dtype=dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with rounded_experts(model, ExpertStore(quantised).format):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
        experts = [name for name, tensor in before.items() if "experts" in name and tensor.dim() == 3]
        assert all(not torch.equal(expected[name], before[name]) for name in experts)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
