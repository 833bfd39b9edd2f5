"""lm-evaluation-harness over HTTP: its `local-completions` model against the server scores as `remoe evaluate` does."""

from pathlib import Path
from typing import Any

import pytest

from evaluation.quality.scores import run_tasks
from evaluation.quality.tasks import QualityArguments
from tests.evaluation.server.running import Served
from training.model.loading import load_pretrained, load_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]  # lm_eval and datasets warn about their own insides
ITEMS = 12


def test_log_likelihood_tasks_give_the_same_scores_over_http(served: Served, chat_model: Path) -> None:
    from lm_eval import simple_evaluate  # type: ignore[import-untyped, unused-ignore]
    from lm_eval.models.openai_completions import LocalCompletionsAPI  # type: ignore[import-untyped, unused-ignore]
    from lm_eval.tasks import TaskManager  # type: ignore[import-untyped, unused-ignore]

    arguments = QualityArguments(tasks=["letters", "next_line_prose"], limit=ITEMS)
    model = load_pretrained(str(chat_model))
    expected = run_tasks(model, load_tokenizer(str(chat_model)), arguments)
    over_http = LocalCompletionsAPI(
        model=served.name, base_url=f"{served.url}/v1/completions", tokenizer=str(chat_model), tokenizer_backend="huggingface",
        num_concurrent=1, max_retries=1, max_length=512, batch_size=4,
    )  # fmt: skip
    manager = TaskManager(include_path=arguments.include_path, include_defaults=False)
    how: dict[str, Any] = {"limit": ITEMS, "bootstrap_iters": 0, "log_samples": True, "task_manager": manager}
    output = simple_evaluate(over_http, tasks=arguments.tasks, **how)
    for task in arguments.tasks:
        samples = sorted(output["samples"][task], key=lambda sample: sample["doc_id"])
        assert [sample[expected[task].metric] for sample in samples] == expected[task].values.tolist()
