"""`remoe pack --experts`: a standard checkpoint, the nearest numbers, everything else byte for byte."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.load import UserError
from evaluation.engine.store.experts import ExpertStore
from evaluation.export import quantised_folder
from launch import pack

Checkpoint = Callable[..., Path]


def packed(folder: Path, output: Path, kind: str) -> Path:
    pack.main(["--model", str(folder), "--output", str(output), "--experts", kind])
    return output


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("shard_size", ["1GB", "100KB"])
@pytest.mark.parametrize(
    ("family", "kind", "most", "share"),
    [
        ("gpt_oss_blocks", "mxfp4", 0.13, 4.25 / 16),
        ("qwen3_moe_blocks", "mxfp4", 0.13, 4.25 / 16),
        ("qwen3_moe_blocks", "int4", 0.12, 4.5 / 16),
        ("deepseek_v3_blocks", "fp8", 0.03, 0.5 + 32 / 32**2 / 16),
        ("mixtral", "int8", 0.01, 0.5 + 16 / 8 / 16),
        ("olmoe", "int8", 0.01, 0.5 + 16 / 8 / 16),  # its output matrix is tied to the embeddings and not stored
    ],
)
def test_experts_are_near_and_everything_else_stays(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    family: str, kind: str, most: float, share: float, shard_size: str,
) -> None:  # fmt: skip
    folder = checkpoint(family, shard_size=shard_size)
    output = packed(folder, tmp_path / "new" / "q", kind)
    before, after = ExpertStore(folder), ExpertStore(output)
    assert after.format.expert_bytes / before.format.expert_bytes == share
    assert f"{share:.2f} of their bytes" in capsys.readouterr().out
    assert {p.name for p in output.iterdir()} == {p.name for p in folder.iterdir()}
    assert AutoTokenizer.from_pretrained(output).vocab_size == 258
    old, new = tensors(folder), tensors(output)
    assert all(torch.equal(new[name], old[name]) for name in before.resident)
    assert set(new) - set(before.resident) == set(new) & {n for n in new if "experts" in n and "shared" not in n} - set(
        before.resident
    )
    # transformers is the judge of what was written
    plain, quantised = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for path in (folder, output))
    quantised(input_ids=torch.arange(5)[None])  # compressed-tensors decodes what else there is at the first call
    for name, expected in plain.state_dict().items():
        found = quantised.state_dict()[name].float()
        error = (found - expected.float()).norm() / expected.float().norm()
        is_expert = ".experts." in name and expected.dim() == 3
        assert 0 < error < most if is_expert else torch.equal(found, expected.float()), name


def test_the_index_names_what_is_there(checkpoint: Checkpoint, tmp_path: Path) -> None:
    output = packed(checkpoint("qwen3_moe_blocks", shard_size="100KB"), tmp_path / "q", "int4")
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    for name, shard in index["weight_map"].items():
        assert name in load_file(output / shard)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(output).values())


def test_what_cannot_be_quantised_is_told_and_nothing_is_written(checkpoint: Checkpoint, tmp_path: Path) -> None:
    done = packed(checkpoint("qwen3_moe_blocks"), tmp_path / "q", "fp8")
    for folder, to, kind, words in (
        (checkpoint("qwen3_moe_blocks"), done, "int4", "exists already"),
        (done, tmp_path / "again", "int4", "the experts are FP8 already; quantise the model that they were made from"),
        (checkpoint("granitemoe"), tmp_path / "g", "mxfp4", "no standard layout for mxfp4 .*gpt-oss alone has one"),
        (
            checkpoint("olmoe"),
            tmp_path / "o",
            "mxfp4",
            "experts of 32 x 40 numbers cannot be mxfp4: 40 columns are no whole",
        ),
    ):
        with pytest.raises(UserError, match=words):
            packed(folder, to, kind)
    assert os.listdir(tmp_path) == ["q"]


def test_what_was_written_is_read_back(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that keeps other bytes than it was given."""
    read_back, raw, writing = quantised_folder._read_back, quantised_folder.raw, [True]

    def reads_back(*given: object) -> None:
        writing.clear()
        read_back(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(quantised_folder, "_read_back", reads_back)
    monkeypatch.setattr(quantised_folder, "raw", lambda tensor: raw(tensor ^ 1 if writing else tensor))
    with pytest.raises(UserError, match="layer 0 expert 0 was not written as it should be"):
        quantised_folder.write_quantised(checkpoint("qwen3_moe_blocks"), tmp_path / "q", "mxfp4")
    assert os.listdir(tmp_path) == []
