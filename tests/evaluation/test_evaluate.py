"""The evaluation as a function: what is refused before anything is measured, budgets, facts of the model."""

import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from configs.load import UserError, load
from evaluation.engine.loading import load as load_paged
from evaluation.engine.options import EngineOptions
from evaluation.evaluate import EvaluationArguments, _model_facts, divide_budgets, evaluate
from evaluation.results import ModelFacts
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


def test_a_scope_of_the_replay_is_no_longer_a_choice(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("replay: {cache_scope: per_layer}", encoding="utf-8")
    with pytest.raises(UserError, match=r"cache_scope.*policies, slots"):
        load(EvaluationArguments, tmp_path / "old.yaml")


def budgets(*sizes: str) -> EvaluationArguments:
    return load(
        EvaluationArguments, ROOT / "configs/evaluation/smoke.yaml", [f"plan.memory_budgets=[{','.join(sizes)}]"]
    )


@pytest.mark.filterwarnings("ignore")  # a process that starts Python anew
def test_a_budget_that_is_too_small_is_a_finding_and_the_others_are_divided() -> None:
    (enough,), (small,) = divide_budgets(MODEL, budgets("1MiB", "smallest + 50%"))
    assert small.memory_budget == "1MiB"
    assert re.fullmatch(r"the smallest that works is \d\d(\.\d)?MiB", small.too_small)
    assert enough.memory_budget == "smallest + 50%"
    assert 4 <= enough.division.slots <= 128


def test_a_budget_that_is_no_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.evaluate.plan", lambda *_, **__: pytest.fail("something was measured"))
    with pytest.raises(UserError, match="memory budget '60 potatoes' is not understood"):
        divide_budgets(MODEL, budgets("60MiB", "60 potatoes"))


def test_facts_of_the_model_need_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.evaluate.load_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    facts = _model_facts("a name", MODEL, load(EvaluationArguments, None, []))
    model = load_pretrained(MODEL)
    with load_paged(MODEL, EngineOptions("100%")) as (_, engine):
        sizes = engine.expert_bytes, engine.token_demand_bytes
    assert facts == ModelFacts(
        name="a name", n_parameters=model.num_parameters(), layers=4, experts=32, top_k=4, expert_bytes=sizes[0],
        token_demand_bytes=sizes[1], dtype="bfloat16",
    )  # fmt: skip


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
        runs += evaluate(MODEL, {}, args).arms["base"].runs
    cpu, gpu = runs
    assert gpu.quality.mean_perplexity == pytest.approx(cpu.quality.mean_perplexity, rel=1e-4)
    assert gpu.routing.nll == pytest.approx(cpu.routing.nll, rel=1e-4)
    assert gpu.routing.reuse_rate_mean == pytest.approx(cpu.routing.reuse_rate_mean, rel=1e-3)
    assert all(row.tokens_equal_resident for row in gpu.decode)
