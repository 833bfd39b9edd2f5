"""The evaluation as a function: what is refused before anything is measured, budgets, facts of the model."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from configs.load import UserError, load
from evaluation.arguments import EvaluationArguments
from evaluation.engine.loading import load as load_paged
from evaluation.engine.options import EngineOptions
from evaluation.evaluate import _model_facts, divide_budgets, evaluate, trained_arm
from evaluation.measurement import Arm, Candidate
from evaluation.results import ModelFacts
from tests.conftest import needs_gpu
from training.model.loading import load_pretrained
from training.model.routers import router_parameters
from training.run_folder import router_delta

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
    monkeypatch.setattr("evaluation.measurement.run_tasks", lambda *_: pytest.fail("something was measured"))
    overrides = ["decode.prompts_per_domain=100000", "plan.memory_budgets=[]"]
    args = load(EvaluationArguments, ROOT / "configs" / "evaluation" / "smoke.yaml", overrides)
    with pytest.raises(UserError, match="100000 were asked for"):
        evaluate(MODEL, {}, args)


def test_a_tokenizer_without_chat_template_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("evaluation.evaluate.plan", lambda *_, **__: pytest.fail("something was measured"))
    args = load(
        EvaluationArguments, ROOT / "configs" / "evaluation" / "smoke.yaml", ["quality.apply_chat_template=true"]
    )
    with pytest.raises(UserError, match="has no chat template; write false"):
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
    monkeypatch.setattr("evaluation.measurement.load_pretrained", lambda *_, **__: pytest.fail("weights were read"))
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


OWN = """
quality: {include_path: data/embedded/tasks, tasks: [letters, headword], limit: 6, batch_size: 4, log_samples: true}
routing: {groups: {readme: README.md.txt}, requests_per_domain: 3, max_length: 48}
replay: {policies: [lru], slots: [6, 12]}
decode: {prompts_per_domain: 2, prompt_tokens: 16, max_new_tokens: 4, demands: [1.0], repeats: 1}
"""


@pytest.mark.filterwarnings("ignore")  # lm_eval and datasets warn about their own insides
def test_under_a_budget_everything_is_paged_and_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "readme.txt").write_text((ROOT / "README.md").read_text("utf-8"), "utf-8")
    (tmp_path / "own.yaml").write_text(OWN.replace("README.md.txt", f"{tmp_path}/readme.txt"), "utf-8")
    routers = {name: weight + 0.05 for name, weight in router_parameters(load_pretrained(MODEL)).items()}
    arms = [("mine", Arm("remoe", {}, [Candidate(routers, 0, [])]))]
    resident = evaluate(MODEL, arms, load(EvaluationArguments, tmp_path / "own.yaml"), output=tmp_path / "out")
    monkeypatch.setattr(
        "evaluation.measurement.load_pretrained", lambda *_, **__: pytest.fail("it was held as a whole")
    )
    monkeypatch.setattr("evaluation.decode.load_pretrained", lambda *_, **__: pytest.fail("it was held as a whole"))
    budget = ["memory_budget=smallest + 25%", "decode.memory_budgets=[smallest + 10%, smallest + 25%]"]
    paged = evaluate(MODEL, arms, load(EvaluationArguments, tmp_path / "own.yaml", budget))
    for name in ("base", "mine"):
        (before,), (after,) = resident.arms[name].runs, paged.arms[name].runs
        assert after.quality == before.quality
        assert after.difference == before.difference
        assert after.routing == before.routing
        assert set(after.routing.groups) == set(after.decode[0].groups) == {"readme"}
        assert after.replay == before.replay
        assert [row.memory_budget for row in after.decode] == ["smallest + 10%", "smallest + 25%"]
        assert all(row.tokens_equal_resident is None for row in after.decode)
        small, large = after.decode
        assert small.bytes_read_per_token > large.bytes_read_per_token
        assert before.decode[0].tokens_equal_resident
        assert small.n_tokens == before.decode[0].n_tokens
    lever = load(EvaluationArguments, tmp_path / "own.yaml", [*budget[:1], "lever=prior:delta=0.3"])
    levered = evaluate(MODEL, [], lever)
    (row,), (exact,) = levered.arms["base"].runs[0].decode, resident.arms["base"].runs[0].decode
    assert levered.lever == row.lever == "prior:delta=0.3"
    assert (resident.lever, exact.lever) == (None, None)
    assert levered.arms["base"].runs[0].routing == resident.arms["base"].runs[0].routing, "texts are prompts"
    (base,), (mine,) = paged.arms["base"].runs, paged.arms["mine"].runs
    assert mine.routing != base.routing
    # no task measures a perplexity, so that of the text whose routing is traced is taken
    assert base.quality.mean_perplexity == pytest.approx(math.exp(base.routing.nll))
    relative = mine.difference.perplexity["readme"].relative
    assert relative == pytest.approx(math.exp(mine.routing.nll - base.routing.nll) - 1)
    for arm in ("base", "mine/seed-0"):
        lines = (tmp_path / "out" / "samples" / arm / "headword.jsonl").read_text("utf-8").splitlines()
        assert len(lines) == 6
        task = resident.arms[arm.split("/")[0]].runs[0].quality.tasks["headword"]
        assert task.value == pytest.approx(sum(json.loads(line)[task.metric] for line in lines) / 6)


def test_a_delta_that_was_trained_before_a_setting_existed_is_an_arm_all_the_same(tmp_path: Path) -> None:
    routers = {name: weight.detach() for name, weight in router_parameters(load_pretrained(MODEL)).items()}
    about = {"objective": "cache_miss", "config": {"seed": 3, "miss_coef": 0.25}}
    digest = router_delta.checkpoint_sha256(MODEL, routers)
    router_delta.save(tmp_path / "delta", routers, base_model=MODEL, base_sha256=digest, about=about)
    arm = trained_arm(MODEL, [tmp_path / "delta"])
    assert (arm.objective, arm.candidates[0].seed) == ("cache_miss", 3)
    assert arm.coefficients["miss_coef"] == 0.25
    assert arm.coefficients["lever_delta"] is None


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("memory_budget=60 potatoes", "memory budget '60 potatoes' is not understood"),
        ("decode.memory_budgets=[60 potatoes]", "memory budget '60 potatoes' is not understood"),
        ("lever=prior:delta=0.1", "looks at what is in the cache: write memory_budget or expert_cache too"),
        ("routing.source=internet", "source is 'internet'; write one of corpus, tasks"),
        ("routing.groups={mine: 3}", "group mine is 3"),
    ],
)
def test_settings_that_cannot_be_are_refused_as_they_are_read(key: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(EvaluationArguments, None, [key])
    with pytest.raises(UserError, match="exactly one of expert_cache"):
        load(EvaluationArguments, None, ["memory_budget=1GiB", "expert_cache=1MiB"])
