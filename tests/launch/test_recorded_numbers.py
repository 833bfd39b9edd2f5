"""A short run of the whole loop gives the numbers that were recorded before the code was rearranged.

On the processor they were recorded on, every bit must be the same; on another, whose matrix products round differently,
losses and counts must be close. `python tests/launch/test_recorded_numbers.py` records anew, which is right only when
something that is computed was changed on purpose.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
RECORDED = Path(__file__).parent / "recorded" / "numbers.json"
TIMES = ("seconds", "_ms", "throughput", "per_second")  # parts of names of what a clock measured
GENERATE = [
    "--model",
    "data/embedded/model",
    "--expert-cache",
    "2MiB",
    "--max-new-tokens",
    "24",
    "--cache-policy",
    "lru",
]


def remoe(*arguments: str) -> None:
    """One command of ours in a process of one thread."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Name -> number or text of everything in nested JSON, what a clock measured left out."""
    if any(part in name for part in TIMES):
        return
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(inner, f"{name}/{key}" if name else str(key))
    else:
        yield name, value


def measured(folder: Path) -> dict[str, Any]:
    """Losses, routers, quality, routing, misses and tokens of one run of the loop and of one prompt."""
    remoe("run", "tests/launch/recorded/run.yaml", f"output_dir={folder}")
    remoe("generate", *GENERATE, "--prompt", "It is a truth", "--output", str(folder / "generate.json"))
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    numbers = dict(flat(results["arms"]))
    for arm in ("remoe", "cache_miss"):
        weights = (folder / f"{arm}-seed0" / "router_delta" / "router_delta.safetensors").read_bytes()
        numbers[f"sha256 of the routers of {arm}"] = hashlib.sha256(weights).hexdigest()
    generated = json.loads((folder / "generate.json").read_text(encoding="utf-8"))
    for key in ("text", "token_ids", "accesses", "misses", "first_touches", "hit_rate", "bytes_read"):
        numbers |= dict(flat(generated[key], f"generate/{key}"))
    return numbers


def processor() -> str:
    """What decides which kernels compute: model, instructions and caches of the processor, and torch's build."""
    wanted = ("vendor_id", "cpu family", "model\t", "stepping", "cache size", "flags")
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    facts = [line for line in lines if line.startswith(wanted)] + [torch.__version__]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


@pytest.mark.slow
def test_a_short_run_of_the_whole_loop_gives_the_recorded_numbers(tmp_path: Path) -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    now = measured(tmp_path / "run")
    lacking = [name for name in recorded["numbers"] if name not in now]
    assert not lacking
    if recorded["processor"] == processor():
        assert {name: now[name] for name in recorded["numbers"]} == recorded["numbers"]
    for name, before in recorded["numbers"].items():
        if name.split("/")[-1] in ("misses", "accesses", "reuse_rate_mean", "mean_perplexity", "train/loss", "nll"):
            assert now[name] == pytest.approx(before, rel=0.02), name


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        text = json.dumps({"processor": processor(), "numbers": measured(Path(scratch) / "run")}, indent=1)
    RECORDED.write_text(text + "\n", encoding="utf-8")
