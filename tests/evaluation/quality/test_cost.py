"""What asking will cost is what it then does cost: requests and tokens as counted, reads and new tokens at most."""

from pathlib import Path

import pytest

from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from evaluation.quality.cost import costs
from evaluation.quality.scores import run_tasks
from evaluation.quality.tasks import QualityArguments, load_tasks
from training.model.loading import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # lm_eval and datasets warn about their own insides
ROOT = Path(__file__).parents[3]
MODEL = str(ROOT / "data" / "embedded" / "model")


@pytest.mark.parametrize("task", ["letters", "headword", "perplexity_prose"])
def test_nothing_costs_more_than_was_said(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    args, tokenizer = QualityArguments(tasks=[task], limit=10), load_tokenizer(MODEL)
    tasks = load_tasks(args)
    with load(MODEL, EngineOptions("2MiB", warn=False)) as (model, engine):
        (cost,) = costs(tasks, args, tokenizer, engine)
        engine.reset_stats()
        run_tasks(model, tokenizer, args, tasks=tasks, engine=engine)
        stats = engine.stats()
    assert cost.requests == len(tasks.tasks[task].instances)
    assert cost.read_bytes is not None
    assert 0.1 * cost.read_bytes < stats.bytes_read <= cost.read_bytes
    assert cost.new_tokens == {"letters": 12 * 10}.get(task, 0)
    assert stats.tokens["prefill"] <= 2.2 * cost.prompt_tokens, "padding and a first token beside what was counted"
    assert costs(tasks, args, tokenizer, None)[0].read_bytes is None


def test_a_large_task_is_counted_by_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    args, tokenizer = QualityArguments(tasks=["headword"]), load_tokenizer(MODEL)
    tasks = load_tasks(args)
    (sampled,) = costs(tasks, args, tokenizer, None)
    monkeypatch.setattr("evaluation.quality.cost.SAMPLED", 10**6)
    (whole,) = costs(tasks, args, tokenizer, None)
    assert sampled.requests == whole.requests > 2000
    assert sampled.prompt_tokens == pytest.approx(whole.prompt_tokens, rel=0.1)
