"""`remoe frontier` as a command: processes that share the passes find what one finds."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.command import run
from launch import frontier

ROOT = Path(__file__).parents[2]
TWO_PROCESSES = ["--accelerate-config", "configs/accelerate/cpu_2_processes.yaml"]
SMALL = """
model: data/embedded/model
dtype: float32
levers: ["prior:delta=0.04"]
per_layer: [prior]
per_layer_deltas: [0.08]
policies: [decayed]
texts_per_domain: 2
max_length: 24
gates: [0.01, 1]
priced_at: [1]
new_tokens: 4
with_tasks: true
quality: {tasks: [letters, headword], include_path: data/embedded/tasks, offline: true, limit: 8}
"""


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path: Path, moved_delta: Path) -> None:
    (tmp_path / "own.yaml").write_text(SMALL, "utf-8")
    found: list[dict[str, Any]] = []
    for name, more in {"one": [], "two": TWO_PROCESSES}.items():
        given = [str(tmp_path / "own.yaml"), f"output_dir={tmp_path / name}", f"arms.moved={moved_delta}", *more]
        remoe = [sys.executable, "-m", "launch.cli", "frontier", *given]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(remoe, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("All points and the page") == 1
        assert "prior in" in done.stdout
        assert "…" not in done.stdout, "something in the table was cut short"
        found.append(json.loads((tmp_path / name / "frontier.json").read_text("utf-8")))
    one, two = found
    assert len(one["points"]) >= 6
    assert one["prices"][0]["tasks"]
    for part in ("points", "chosen", "pareto", "prices"):
        assert two[part] == one[part], part
    lines = [path.read_text("utf-8").count("\n[") for path in sorted((tmp_path / "two" / "answers").glob("*.jsonl"))]
    assert len(lines) == 2
    assert min(lines) > 0.5 * max(lines), "one of them did nearly everything"


def test_a_launcher_that_shards_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert run(frontier.main, ["configs/frontier/demo.yaml", f"output_dir={tmp_path / 'own'}"]) != 0
    assert "without FSDP and DeepSpeed" in capsys.readouterr().err
    assert not (tmp_path / "own" / "config.yaml").exists()
