"""Several processes beside one: same rows in every step, and mistakes end with their message."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.load import UserError
from evaluation.benchmark import scaling as bench_scaling
from evaluation.benchmark.scaling import ScalingBenchmark, benchmark

Values = Callable[..., dict[str, Any]]


@pytest.fixture
def config(train_values: Values, tmp_path: Path) -> str:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(train_values(per_device_train_batch_size=4)), encoding="utf-8")
    return str(tmp_path / "c.yaml")


def test_sides_take_turns_on_the_same_rows_and_the_median_ratio_is_told(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The processes are made up: one is as fast as 100 tokens a second, two are 1.5, 1.9 and 1.7 times that."""
    asked = []

    class MadeUp:
        last_words = ""

        def __init__(self, module: str, path: str, *launcher: str, environment: dict[str, str]) -> None:
            assert (module, environment) == ("training.train", {"OMP_NUM_THREADS": "1"})
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            if launcher:
                assert launcher[0] == "--accelerate-config"
                assert json.loads(Path(launcher[1]).read_text(encoding="utf-8"))["num_processes"] == 2
            asked.append((1 + bool(launcher), values["per_device_train_batch_size"]))
            speed = [150, 190, 170][sum(n == 2 for n, _ in asked) - 1] if launcher else 100
            lines = [{"time/tokens_per_second": 1}] * bench_scaling.WARM_UP + [{"time/tokens_per_second": speed}] * 3
            Path(values["output_dir"]).mkdir()
            (Path(values["output_dir"]) / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))

        def __enter__(self) -> "MadeUp":
            return self

        def __exit__(self, *_: object) -> None: ...

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(bench_scaling, "Child", MadeUp)
    benchmark(ScalingBenchmark(config=config, repeats=3, steps=8))
    assert asked == [(1, 4), (2, 2), (2, 2), (1, 4), (1, 4), (2, 2)]
    assert "2 processes / 1: 1.70 x (1.50 to 1.90)" in capsys.readouterr().out


def test_a_batch_that_cannot_be_shared_out_is_refused(config: str) -> None:
    with pytest.raises(UserError, match="=4 is that of the one process and must be a multiple of --processes 3"):
        benchmark(ScalingBenchmark(config=config, processes=3))
    with pytest.raises(UserError, match="--steps is 5; write at least 6"):
        ScalingBenchmark(config=config, steps=5)


def test_a_run_that_fails_says_why(config: str) -> None:
    with pytest.raises(UserError, match=r"1 processes ended with exit code 2: \./nowhere does not exist"):
        benchmark(ScalingBenchmark(config=config, overrides=["model_name_or_path=./nowhere"], repeats=1))
