"""Documents of one row see nothing of each other, whatever the model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from evaluation.benchmark.families import make_tiny, tiny_config
from training.arguments import TrainArguments
from training.loop import train_step
from training.model.loading import load_pretrained
from training.model.packing import keeps_documents_apart, one_per_row
from training.run import build

Arguments = Callable[..., TrainArguments]


def test_every_document_of_every_row_gets_a_row_and_finds_its_place_again() -> None:
    documents_BS = torch.tensor([[4, 4, 4, 7, 7, 7], [7, 9, 2, 2, -1, -1]])
    ids_BS = torch.arange(12).view(2, 6)
    alone = one_per_row(ids_BS, documents_BS)
    assert alone.input_ids_DT.tolist() == [[0, 1, 2], [3, 4, 5], [6, 0, 0], [7, 0, 0], [8, 9, 0], [10, 11, 0]]
    assert alone.position_ids_DT.tolist() == [[0, 1, 2]] * 6
    assert torch.equal(alone.input_ids_DT.flatten()[alone.place_BS], ids_BS)


@pytest.mark.parametrize(
    ("family", "apart"),
    [("OlmoeConfig", True), ("Qwen3MoeConfig", True), ("GptOssConfig", False), ("Qwen3NextConfig", False),
     ("GraniteMoeHybridConfig", False), ("Lfm2MoeConfig", False)],
)  # fmt: skip
def test_who_mixes_documents_is_found_out(family: str, apart: bool, tmp_path: Path) -> None:
    """Those that transformers gives no document's edges, and those with convolutions, linear attention or a state."""
    make_tiny(tiny_config(getattr(transformers, family)), tmp_path)
    model: Any = load_pretrained(str(tmp_path), dtype=torch.float32)
    for sharded in (False, True):
        for row_tokens in (2, 24):
            assert keeps_documents_apart(model, row_tokens, sharded=sharded) == apart
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("objective", ["remoe", "cache_miss"])
def test_rows_of_their_own_change_no_number_of_a_step(objective: str, train_args: Arguments) -> None:
    """Losses, rewards and counters of a family that keeps documents apart either way."""
    args = train_args(objective=objective, reuse_warmup_steps=0, consistency_warmup_steps=0)
    packed, alone = build(args), build(replace(args, output_dir=f"{args.output_dir}-alone"))
    assert packed.packs
    alone.packs = False
    for _ in range(2):
        expected, found = train_step(packed), train_step(alone)
        assert {key: value for key, value in found.items() if not key.startswith("time/")} == pytest.approx(
            {key: value for key, value in expected.items() if not key.startswith("time/")}, rel=1e-4, abs=1e-6
        )
