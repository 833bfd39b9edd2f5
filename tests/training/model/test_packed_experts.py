"""Experts that stay quantised while routers train: losses and gradients of the decoded model, bit for bit, in less memory."""

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from configs.load import UserError
from evaluation.export.quantised_folder import write_quantised
from training.model import frozen_experts, packed_attention
from training.model.layerwise_checkpoint import LayerwiseCheckpoint
from training.model.lazy_weights import decoder_layers
from training.model.loading import ModelArguments, build_model, load_pretrained, weights_dtype
from training.model.number_formats.fp8 import Fp8
from training.model.number_formats.packed_int import PackedInt
from training.model.packed_experts import PackedMatrices, count_parameters, load_packed, packed_layout, packed_matrices
from training.model.routers import router_parameters
from training.run_folder.proof import tensor_sha256

Checkpoint = Callable[..., Path]
CASES = [
    ("gpt_oss_blocks", "mxfp4"),
    ("qwen3_moe_blocks", "mxfp4"),
    ("qwen3_moe_blocks", "fp8"),
    ("qwen3_moe_blocks", "int4"),
    ("deepseek_v3_blocks", "int8"),
]

PLAIN = ["olmoe", "qwen3_moe", "gpt_oss", "granitemoe", "deepseek_v2"]


@pytest.fixture
def one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are worked on one after the other, so that slices of them are decoded."""
    monkeypatch.setattr(frozen_experts, "PART_ROWS", 1)


def trained_like(model: PreTrainedModel) -> PreTrainedModel:
    """The decoded model, as `build_model` would have it."""
    model.requires_grad_(False)
    frozen_experts.register()
    model.set_experts_implementation(frozen_experts.IMPLEMENTATION)
    if model.config._attn_implementation == "sdpa":
        packed_attention.register()
        model.set_attn_implementation(packed_attention.IMPLEMENTATION)
    for parameter in router_parameters(model).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return model.eval()


def loss_and_gradients(model: PreTrainedModel, *, bf16: bool) -> list[Tensor]:
    ids = torch.randint(2, 258, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = [parameter.grad for parameter in router_parameters(model).values()]
    assert all(gradient is not None and gradient.any() for gradient in gradients)
    return [loss.detach(), *gradients]  # type: ignore[list-item]


@pytest.mark.usefixtures("one_part")
@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_losses_and_gradients_are_those_of_the_decoded_model(
    checkpoint: Checkpoint, tmp_path: Path, family: str, kind: str, bf16: bool
) -> None:
    write_quantised(checkpoint(family), tmp_path / "q", kind)
    args = ModelArguments(str(tmp_path / "q"), bf16=bf16)
    expected = loss_and_gradients(
        trained_like(load_pretrained(str(tmp_path / "q"), dtype=weights_dtype(args))), bf16=bf16
    )
    for asked in (
        args,
        ModelArguments(str(checkpoint(family)), bf16=bf16, experts=kind),
    ):  # as stored, and rounded on loading
        model = build_model(asked, seed=0)
        assert sum(len(packed_matrices(module)) for module in model.modules()) == 4
        found = loss_and_gradients(model, bf16=bf16)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.usefixtures("one_part")
@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize(("family", "kind"), [*((family, None) for family in PLAIN), *CASES[:2]])
def test_experts_on_disk_are_the_same_and_in_no_memory(
    checkpoint: Checkpoint, tmp_path: Path, family: str, kind: str | None, bf16: bool
) -> None:
    args = ModelArguments(str(checkpoint(family)), bf16=bf16, experts=kind)
    expected = loss_and_gradients(build_model(args, seed=0), bf16=bf16)
    model = build_model(replace(args, experts_on_disk=True), seed=0, disk=tmp_path / "run")
    packed = [each for module in model.modules() for each in packed_matrices(module)]
    assert len(packed) >= 2
    in_files = [
        range(*(int(end, 16) for end in line.split()[0].split("-")))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(tmp_path / "run") in line
    ]
    assert all(any(each.packed.data_ptr() in one for one in in_files) for each in packed)
    assert not any((tmp_path / "run").iterdir()), "nothing is left, however the process ends"
    found = loss_and_gradients(model, bf16=bf16)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_experts_on_disk_that_have_no_place_are_refused(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"experts_on_disk=true: .*; write trainable=routers"):
        ModelArguments("x", experts_on_disk=True, trainable="all")
    args = ModelArguments(str(checkpoint("olmoe")), experts_on_disk=True)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"KiB of weights cannot be written into .*run \(No space left.*another disk"):
        build_model(args, seed=0, disk=tmp_path / "run")


def test_packed_experts_take_the_memory_of_what_is_stored(checkpoint: Checkpoint) -> None:
    folder = str(checkpoint("qwen3_moe_blocks"))
    plain, packed = (build_model(ModelArguments(folder, bf16=True, experts=kind), seed=0) for kind in (None, "mxfp4"))
    sizes = [
        sum(parameter.nbytes for name, parameter in model.named_parameters() if ".experts." in name)
        for model in (plain, packed)
    ]
    assert sizes[1] / sizes[0] == 4.25 / 16
    assert count_parameters(packed) == count_parameters(plain) == plain.num_parameters()
    matrices = packed.model.layers[1].mlp.experts.down_proj
    some = matrices[2:5].clone()
    assert torch.equal(some, matrices[:][2:5])
    assert matrices[2:5].shape == (3, *plain.model.layers[1].mlp.experts.down_proj.shape[1:])


def test_by_torch_as_on_an_accelerator(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers by the other way, which no accelerator is needed to try."""
    for family, kind in CASES[:4]:
        folder = str(checkpoint(family))
        matrices: Any = build_model(ModelArguments(folder, bf16=True, experts=kind), seed=0).model.layers[1].mlp.experts
        for packed in (matrices.gate_up_proj, matrices.down_proj):
            expected = packed[1:4].clone()
            with monkeypatch.context() as patched:
                patched.setattr(PackedMatrices, "by_loops", lambda *_: False)
                assert torch.equal(packed[1:4], expected)


def test_what_cannot_be_rounded_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="experts='int3': write mxfp4, fp8, int4, int8, or null"):
        ModelArguments("x", experts="int3")
    with pytest.raises(ValueError, match="experts that train cannot be rounded"):
        ModelArguments("x", experts="int4", trainable="all")
    with pytest.raises(UserError, match="no standard layout for int4"):
        build_model(ModelArguments(str(checkpoint("gpt_oss_blocks")), experts="int4"), seed=0)
    write_quantised(checkpoint("qwen3_moe_blocks"), tmp_path / "q", "fp8")
    with pytest.raises(UserError, match="the experts are FP8 already"):
        build_model(ModelArguments(str(tmp_path / "q"), experts="int4"), seed=0)
    assert packed_layout(str(checkpoint("olmoe")), None) is None


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_loaded_layer_by_layer_it_is_the_same_model(
    checkpoint: Checkpoint, tmp_path: Path, family: str, kind: str, bf16: bool
) -> None:
    """What is sharded: bytes of experts, and all else decoded, layer by layer."""
    write_quantised(checkpoint(family), tmp_path / "q", kind)
    for asked in (
        ModelArguments(str(tmp_path / "q"), bf16=bf16),
        ModelArguments(str(checkpoint(family)), bf16=bf16, experts=kind),
    ):
        folder = str(asked.model_name_or_path)
        weights = LayerwiseCheckpoint(folder, dtype=weights_dtype(asked), experts=asked.experts)
        model, whole = build_model(asked, seed=0, weights=weights), build_model(asked, seed=0)
        assert count_parameters(model) == count_parameters(whole)
        for layer in decoder_layers(model):
            weights.fill(model, layer)
        assert_same_tensors(model, whole)
        for found, expected in zip(*(loss_and_gradients(each, bf16=bf16) for each in (model, whole)), strict=True):
            assert torch.equal(found, expected)


def assert_same_tensors(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert tensor_sha256(found.state_dict()[name]) == tensor_sha256(tensor), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "numbers", [Fp8("_scale_inv", "F32", (32, 32)), PackedInt(4, 32, "BF16"), PackedInt(8, 32, "BF16")]
)
def test_other_matrices_that_are_quantised_are_decoded_as_by_transformers(
    checkpoint: Checkpoint, tmp_path: Path, numbers: Any, dtype: torch.dtype
) -> None:
    """Attention in the format of the experts, as DeepSeek-V3, Qwen3's FP8 checkpoints and most of compressed-tensors have it."""
    folder = tmp_path / "q"
    write_quantised(checkpoint("qwen3_moe_blocks"), folder, "fp8" if isinstance(numbers, Fp8) else f"int{numbers.bits}")
    quantise_attention(folder, numbers)
    weights = LayerwiseCheckpoint(str(folder), dtype=dtype)
    model = weights.skeleton()
    for layer in decoder_layers(model):
        weights.fill(model, layer)
    assert not model.model.layers[0].self_attn.q_proj.weight.is_meta
    assert_same_tensors(model, load_packed(str(folder), *packed_layout(str(folder), None), dtype=dtype))  # type: ignore[misc]


def quantise_attention(folder: Path, numbers: Any) -> None:
    tensors, changed = load_file(folder / "model.safetensors"), ("q_proj", "o_proj")
    for name in [name for name in tensors if name.endswith(tuple(f"{part}.weight" for part in changed))]:
        matrix = tensors.pop(name)
        tensors |= {name + ending: part.contiguous() for ending, part in numbers.encode(matrix).items()}
        if isinstance(numbers, PackedInt):
            tensors[f"{name}_shape"] = torch.tensor(matrix.shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    left_out = config["quantization_config"]["modules_to_not_convert" if isinstance(numbers, Fp8) else "ignore"]
    left_out[:] = [name for name in left_out if not name.endswith(changed)]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", torch.float16])
def test_a_quantised_model_is_in_the_precision_that_is_asked_for(
    checkpoint: Checkpoint, tmp_path: Path, dtype: str | torch.dtype
) -> None:
    """transformers (5.23) leaves what is not quantised as stored, and cannot compute then."""
    write_quantised(checkpoint("qwen3_moe_blocks"), tmp_path / "q", "fp8")
    model = load_pretrained(str(tmp_path / "q"), dtype=dtype)
    assert {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()} == {
        str(dtype).removeprefix("torch.")
    }
    assert model(input_ids=torch.arange(5)[None]).logits.isfinite().all()
