"""Our trainer beside transformers': the same rows and losses, and figures that follow from what was measured."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from configs.load import UserError
from evaluation.benchmark.sides.training_side import READY, Measured
from evaluation.benchmark.training import EXPLAINING, TrainingBenchmark, benchmark, compare, loaded, table, take_step


def measured(seconds: float, peak: int) -> Measured:
    return Measured(
        step_seconds=[9.0, seconds, seconds], losses=[5.0, 4.0, 4.0], tokens_per_step=100, weights_bytes=800, model_bytes=1000,
        peak_bytes=peak, forward_flop_per_step=200, matrix_flop_per_second=4000.0, attn_implementation="sdpa",
    )  # fmt: skip


def test_ours_is_compared_with_the_fastest_stock_side_of_the_same_repeat() -> None:
    result = compare(
        {
            "remoe": [measured(1.0, 300), measured(2.0, 300)],
            "eager": [measured(4.0, 100), measured(8.0, 100)],
            "grouped_mm": [measured(1.5, 500), measured(3.0, 600)],
        }
    )
    assert result["fastest_stock"] == "grouped_mm"
    assert result["speed_ratio"] == {"median": 1.5, "each": [1.5, 1.5]}
    assert result["memory_ratio"]["each"] == [0.6, 0.5]
    ours = result["sides"]["remoe"]
    assert ours["step_seconds"] == 1.5, "the first step warms up"
    assert ours["tokens_per_second"] == pytest.approx(100 / 1.5)
    assert ours["bound_share"] == pytest.approx((0.1 / 1.0 + 0.1 / 2.0) / 2), "2 x 200 / 4000 seconds"
    assert "grouped_mm: 1.50 x" in str(table(result).caption)


def test_further_sides_are_compared_with_stock_too_and_are_none() -> None:
    runs = {
        side: [measured(seconds, 100)]
        for side, seconds in zip(("remoe", *EXPLAINING, "eager"), (3, 1, 1, 1, 2), strict=True)
    }
    result = compare(runs)
    assert result["fastest_stock"] == "eager"
    assert [row["speed_ratio"]["median"] for row in result["sides"].values()] == pytest.approx([2 / 3, 2, 2, 2, 1])
    shown = list(table(result).columns[0].cells)
    assert shown == ["remoe", "remoe, cross entropy alone", "remoe, transformers' grouped_mm experts",
                     "Trainer, our experts", "Trainer, eager"]  # fmt: skip


def test_quantised_experts_are_compared_with_ours_as_well() -> None:
    assert TrainingBenchmark(config="x.yaml", sides="all,mxfp4,ce_only").further_sides == [*EXPLAINING, "mxfp4"]
    runs = {"remoe": [measured(1.0, 100)], "mxfp4": [measured(1.25, 100)], "eager": [measured(2.0, 100)]}
    runs["mxfp4"][0].weights_bytes = 200
    result = compare(runs)
    assert result["quantised"]["mxfp4"]["speed_ratio"] == {"median": 0.8, "each": [0.8]}
    assert result["quantised"]["mxfp4"]["weights_ratio"] == 0.25
    caption = str(table(result).caption)
    assert (
        "remoe, experts in mxfp4 / remoe: 0.80 x (0.80 to 0.80) the tokens per second, 0.250 x the weights" in caption
    )


def test_steps_of_the_same_turn_are_compared() -> None:
    ours, theirs = measured(1.0, 1), measured(1.0, 1)
    ours.step_seconds, theirs.step_seconds = [9.0, 1.0, 4.0, 4.0], [9.0, 2.0, 4.0, 8.0]
    assert compare({"remoe": [ours], "eager": [theirs]})["speed_ratio"]["each"] == [2.0], "of the medians: 1"


def test_unknown_sides_and_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="--stock 'deepspeed' is not known; write some of grouped_mm,batched_mm,eager"):
        TrainingBenchmark(config="x.yaml", stock="deepspeed")
    with pytest.raises(UserError, match="--stock '' is not known; write some of grouped_mm,batched_mm,eager"):
        TrainingBenchmark(config="x.yaml", stock="")
    with pytest.raises(
        UserError,
        match="--sides 'x' is not known; write some of ce_only,stock_experts,our_experts,mxfp4,fp8,int4,int8,all",
    ):
        TrainingBenchmark(config="x.yaml", sides="x")
    with pytest.raises(UserError, match="--profile writes into the output"):
        TrainingBenchmark(config="x.yaml", profile=True)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda: torch finds no CUDA device"):
            benchmark(TrainingBenchmark(config="x.yaml", device="cuda"))
    with pytest.raises(UserError, match="--steps is 0; write at least 1"):
        TrainingBenchmark(config="x.yaml", steps=0)


def test_a_side_that_ends_before_its_last_step_is_named(
    train_args: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ends_early = tmp_path / "python"
    ends_early.write_text(f"#!/bin/sh\necho {READY}\nread line\n", encoding="utf-8")
    ends_early.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(ends_early))
    with (
        loaded("eager", train_args(max_steps=2), threads=1) as child,
        pytest.raises(UserError, match="side eager ended with exit code 0: nothing on standard error"),
    ):
        take_step("eager", child)


@pytest.mark.slow
def test_both_sides_see_the_same_rows_and_train_the_same_routers(
    train_values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    values = train_values(gradient_accumulation_steps=2)
    overrides = [f"{key}={str(value).replace(' ', '')}" for key, value in values.items() if key != "max_steps"]
    config = tmp_path / "c.yaml"
    config.write_text("objective: ce_only\n", encoding="utf-8")
    output = str(tmp_path / "o.json")
    beside: dict[str, Any] = {"sides": "our_experts,stock_experts,int8", "device": "cpu", "profile": True}
    how = {"repeats": 1, "steps": 3, "threads": 1, "output": output, **beside}
    benchmark(TrainingBenchmark(config=str(config), overrides=overrides, **how))
    result = json.loads((tmp_path / "o.json").read_text(encoding="utf-8"))
    (rounded,) = result["runs"].pop("int8")
    ours, *others = (runs[0] for runs in result["runs"].values())
    assert len(others) == 4
    assert rounded["losses"] != ours["losses"]
    assert rounded["losses"] == pytest.approx(ours["losses"], abs=0.02)
    assert rounded["weights_bytes"] < ours["weights_bytes"] == others[0]["weights_bytes"]
    assert "Self CPU" in ours["profile"]
    for theirs in others:
        assert theirs["losses"] == pytest.approx(ours["losses"], abs=2e-4), "Trainer rounds what it logs to 4 digits"
        assert theirs["tokens_per_step"] == ours["tokens_per_step"] == 2 * 2 * 24
    assert ours["losses"][-1] < ours["losses"][0]
    assert all(side["peak_bytes"] > 0 for side in (ours, *others))
    assert ours["forward_flop_per_step"] == others[0]["forward_flop_per_step"]
    attention = {name: runs[0]["attn_implementation"] for name, runs in result["runs"].items()}
    assert {name for name in attention if attention[name] == "remoe_packed"} == {"remoe", "stock_experts"}
    assert set(attention.values()) == {"remoe_packed", "sdpa"}


@pytest.mark.slow
def test_a_checkpoint_in_bfloat16_is_trained_by_both(
    train_values: Callable[..., dict[str, Any]], model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """Its routers are float32, the rest is not: every product needs autocast."""
    AutoModelForCausalLM.from_pretrained(model_dir(), dtype="bfloat16").save_pretrained(tmp_path / "model")
    shutil.copy(model_dir() / "tokenizer.json", tmp_path / "model")
    shutil.copy(model_dir() / "tokenizer_config.json", tmp_path / "model")
    values = train_values(model_name_or_path=str(tmp_path / "model"), bf16="true")
    overrides = [f"{key}={str(value).replace(' ', '')}" for key, value in values.items() if key != "max_steps"]
    (tmp_path / "c.yaml").write_text("objective: ce_only\n", encoding="utf-8")
    short = {"stock": "grouped_mm", "repeats": 1, "steps": 1, "threads": 1, "output": str(tmp_path / "o.json")}
    benchmark(TrainingBenchmark(config=str(tmp_path / "c.yaml"), overrides=overrides, **short))
    ours, theirs = (runs[0] for runs in json.loads((tmp_path / "o.json").read_text(encoding="utf-8"))["runs"].values())
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=0.02)


@pytest.mark.slow
def test_a_side_that_fails_says_why(train_values: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("objective: ce_only\n", encoding="utf-8")
    overrides = ["model_name_or_path=./nowhere", f"output_dir={tmp_path}/run"]
    with pytest.raises(
        UserError, match=r"side remoe ended with exit code 2: \./nowhere does not exist; give the folder"
    ):
        benchmark(TrainingBenchmark(config=str(config), overrides=overrides, repeats=1, steps=1))
