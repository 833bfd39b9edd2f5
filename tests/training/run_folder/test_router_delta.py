"""A delta goes back where it came from, and nowhere else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.load import UserError
from training.model.loading import load_pretrained
from training.model.routers import copy_into_routers, router_parameters
from training.run_folder import router_delta
from training.run_folder.proof import frozen_sha256

ModelDir = Callable[[str], Path]


@pytest.fixture
def base(model_dir: ModelDir, tmp_path: Path) -> Path:
    """A copy of the model that a test may damage."""
    return Path(shutil.copytree(model_dir("qwen2_moe"), tmp_path / "base"))


@pytest.fixture
def routers(base: Path) -> dict[str, Tensor]:
    weights = {
        name: parameter.detach().clone() for name, parameter in router_parameters(load_pretrained(str(base))).items()
    }
    return {name: weight + torch.arange(weight.numel()).view_as(weight) / 7 for name, weight in weights.items()}


@pytest.fixture
def delta(base: Path, routers: dict[str, Tensor], tmp_path: Path) -> Path:
    folder = tmp_path / "delta"
    sha256 = router_delta.checkpoint_sha256(base, routers.keys())
    router_delta.save(folder, routers, base_model="org/base", base_sha256=sha256, about={"objective": "remoe"})
    return folder


def test_a_delta_comes_back_as_it_was_written(base: Path, delta: Path, routers: dict[str, Tensor]) -> None:
    found = router_delta.load_for(base, delta)
    assert found.keys() == routers.keys()
    assert all(torch.equal(found[name], routers[name]) for name in routers)
    assert sorted(path.name for path in delta.parent.iterdir()) == ["base", "delta"]


def test_the_description_names_base_tensors_and_what_the_caller_adds(delta: Path, routers: dict[str, Tensor]) -> None:
    found = router_delta.describe(delta)
    assert found["format_version"] == 1
    assert found["base_model"] == "org/base"
    assert found["objective"] == "remoe"
    assert found["tensors"] == {name: [8, 16] for name in routers}
    assert len(found["base_frozen_sha256"]) == 64


def test_gates_are_stored_in_float32_and_nothing_else_is(delta: Path, routers: dict[str, Tensor]) -> None:
    stored = load_file(delta / router_delta.WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert stored.keys() == routers.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applying_changes_only_the_routers_and_keeps_their_dtype(
    dtype: torch.dtype, base: Path, delta: Path, routers: dict[str, Tensor]
) -> None:
    before = frozen_sha256(load_pretrained(str(base), dtype=dtype).state_dict().items(), routers)
    model = load_pretrained(str(base), dtype=dtype, router_delta=router_delta.load_for(base, delta))
    for name, parameter in router_parameters(model).items():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, routers[name].to(dtype))
    assert frozen_sha256(model.state_dict().items(), routers) == before


def test_a_delta_is_accepted_by_a_base_with_other_routers(base: Path, delta: Path, routers: dict[str, Tensor]) -> None:
    change(base, next(iter(routers)))
    assert router_delta.load_for(base, delta).keys() == routers.keys()


@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", "model.layers.1.mlp.experts.3.down_proj.weight"])
def test_a_base_with_one_changed_frozen_value_is_refused(tensor: str, base: Path, delta: Path) -> None:
    change(base, tensor)
    with pytest.raises(UserError, match=r"was trained on org/base, and the frozen weights of .*base differ from it"):
        router_delta.load_for(base, delta)


def change(model: Path, name: str) -> None:
    """Move one value of one stored tensor to the next float."""
    path = model / "model.safetensors"
    tensors = load_file(path)
    first = tensors[name].view(-1)[:1]
    first.copy_(torch.nextafter(first.clone(), torch.full_like(first, torch.inf)))
    save_file(tensors, path, metadata={"format": "pt"})


def test_the_base_is_the_same_in_one_file_or_in_several(base: Path, routers: dict[str, Tensor], tmp_path: Path) -> None:
    load_pretrained(str(base)).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    expected = router_delta.checkpoint_sha256(base, routers.keys())
    assert router_delta.checkpoint_sha256(tmp_path / "shards", routers.keys()) == expected


def test_a_folder_without_a_delta_is_refused(base: Path) -> None:
    with pytest.raises(
        UserError, match=r"base is not a router delta \(no router_delta\.json\); training writes one as"
    ):
        router_delta.load_for(base, base)
    with pytest.raises(UserError, match="nowhere is not a router delta"):
        router_delta.load_for(base, base / "nowhere")


def test_a_newer_format_is_refused(base: Path, delta: Path) -> None:
    path = delta / router_delta.DESCRIPTION
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2}), encoding="utf-8")
    with pytest.raises(UserError, match="has format version 2, this code reads 1"):
        router_delta.load_for(base, delta)


@pytest.mark.parametrize("keep", [0, 5, 300])
def test_truncated_gates_are_refused(keep: int, base: Path, delta: Path) -> None:
    path = delta / router_delta.WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"router_delta\.safetensors is missing or damaged .*copy the delta again"):
        router_delta.load_for(base, delta)


def test_missing_gates_are_refused(base: Path, delta: Path) -> None:
    (delta / router_delta.WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"router_delta\.safetensors is missing or damaged"):
        router_delta.load_for(base, delta)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff"])
def test_a_damaged_description_is_refused(content: bytes, base: Path, delta: Path) -> None:
    (delta / router_delta.DESCRIPTION).write_bytes(content)
    with pytest.raises(UserError, match=r"router_delta\.json is damaged .*copy the delta again"):
        router_delta.load_for(base, delta)


def test_a_base_that_is_no_checkpoint_or_truncated_is_refused(base: Path, delta: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds neither model\.safetensors nor .*; save the model as safetensors"):
        router_delta.load_for(tmp_path, delta)
    shard = base / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors is truncated: .*copy the model again"):
        router_delta.load_for(base, delta)


def test_gates_of_another_model_are_not_applied(base: Path, routers: dict[str, Tensor]) -> None:
    model = load_pretrained(str(base))
    name, other = routers
    wrong = {
        rf"{other}, a router of the model, is not in it": {name: routers[name]},
        rf"{name} has shape \[4, 16\], the model's is \[8, 16\]": {**routers, name: routers[name][:4]},
        r"the model has no router weight other": {**routers, "other": routers[name]},
    }
    before = {key: parameter.detach().clone() for key, parameter in router_parameters(model).items()}
    for words, weights in wrong.items():
        with pytest.raises(UserError, match=f"router delta: {words}; use the model it was made for"):
            copy_into_routers(model, weights)
    assert all(torch.equal(parameter, before[key]) for key, parameter in router_parameters(model).items())


def test_whoever_may_read_the_description_may_read_the_weights(delta: Path) -> None:
    assert len({path.stat().st_mode for path in delta.iterdir()}) == 1


def test_a_failed_write_leaves_the_old_delta(
    base: Path, delta: Path, routers: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"cannot be written .*the disk is full or not writable"):
        router_delta.save(delta, routers, base_model="x", base_sha256="y", about={})
    assert router_delta.load_for(base, delta).keys() == routers.keys()
    assert sorted(path.name for path in delta.parent.iterdir()) == ["base", "delta"]


@pytest.mark.parametrize(
    ("text", "words"), [("[]", "is no JSON object"), ('{"format_version": 1}', "lacks base_model"), ("{", "is damaged")]
)
def test_a_description_that_lacks_something_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / router_delta.DESCRIPTION).write_text(text)
    with pytest.raises(UserError, match=words):
        router_delta.describe(tmp_path)
