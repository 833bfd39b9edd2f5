"""Resident weights are those `from_pretrained` makes, down to flags and alignment; other forms are refused."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from configs.load import UserError
from evaluation.engine.device import Host
from evaluation.engine.resident import experts_modules, load_resident
from evaluation.engine.store.experts import ExpertStore
from training.model.lazy_weights import read_config

Checkpoint = Callable[..., Path]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v2"])
def test_residents_are_what_from_pretrained_makes(checkpoint: Checkpoint, family: str, dtype: str) -> None:
    folder, compute = checkpoint(family), getattr(torch, dtype)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=compute)
    model = load_resident(folder, ExpertStore(folder), config=read_config(folder), dtype=compute, device=Host())
    found, expected = dict(model.named_parameters()), dict(plain.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        assert (found[name].dtype, found[name].shape) == (parameter.dtype, parameter.shape)
        assert found[name].requires_grad == parameter.requires_grad, "matmul looks at the flag: other last bits"
        assert found[name].is_meta == (".experts." in name)
        if ".experts." not in name:
            assert torch.equal(found[name], parameter)
            assert found[name].data_ptr() % 64 == parameter.data_ptr() % 64, "alignment decides last bits"
    for (name, buffer), (_, other) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name
    assert model.config._attn_implementation == plain.config._attn_implementation


def test_a_shard_that_is_cut_later_does_not_reach_the_residents(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A mapped page beyond the end of its file ends the process with SIGBUS, so another one tries."""
    folder = shutil.copytree(checkpoint("olmoe"), tmp_path / "m")
    code = f"""
import os, torch
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
with torch.no_grad(), load({str(folder)!r}, EngineOptions("100%")) as (model, _):
    model(torch.arange(2, 250).unsqueeze(0))  # every expert is read
    before = model(torch.tensor([[5, 6]])).logits
    os.truncate({str(folder / "model.safetensors")!r}, 4096)
    assert torch.equal(model(torch.tensor([[5, 6]])).logits, before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("flag", "value"), [("is_transposed", True), ("has_gate", False), ("has_post_expert_norm", True)]
)
def test_experts_of_another_form_are_refused(checkpoint: Checkpoint, flag: str, value: bool) -> None:
    folder = checkpoint("olmoe")
    store = ExpertStore(folder)
    model = load_resident(folder, store, config=read_config(folder), dtype=torch.bfloat16, device=Host())
    setattr(model.model.layers[1].mlp.experts, flag, value)
    with pytest.raises(UserError, match=f"layers.1.mlp.experts has {flag} other than {not value}"):
        experts_modules(model, store.layer_ids, transposed=store.format.transposed)
