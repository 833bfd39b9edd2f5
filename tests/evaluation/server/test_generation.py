"""A job through the model: cancelled between layers, unseeded ones draw anew, the model's own defaults hold."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from evaluation.engine.engine import Engine
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from evaluation.engine.sessions.conversations import Conversations
from evaluation.server.generation import Generator
from evaluation.server.metrics import Metrics
from evaluation.server.work import Cancelled, Delta, Job, Work


@contextmanager
def generator(folder: Path) -> Iterator[tuple[Generator, PreTrainedModel, Engine]]:
    with load(folder, EngineOptions("100%")) as (model, engine):
        yield Generator(model, engine, AutoTokenizer.from_pretrained(folder), Metrics(engine)), model, engine


def run(made: Generator, **work: Any) -> str:
    events: list[Any] = []
    made.run(Job(Work([[9, 8, 7]], [12], **work), events.append))
    return "".join(event.text for event in events if isinstance(event, Delta))


class CancelledAfter(Job):
    """Found cancelled when it is asked for the `checks`-th time."""

    def __init__(self, checks: int) -> None:
        super().__init__(Work([[9, 8, 7]], [12], temperature=0), lambda _: None)
        self._checks = checks

    @property
    def is_cancelled(self) -> bool:
        self._checks -= 1
        return self._checks <= 0


def test_a_prompt_is_broken_off_between_layers(model_dir: Callable[[str], Path]) -> None:
    with generator(model_dir("olmoe")) as (made, model, engine):
        with pytest.raises(Cancelled):
            made.run(CancelledAfter(2))
        misses = engine.stats().misses_by_layer
        assert misses[0] > 0
        assert misses[1] == 0
        assert run(made, temperature=0), "the next is served"
        model.generate(torch.tensor([[1]]), max_new_tokens=1, do_sample=False)  # nothing of a job is left in the model


def test_the_memory_controller_hears_of_broken_off_requests_too(model_dir: Callable[[str], Path]) -> None:
    class Controller:
        heard = 0

        def request_done(self) -> None:
            self.heard += 1

    with generator(model_dir("olmoe")) as (made, _, _):
        made.controller = controller = Controller()  # type: ignore[assignment]
        with pytest.raises(Cancelled):
            made.run(CancelledAfter(2))
        assert controller.heard == 1, "or what it records would never be forgotten"
        run(made, temperature=0)
        assert controller.heard == 2


def test_what_is_not_said_is_as_the_model_says(model_dir: Callable[[str], Path]) -> None:
    with generator(model_dir("olmoe")) as (made, model, _):
        greedy = run(made, temperature=0)
        assert run(made, seed=1) != greedy, "temperature 1"
        model.generation_config.top_k = 1
        assert run(made, seed=1) == greedy
        assert run(made, seed=1, top_k=0) != greedy
        model.generation_config.top_k, model.generation_config.temperature = None, 0.01
        assert run(made, seed=1) == greedy


def test_every_prompt_of_a_request_begins_with_its_seed(model_dir: Callable[[str], Path]) -> None:
    with generator(model_dir("olmoe")) as (made, _, _):
        alone = run(made, seed=4)
        events: list[Any] = []
        done = made.run(Job(Work([[9, 8, 7]] * 2, [12, 5], seed=4), events.append))
        texts = ["".join(e.text for e in events if isinstance(e, Delta) and e.index == i) for i in (0, 1)]
        assert texts[0] == alone
        assert texts[0].startswith(texts[1].rstrip("\N{REPLACEMENT CHARACTER}"))
        assert (done.prompt_tokens, done.completion_tokens) == (6, 17)


def test_a_prefix_cache_changes_no_answer_and_is_told_of(model_dir: Callable[[str], Path]) -> None:
    prompt = list(range(2, 40))
    with generator(model_dir("olmoe")) as (plain, model, engine):
        expected = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, 38, dtype=torch.long), prefill_chunk_size=8,
            max_new_tokens=6, do_sample=False,
        )[0, 38:].tolist()  # fmt: skip
        chat = Conversations(model, engine.keep_prefixes(2**20), block_tokens=8)
        made = Generator(model, engine, plain.tokenizer, Metrics(engine), chat=chat)
        for cached in (0, 32, 32):
            events: list[Any] = []
            done = made.run(Job(Work([prompt], [6], temperature=0), events.append))
            assert (done.cached_tokens, done.completion_tokens) == (cached, 6)
            text = "".join(event.text for event in events if isinstance(event, Delta))
            assert text == plain.tokenizer.decode(expected, skip_special_tokens=True)
        several = made.run(Job(Work([prompt], [6], n=2, temperature=1.0, seed=1), lambda _: None))
        assert several.cached_tokens == 0, "several choices are computed as one batch"
