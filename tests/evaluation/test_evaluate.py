"""`remoe evaluate` as a function: the device it measures on."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from configs.load import UserError, load
from evaluation.evaluate import EvaluationArguments, evaluate
from tests.conftest import needs_gpu
from training.model.loading import load_pretrained

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "data" / "embedded" / "model")


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("gpu", "device 'gpu' is not known to torch; write cpu, cuda or auto"),
        ("xpu", "device is 'xpu', and torch finds no such accelerator here; write cpu"),
    ],
)
def test_a_device_that_cannot_be_had_is_refused_before_anything_is_measured(
    device: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.evaluate.plan", lambda *_, **__: pytest.fail("something was measured"))
    args = load(
        EvaluationArguments,
        ROOT / "configs" / "evaluation" / "smoke.yaml",
        [f"device={device}", "plan.memory_budgets=[50MiB]"],
    )
    with pytest.raises(UserError, match=words):
        evaluate(MODEL, {}, args)


def test_too_little_text_to_decode_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.evaluate.run_tasks", lambda *_: pytest.fail("something was measured"))
    overrides = ["decode.prompts_per_domain=100000", "plan.memory_budgets=[]"]
    args = load(EvaluationArguments, ROOT / "configs" / "evaluation" / "smoke.yaml", overrides)
    with pytest.raises(UserError, match="100000 were asked for"):
        evaluate(MODEL, {}, args)


def test_a_model_too_large_for_its_device_is_refused_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(PreTrainedModel, "to", full)
    with pytest.raises(UserError, match=r"has 0\.0 GiB of weights, which do not fit cuda:0; give cpu as device"):
        load_pretrained(MODEL, device=torch.device("cuda:0"))


@needs_gpu
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # lm_eval and datasets warn about their own insides
def test_a_gpu_measures_what_the_cpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    runs = []
    for device in ("cpu", "auto"):
        args = load(EvaluationArguments, "configs/evaluation/smoke.yaml", [f"device={device}"])
        runs += evaluate(MODEL, {}, args)["arms"]["base"]["runs"]
    cpu, gpu = runs
    assert gpu["quality"]["mean_perplexity"] == pytest.approx(cpu["quality"]["mean_perplexity"], rel=1e-4)
    assert gpu["routing"]["nll"] == pytest.approx(cpu["routing"]["nll"], rel=1e-4)
    assert gpu["routing"]["reuse_rate_mean"] == pytest.approx(cpu["routing"]["reuse_rate_mean"], rel=1e-3)
    assert all(row["tokens_equal_resident"] for row in gpu["decode"])
