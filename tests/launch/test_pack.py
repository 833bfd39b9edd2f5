"""`remoe pack`: the same tensors, in whole pages; what is read then is not copied, and computes what it did."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.load import UserError
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from evaluation.engine.store import packing
from evaluation.engine.store import reader as reader_module
from evaluation.engine.store.experts import ExpertStore
from evaluation.engine.store.packing import is_packed, pack_shard
from launch import pack

Checkpoint = Callable[..., Path]


def packed(folder: Path, tmp_path: Path) -> Path:
    output = tmp_path / "new" / "packed"
    pack.main(["--model", str(folder), "--output", str(output)])
    return output


@pytest.mark.parametrize("family", ["pages", "fused_pages"])
@pytest.mark.parametrize("shard_size", ["1GB", "60KB"])
def test_tensors_metadata_and_other_files_stay(
    checkpoint: Checkpoint, tmp_path: Path, family: str, shard_size: str
) -> None:
    folder = checkpoint(family, shard_size=shard_size)
    output = packed(folder, tmp_path)
    assert not is_packed(ExpertStore(folder))
    assert is_packed(ExpertStore(output))
    assert {p.name for p in output.iterdir()} == {p.name for p in folder.iterdir()}
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            assert (output / path.name).read_bytes() == path.read_bytes()
            continue
        before, after = load_file(path), load_file(output / path.name)
        assert before.keys() == after.keys()
        assert all(
            torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
        )
        with safe_open(output / path.name, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
    assert AutoTokenizer.from_pretrained(output).vocab_size == 258


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", ["pages", "fused_pages"])
def test_nothing_is_copied_and_tokens_and_logits_are_the_resident_models(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: str, prefetch: int
) -> None:
    output = packed(checkpoint(family, dtype), tmp_path)
    inputs = torch.arange(3, 23)[None]
    how = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    expected = AutoModelForCausalLM.from_pretrained(output, dtype="auto").generate(inputs, **how)
    with load(output, EngineOptions("40%", prefetch=prefetch)) as (model, engine):
        if engine._reader.direct:
            monkeypatch.setattr(reader_module.np, "copyto", None)
        found = model.generate(inputs, **how)
        assert engine.stats().misses > 0
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))


def test_weights_in_other_forms_are_left_behind(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("pages"), tmp_path / "model"))
    (folder / "pytorch_model.bin").write_bytes(b"x")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"x")
    output = packed(folder, tmp_path)
    assert {p.name for p in folder.iterdir()} - {p.name for p in output.iterdir()} == {"pytorch_model.bin", "original"}


def test_what_cannot_or_need_not_be_packed_is_told(checkpoint: Checkpoint, tmp_path: Path) -> None:
    output = packed(checkpoint("pages"), tmp_path)
    for model, to, words in (
        (checkpoint("pages"), output, "exists already"),
        (output, tmp_path / "again", "lie in whole pages already"),
        (
            checkpoint("olmoe"),
            tmp_path / "odd",
            "an expert's gate matrix has 2560 bytes, which are no whole pages of 4096",
        ),
    ):
        with pytest.raises(UserError, match=words):
            pack.main(["--model", str(model), "--output", str(to)])
    assert os.listdir(tmp_path) == ["new"]


def test_a_failure_leaves_nothing_behind(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []

    def fails(shard: Path, target: Path) -> None:
        calls.append(shard)
        if len(calls) == 3:
            raise OSError(28, os.strerror(28), str(target))
        pack_shard(shard, target)

    monkeypatch.setattr(packing, "pack_shard", fails)
    with pytest.raises(OSError, match="No space left"):
        packed(checkpoint("pages", shard_size="60KB"), tmp_path)
    assert os.listdir(tmp_path / "new") == []


def test_a_shard_can_be_packed_in_its_place_and_a_damaged_one_stays(checkpoint: Checkpoint, tmp_path: Path) -> None:
    shard = Path(shutil.copy(checkpoint("pages") / "model.safetensors", tmp_path))
    before = load_file(shard)
    pack_shard(shard, shard)
    assert all(torch.equal(load_file(shard)[name], tensor) for name, tensor in before.items())
    os.truncate(shard, shard.stat().st_size - 5)
    content = np.fromfile(shard, np.uint8)
    with pytest.raises(UserError, match="is truncated"):
        pack_shard(shard, shard)
    assert np.array_equal(np.fromfile(shard, np.uint8), content)
    assert os.listdir(tmp_path) == [shard.name]
