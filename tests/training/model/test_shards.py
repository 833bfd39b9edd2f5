"""Damaged checkpoints are found when the index is built, and the file is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from configs.load import UserError
from training.model.shards import INDEX_NAME, SINGLE_NAME, read_index

Checkpoint = Callable[..., Path]


@pytest.fixture
def single(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("olmoe"), tmp_path / "single"))


@pytest.fixture
def sharded(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("qwen2_moe", "bfloat16", "7KB"), tmp_path / "sharded"))


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_every_tensor_is_where_the_index_says(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    index = read_index(folder)
    names = set()
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, framework="np") as file:
            names |= set(file.keys())
    assert set(index) == names
    for tensor in index.values():
        assert tensor.shard.stat().st_size >= tensor.offset + tensor.length_bytes


def test_a_missing_folder_or_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model folder .*nowhere does not exist"):
        read_index(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
        read_index(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -1])
def test_a_truncated_shard_is_named(single: Path, kept: int) -> None:
    content = (single / SINGLE_NAME).read_bytes()
    (single / SINGLE_NAME).write_bytes(content[:kept])
    with pytest.raises(UserError, match=r"shard .*model\.safetensors is truncated"):
        read_index(single)


def test_a_longer_shard_is_named(single: Path) -> None:
    with (single / SINGLE_NAME).open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"shard .*model\.safetensors is changed: \d+ bytes, its header says"):
        read_index(single)


@pytest.mark.parametrize(
    "header",
    [
        b"[1, 2]",
        b"{not json",
        b'{"a": {"dtype": "F32"}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
    ],
)
def test_an_unreadable_header_is_named(single: Path, header: bytes) -> None:
    (single / SINGLE_NAME).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match=r"shard .*model\.safetensors: unreadable header"):
        read_index(single)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[3]
    victim.unlink()
    with pytest.raises(UserError, match=f"shard .*{victim.name} is missing"):
        read_index(sharded)


def test_a_shard_that_was_swapped_for_another_is_named(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    shutil.copy(second, first)
    with pytest.raises(UserError, match=r"is changed: it lacks .*, which the index promises"):
        read_index(sharded)


def test_an_index_that_is_none_or_leads_elsewhere_is_refused(sharded: Path) -> None:
    (sharded / INDEX_NAME).write_text("{}")
    with pytest.raises(UserError, match="is not a safetensors index"):
        read_index(sharded)
    for nothing in ({}, [], {"a": 3}, None):
        (sharded / INDEX_NAME).write_text(json.dumps({"weight_map": nothing}))
        with pytest.raises(UserError, match="it names no tensors"):
            read_index(sharded)
    (sharded / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(UserError, match="not a file of its own folder"):
        read_index(sharded)


def test_a_single_file_beside_an_index_of_others_is_refused(single: Path, sharded: Path) -> None:
    shutil.copy(single / SINGLE_NAME, sharded)
    with pytest.raises(UserError, match="which of them is the model cannot be told; remove"):
        read_index(sharded)


def test_an_index_of_the_single_file_is_no_second_model(single: Path) -> None:
    named = read_index(single)
    (single / INDEX_NAME).write_text(json.dumps({"weight_map": dict.fromkeys(named, SINGLE_NAME)}))
    assert read_index(single) == named


def test_files_that_are_not_named_are_not_the_models(single: Path, sharded: Path) -> None:
    for folder in (single, sharded):
        named = read_index(folder)
        shutil.copy(single / SINGLE_NAME, folder / "consolidated.safetensors")
        assert read_index(folder) == named


def test_a_tensor_that_the_index_does_not_name_is_refused(sharded: Path) -> None:
    index = json.loads((sharded / INDEX_NAME).read_text())
    shards = list(index["weight_map"].values())
    unnamed = next(name for name, shard in index["weight_map"].items() if shards.count(shard) > 1)
    del index["weight_map"][unnamed]
    (sharded / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"holds {unnamed}, which {INDEX_NAME} does not name"):
        read_index(sharded)
