"""The store: where the bytes of every expert lie, in one range where they are together, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.load import UserError
from evaluation.engine.store.experts import ExpertStore

Checkpoint = Callable[..., Path]
NAMES = {
    "olmoe": "model.layers.{}.mlp.experts.{}.{}.weight",
    "mixtral": "model.layers.{}.block_sparse_moe.experts.{}.{}.weight",
}
PARTS = {
    "olmoe": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    "mixtral": {"gate": "w1", "up": "w3", "down": "w2"},
}


def read(store: ExpertStore, layer: int, expert: int) -> dict[str, bytes]:
    """An expert's matrices by role, read where its extents say."""
    parts = {}
    for extent in store.extents(layer, expert):
        with extent.shard.open("rb") as file:
            file.seek(extent.offset)
            parts |= {part: file.read(store.format.parts[part].stored.length_bytes) for part in extent.parts}
    return parts


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_expert_is_read_whole_in_one_read(checkpoint: Checkpoint, family: str, dtype: str) -> None:
    folder = checkpoint(family, dtype)
    tensors, store = load_file(folder / "model.safetensors"), ExpertStore(folder)
    for layer in store.layer_ids:
        for expert in range(store.num_experts):
            assert len(store.extents(layer, expert)) == 1
            parts = read(store, layer, expert)
            for role, part in PARTS[family].items():
                assert parts[role] == raw(tensors[NAMES[family].format(layer, expert, part)])
    assert not any("experts" in name for name in store.resident)
    assert len(store.resident) + 3 * len(store.layer_ids) * store.num_experts == len(tensors)
    assert store.shards == [folder / "model.safetensors"]


def one_layer(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Two experts of one layer, with parts of other names lying in between; None removes a tensor."""
    tensors: dict[str, torch.Tensor | None] = {"model.norm.weight": torch.ones(4)}
    for expert in range(2):
        for part, shape in (("gate_proj", (6, 4)), ("up_proj", (6, 4)), ("down_proj", (4, 6))):
            tensors[f"model.layers.2.mlp.experts.{expert}.{part}.weight"] = torch.randn(shape)
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def saved(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_parts_that_are_not_adjacent_are_read_apart(tmp_path: Path) -> None:
    """Another tensor lies between gate and up of expert 1."""
    tensors = one_layer()
    saved(tmp_path / "m", tensors)
    path = tmp_path / "m" / "model.safetensors"
    rewrite_in_order(path, sorted(tensors, key=lambda name: (".1.up_proj" in name, "norm" in name)))
    store = ExpertStore(tmp_path / "m")
    assert [extent.parts for extent in store.extents(2, 0)] == [("gate", "up", "down")]
    assert [extent.parts for extent in store.extents(2, 1)] == [("gate", "down"), ("up",)]
    assert [extent.parts for extent in store.extents(2, 0, ("gate", "up"))] == [("gate", "up")]
    for expert in range(2):
        for role, part in read(store, 2, expert).items():
            assert part == raw(tensors[f"model.layers.2.mlp.experts.{expert}.{role}_proj.weight"])


def rewrite_in_order(path: Path, names: list[str]) -> None:
    """The same tensors, their data in this order: safetensors itself would sort them by name."""
    tensors, header, data = load_file(path), {}, b""
    for name in names:
        content = raw(tensors[name])
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": offsets}
        data += content
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def fused(*, gate_up: tuple[int, ...], down: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """One layer whose experts are in two tensors, with biases."""
    module = "model.layers.0.mlp.experts"
    return {
        f"{module}.gate_up_proj": torch.randn(gate_up),
        f"{module}.gate_up_proj_bias": torch.randn(gate_up[0], 3),
        f"{module}.down_proj": torch.randn(down),
    }


@pytest.mark.parametrize(
    ("transposed", "gate_up", "down"), [(False, (2, 12, 4), (2, 4, 6)), (True, (2, 4, 12), (2, 6, 4))]
)
def test_an_expert_of_a_fused_layer_is_a_slice_of_each_tensor(
    tmp_path: Path, transposed: bool, gate_up: tuple[int, ...], down: tuple[int, ...]
) -> None:
    tensors = fused(gate_up=gate_up, down=down)
    store = ExpertStore(saved(tmp_path / "m", tensors))
    assert (store.format.hidden, store.format.intermediate, store.format.transposed) == (4, 6, transposed)
    assert list(store.resident) == ["model.layers.0.mlp.experts.gate_up_proj_bias"]
    for expert in range(2):
        assert len(store.extents(0, expert)) == 2
        parts = read(store, 0, expert)
        assert parts["gate_up"] == raw(tensors["model.layers.0.mlp.experts.gate_up_proj"][expert])
        assert parts["down"] == raw(tensors["model.layers.0.mlp.experts.down_proj"][expert])


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {"model.layers.0.mlp.up_proj.weight": torch.ones(4, 4)},
            "no experts in a form that is known: .*gate,up,down",
        ),
        (
            {"model.layers.0.mlp.experts.gate_up_proj": torch.ones(2, 4, 4)},
            "of gate_up and down there is only .*gate_up_proj",
        ),
        (
            {"model.layers.0.mlp.experts.gate_up_proj_blocks": torch.ones(2, 4, 4, dtype=torch.uint8)},
            "of gate_up and down there is only .*gate_up_proj_blocks",
        ),
        (fused(gate_up=(2, 4, 4), down=(2, 4, 4)), r"gate_up_proj\[0\] \[4, 4\] and .*do not belong to a gated expert"),
        (
            fused(gate_up=(3, 12, 4), down=(2, 4, 6)),
            r"gate_up and down are of \{2, 3\} experts; experts without weights",
        ),
        (
            one_layer(model__layers__2__mlp__experts__0__gate_proj__bias=torch.ones(6)),
            "expert tensor .*gate_proj.bias .* is not supported",
        ),
        (
            one_layer(model__layers__2__mlp__experts__0__up_proj__weight=torch.ones(6, 4, dtype=torch.int8)),
            r"up_proj.weight is I8 \[6, 4\] in 24 bytes, not F32 \[6, 4\]",
        ),
        (
            one_layer(model__layers__2__mlp__experts__1__up_proj__weight=None),
            "layer 2 expert 1 has no up matrix",
        ),
        (
            one_layer(model__layers__2__mlp__experts__5__up_proj__weight=torch.ones(6, 4)),
            "layer 2 expert 2 has no gate matrix",
        ),
        (
            one_layer(model__layers__2__mlp__experts__1__up_proj__weight=torch.ones(5, 4)),
            r"up_proj.weight is F32 \[5, 4\] in 80 bytes, not F32 \[6, 4\] in 96 as the others",
        ),
        (
            one_layer(model__layers__2__mlp__experts__1__up_proj__weight=torch.ones(6, 4, dtype=torch.bfloat16)),
            r"up_proj.weight is BF16 \[6, 4\] in 48 bytes, not F32",
        ),
        (
            one_layer(other__layers__2__mlp__experts__0__up_proj__weight=torch.ones(6, 4)),
            r"two sets of experts, model.layers.\* and other.layers.\*",
        ),
    ],
)
def test_what_cannot_be_paged_is_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ExpertStore(saved(tmp_path / "m", tensors))


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen2_moe", "granitemoe", "gpt_oss"])
def test_bytes_of_experts_and_of_the_rest_are_all_bytes(checkpoint: Checkpoint, family: str) -> None:
    folder = checkpoint(family)
    store = ExpertStore(folder)
    experts = len(store.layer_ids) * store.num_experts
    stored_bytes = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert len(store.module_bytes) == len(store.layer_ids)
    assert store.all_experts_bytes == experts * store.format.expert_bytes
    assert store.all_experts_bytes + store.resident_bytes == stored_bytes
    assert all(
        any(name.startswith(module) for name in load_file(folder / "model.safetensors"))
        for module in store.module_bytes
    )


def test_bytes_of_fused_experts_are_those_of_their_slices(tmp_path: Path) -> None:
    store = ExpertStore(saved(tmp_path / "m", fused(gate_up=(2, 4, 12), down=(2, 6, 4))))
    one_bytes = 4 * (4 * 12 + 6 * 4)
    assert store.format.expert_bytes == one_bytes
    assert store.module_bytes == {"model.layers.0.mlp.experts": 2 * one_bytes}
    assert store.active_bytes(top_k=1, tied_embeddings=False) == one_bytes + 4 * 2 * 3, "the biases are resident"


def test_modules_are_in_the_order_of_their_layers(tmp_path: Path) -> None:
    tensors = {
        name.replace(".2.", f".{layer}.", 1): tensor.clone()
        for layer in (10, 9)
        for name, tensor in one_layer().items()
    }
    store = ExpertStore(saved(tmp_path / "m", tensors))
    assert list(store.module_bytes) == ["model.layers.9.mlp.experts", "model.layers.10.mlp.experts"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_token_needs_its_experts_and_all_else_but_the_table_of_embeddings(tmp_path: Path, tied: bool) -> None:
    tensors = one_layer() | {"model.embed_tokens.weight": torch.ones(9, 4), "lm_head.weight": torch.ones(9, 4)}
    store = ExpertStore(saved(tmp_path / "m", tensors))
    one_bytes, embedding_bytes, norm_bytes = 4 * 3 * 6 * 4, 4 * 9 * 4, 4 * 4
    expected = one_bytes + norm_bytes + embedding_bytes * (2 if tied else 1)
    assert store.active_bytes(top_k=1, tied_embeddings=tied) == expected


def test_experts_of_a_block_that_predicts_ahead_are_neither_paged_nor_resident(tmp_path: Path) -> None:
    """As Qwen3-Next lies on the hub: its draft block has experts in another form than the model's layers."""
    draft = {
        f"mtp.layers.0.mlp.experts.{e}.{p}_proj.weight": torch.ones(6, 4) for e in range(9) for p in ("gate", "up")
    }
    draft |= {f"mtp.layers.0.mlp.experts.{e}.down_proj.weight": torch.ones(4, 6) for e in range(9)}
    rest = {"mtp.layers.0.input_layernorm.weight": torch.ones(4), "model.norm.weight": torch.ones(4)}
    store = ExpertStore(saved(tmp_path / "m", fused(gate_up=(2, 12, 4), down=(2, 4, 6)) | draft | rest))
    assert store.num_experts == 2
    assert set(store.resident) == {*rest, "model.layers.0.mlp.experts.gate_up_proj_bias"}


def test_experts_without_a_gate_are_refused_for_what_they_are(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in one_layer().items() if "gate_proj" not in name}
    with pytest.raises(UserError, match="experts have no gate matrix; experts without a gate are not supported"):
        ExpertStore(saved(tmp_path / "m", tensors))
