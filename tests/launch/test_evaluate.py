"""`remoe evaluate` as a command: killed at any moment it goes on to the same numbers, and two processes find them too."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TIMES = ("seconds", "_ms", "output_throughput", "created", "machine_load", "load_average", "share", "command", "commit")
CONFIG = """
dtype: float32
quality: {tasks: [letters, headword, perplexity_puzzles], limit: 40}
routing: {source: tasks, requests_per_domain: 8, max_length: 96}
replay: {policies: [lru, belady], slots: [6, 12]}
decode: {prompts_per_domain: 1, prompt_tokens: 24, max_new_tokens: 6, demands: [1.0]}
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def command(folder: Path, *more: str) -> list[str]:
    (folder.parent / "own.yaml").write_text(CONFIG, "utf-8")
    given = ["--memory-budget", "smallest + 25%", "--config", str(folder.parent / "own.yaml"), "--output", str(folder)]
    return [sys.executable, "-m", "launch.cli", "evaluate", "--model", "data/embedded/model", *given, *more]


def evaluated(folder: Path, *more: str) -> dict[str, Any]:
    done = subprocess.run(command(folder, *more), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = without_times(json.loads((folder / "results.json").read_text("utf-8")))
    return found


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not any(part in k for part in TIMES)}
    return [without_times(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], float]:
    """The numbers of a run that nobody disturbed, and how long it took in seconds."""
    started = time.perf_counter()
    return evaluated(tmp_path_factory.mktemp("whole") / "run"), time.perf_counter() - started


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_numbers(
    tmp_path: Path, whole: tuple[dict[str, Any], float]
) -> None:
    expected, seconds = whole
    draw, kept = random.Random(0), 0
    for _ in range(5):
        run = subprocess.Popen(command(tmp_path / "run"), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.4, 0.9) * seconds)
        run.send_signal(signal.SIGKILL)
        run.wait()
        kept = max(kept, len(list((tmp_path / "run" / "answers").glob("*.jsonl"))))
    assert kept, "it was always killed before anything was answered: nothing was tried"
    assert evaluated(tmp_path / "run") == expected


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["fsdp2", "deepspeed_zero3"])
def test_a_model_that_no_process_holds_whole_gives_the_same(launcher: str, tmp_path: Path, moved_delta: Path) -> None:
    """The shipped launcher on two CPU processes, the base and an arm, beside one process that holds all of the model."""
    if launcher.startswith("deepspeed") and shutil.which("c++") is None:
        pytest.skip("DeepSpeed compiles its communication, and there is no C++ compiler")
    shipped = yaml.safe_load((ROOT / "configs" / "accelerate" / f"{launcher}.yaml").read_text("utf-8"))
    on_cpu = {**shipped, "num_processes": 2, "use_cpu": True, "mixed_precision": "no"}
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(on_cpu), "utf-8")
    (tmp_path / "own.yaml").write_text(CONFIG, "utf-8")
    found = []
    for name, more in {"whole": [], "sharded": ["--accelerate-config", str(tmp_path / "accelerate.yaml")]}.items():
        given = ["--config", str(tmp_path / "own.yaml"), "--output", str(tmp_path / name), *more]
        remoe = [sys.executable, "-m", "launch.cli", "evaluate", "--model", "data/embedded/model", *given]
        remoe += ["--router-delta", str(moved_delta)]
        done = subprocess.run(remoe, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(without_times(json.loads((tmp_path / name / "results.json").read_text("utf-8")))["arms"])
    whole, sharded = found
    for arm in ("base", "cache"):
        for part in ("quality", "difference", "routing", "replay"):
            assert sharded[arm]["runs"][0][part] == whole[arm]["runs"][0][part], (arm, part)
    assert whole["cache"]["runs"][0]["quality"] != whole["base"]["runs"][0]["quality"]
    assert len(list((tmp_path / "sharded" / "answers").glob("*.jsonl"))) == 1, "what all compute is written once"


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path: Path, whole: tuple[dict[str, Any], float]) -> None:
    two = evaluated(tmp_path / "run", "--accelerate-config", "configs/accelerate/cpu_2_processes.yaml")
    assert two["arms"] == whole[0]["arms"]
    sizes = [path.stat().st_size for path in sorted((tmp_path / "run" / "answers").glob("*.jsonl"))]
    assert len(sizes) == 2
    assert min(sizes) > 0.2 * max(sizes), "one of them did nearly everything"
    shutil.rmtree(tmp_path / "run")
