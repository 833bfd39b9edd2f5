"""A model three times the memory limit trains its routers with experts on disk, and through the NVMe configuration."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from evaluation.benchmark.memory_group import MemoryGroup, find_hierarchy
from tests.conftest import SMALL, byte_tokenizer
from tests.training.test_processes import with_nvme

ROOT = Path(__file__).parents[3]
LIMIT_BYTES = 1280 << 20
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 layers of 32 experts, more than three times the limit."""
    config = Qwen2MoeConfig(
        # no padding token: its embedding would be zero, and gradients of norms explode there
        **{**SMALL, "hidden_size": 256, "num_hidden_layers": 48, "initializer_range": 0.05, "pad_token_id": None},
        num_experts=32, num_experts_per_tok=4, moe_intermediate_size=864, shared_expert_intermediate_size=64,
        intermediate_size=64, norm_topk_prob=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert sum(p.nbytes for p in model.parameters()) > 3 * LIMIT_BYTES
    folder = tmp_path_factory.mktemp("large_model")
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_model_three_times_the_memory_limit_trains_as_in_memory(
    large_model: Path, train_values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    hierarchy = find_hierarchy()
    if hierarchy is None:
        pytest.skip("no memory controller in which this user may make groups")
    if not Path("/usr/include/libaio.h").exists():
        pytest.skip("offload to disk needs libaio's headers; on Debian: apt-get install libaio-dev")
    values = {**train_values(model_name_or_path=str(large_model)), "objective": "remoe", "max_steps": 3}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    shipped = yaml.safe_load((ROOT / "configs/accelerate/deepspeed_zero3_nvme.yaml").read_text(encoding="utf-8"))
    on_cpu = with_nvme({**shipped, "num_processes": 1, "use_cpu": True}, tmp_path)
    (tmp_path / "nvme.yaml").write_text(yaml.safe_dump(on_cpu), encoding="utf-8")
    train = [sys.executable, "-m", "training.train", str(tmp_path / "config.yaml")]
    tiny = [f"model_name_or_path={train_values()['model_name_or_path']}", f"output_dir={tmp_path / 'tiny'}"]
    nvme = ["--accelerate-config", str(tmp_path / "nvme.yaml")]
    subprocess.run([*train, *tiny, *nvme], cwd=ROOT, check=True)  # what DeepSpeed compiles needs more than the limit
    resident, on_disk, offloaded = (f"output_dir={tmp_path / name}" for name in ("resident", "on_disk", "offloaded"))

    subprocess.run([*train, resident], cwd=ROOT, check=True)
    with MemoryGroup(hierarchy, LIMIT_BYTES) as group:
        refused = subprocess.run(
            group.command([*train, offloaded]), cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert refused.returncode == 2
        assert "write experts_on_disk=true" in refused.stderr
        mapped = subprocess.run(
            group.command([*train, on_disk, "experts_on_disk=true"]),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert mapped.returncode == 0, mapped.stderr[-3000:]
        done = subprocess.run(
            group.command([*train, offloaded, *nvme]), cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert not group.was_killed

    for run in (mapped, done):
        assert "GiB on disk (activations come on top)" in run.stdout
    assert steps(tmp_path / "on_disk") == steps(tmp_path / "resident")
    for expected, found in zip(steps(tmp_path / "resident"), steps(tmp_path / "offloaded"), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    ours, theirs = (routers(tmp_path / run) for run in ("resident", "offloaded"))
    for name, tensor in ours.items():
        # steps are of 0.01, whatever a gradient's size: one that is nearly 0 shows how sums were rounded
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-4)
    assert not list((tmp_path / "nvme").iterdir()), "the experts' copy is removed"


def test_a_model_that_does_not_fit_twice_still_loads(
    large_model: Path, train_values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """From a checkpoint in bfloat16, as hubs hold them, to the float32 that it is trained in."""
    hierarchy = find_hierarchy()
    if hierarchy is None:
        pytest.skip("no memory controller in which this user may make groups")
    half = AutoModelForCausalLM.from_pretrained(large_model, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half", max_shard_size="500MB")
    byte_tokenizer().save_pretrained(tmp_path / "half")
    float32_bytes = 4 * sum(p.numel() for p in half.parameters())
    del half
    values = {**train_values(model_name_or_path=str(tmp_path / "half")), "objective": "ce_only", "max_steps": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    with MemoryGroup(hierarchy, int(1.4 * float32_bytes)) as group:
        train = [sys.executable, "-m", "training.train", str(tmp_path / "config.yaml")]
        done = subprocess.run(group.command(train), cwd=ROOT, capture_output=True, text=True, check=False)
        assert not group.was_killed
        assert done.returncode == 0, done.stderr[-3000:]


def steps(run_dir: Path) -> list[dict[str, float]]:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def routers(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "router_delta" / "router_delta.safetensors")
