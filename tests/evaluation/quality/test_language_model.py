"""The model that the harness asks: paged it answers as in memory bit for bit, and as the harness's own class."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.load import UserError
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from evaluation.quality.language_model import BatchedLM, PagedLM
from evaluation.quality.tasks import QualityArguments, load_tasks
from training.model.loading import load_pretrained, load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # lm_eval and datasets warn about their own insides
ROOT = Path(__file__).parents[3]
MODEL = str(ROOT / "data" / "embedded" / "model")
TASKS = ["headword", "letters", "perplexity_puzzles"]  # choices, generated text, whole texts


def requests(method: str, pairs: list[Any]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=method, doc={}, arguments=pair, idx=0) for pair in pairs]


def resident(**how: Any) -> BatchedLM:
    return BatchedLM(load_pretrained(MODEL), load_tokenizer(MODEL), **how)


@contextmanager
def paged(options: EngineOptions, **how: Any) -> Iterator[BatchedLM]:
    with load(MODEL, options) as (model, engine):
        yield BatchedLM(model, load_tokenizer(MODEL), engine=engine, **how)


def samples(lm: Any, **how: Any) -> dict[str, Any]:
    """Responses to every request of three tasks of all kinds, in the order of their items."""
    from lm_eval import simple_evaluate

    tasks = load_tasks(QualityArguments(include_path=str(ROOT / "data" / "embedded" / "tasks"), tasks=TASKS))
    how = {"limit": 12, "bootstrap_iters": 0, "log_samples": True, "task_manager": tasks.manager, **how}
    output = simple_evaluate(lm, tasks=list(tasks.chosen), **how)
    found = {name: sorted(output["samples"][name], key=lambda s: s["doc_id"]) for name in TASKS}
    return {name: [sample["resps"] for sample in of_task] for name, of_task in found.items()}


@pytest.fixture(scope="module", autouse=True)
def at_the_root() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield


@pytest.fixture(scope="module")
def answers(at_the_root: None) -> dict[str, Any]:
    """Of the model in memory, five requests at once."""
    return samples(resident(batch_size=5))


@pytest.mark.parametrize("cache", ["400KiB", "2MiB", "100%"])
def test_paged_answers_are_those_of_the_model_in_memory_bit_for_bit(cache: str, answers: dict[str, Any]) -> None:
    with paged(EngineOptions(cache, warn=False), batch_size=5) as lm:
        assert samples(lm) == answers
        assert lm._engine is not None
        assert (lm._engine.stats().misses > lm._engine.demand.all_experts) == (cache != "100%")


def test_batches_that_a_budget_allows_give_the_same_decisions() -> None:
    """In float32: in bfloat16 matrix products of other shapes round log-likelihoods differently by a tenth, paged or not."""
    with paged(EngineOptions(memory_budget="smallest + 20%", context_tokens=64, dtype="float32", warn=False)) as lm:
        found = samples(lm)
        assert lm.batch_sizes["largest"] > 5
    expected = samples(BatchedLM(load_pretrained(MODEL, dtype="float32"), load_tokenizer(MODEL), batch_size=5))
    assert found["letters"] == expected["letters"]
    for task in ("headword", "perplexity_puzzles"):
        ours, theirs = (torch.tensor(flat(of[task])) for of in (found, expected))
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


def flat(nested: Any) -> list[float]:
    return [float(n) for inner in nested for n in flat(inner)] if isinstance(nested, list | tuple) else [float(nested)]


def test_answers_are_those_of_the_harness_own_class(answers: dict[str, Any]) -> None:
    from lm_eval.models.huggingface import HFLM

    model = load_pretrained(MODEL, dtype="float32")
    stock = HFLM(pretrained=model, tokenizer=load_tokenizer(MODEL), batch_size=5, max_length=512)
    ours = BatchedLM(model, load_tokenizer(MODEL), batch_size=5)
    before, after = samples(stock), samples(ours)
    assert before["letters"] == after["letters"]
    for task in ("headword", "perplexity_puzzles"):
        torch.testing.assert_close(*(torch.tensor(flat(of[task])) for of in (before, after)), atol=1e-3, rtol=0)


def test_requests_that_differ_in_the_last_token_are_computed_once() -> None:
    lm = resident()
    rows: list[int] = []
    lm.model.base_model.register_forward_pre_hook(lambda _, __, kw: rows.append(len(kw["input_ids"])), with_kwargs=True)
    tokens = [lm.tok_encode(text) for text in ("The sea was", " calm", " deep", " and blue", " calm")]
    asked = [((str(n), ""), tokens[0], end) for n, end in enumerate(tokens[1:])]
    apart = [lm._loglikelihood_tokens([one])[0] for one in asked]
    rows.clear()
    together = lm._loglikelihood_tokens(asked)
    distinct = {tuple([*tokens[0], *end][:-1]) for end in tokens[1:]}
    assert sum(rows) == len(distinct) < len(asked)
    assert [best for _, best in together] == [best for _, best in apart]
    assert [ll for ll, _ in together] == pytest.approx([ll for ll, _ in apart], abs=1e-3)
    assert together[0] == together[3]


def test_a_text_longer_than_the_model_is_scored_in_windows() -> None:
    lm = resident(max_length=8)
    text = "The sea was calm, and nobody on the boat had expected that at all."
    ids = lm.tok_encode(text)
    assert len(ids) > 16
    (found,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]), disable_tqdm=True)
    expected, previous = 0.0, lm.prefix_token_id
    for start in range(0, len(ids) - len(ids) % 8, 8):
        window = ids[start : start + 8]
        expected += lm._loglikelihood_tokens([(None, [previous], window)])[0][0]
        previous = window[-1]
    rest = len(ids) % 8  # the last window is filled up with context
    expected += lm._loglikelihood_tokens([(None, ids[-9:-rest], ids[-rest:])])[0][0] if rest else 0.0
    assert found == pytest.approx(expected, abs=1e-3)


def test_the_harness_makes_it_of_its_own_arguments(answers: dict[str, Any], tmp_path: Path) -> None:
    from lm_eval import simple_evaluate

    tasks = load_tasks(QualityArguments(tasks=["headword"]))
    how: dict[str, Any] = {"limit": 12, "bootstrap_iters": 0, "task_manager": tasks.manager}
    arguments = f"pretrained={MODEL},expert_cache=2MiB,prefetch=2,max_length=512"
    output = simple_evaluate("remoe", arguments, tasks=["headword"], batch_size=5, **how)
    found = sorted(output["samples"]["headword"], key=lambda sample: sample["doc_id"])
    assert [sample["resps"] for sample in found] == answers["headword"]
    about = output["config"]
    assert about["expert_cache_bytes"] <= 2 * 2**20
    assert about["bytes_read"]["prefill"] > 0
    assert about["batch_sizes"] == [5]


def test_a_budget_belongs_to_experts_until_a_request_needs_more() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tokenizer, (of_its_own, as_asked) = load_tokenizer(MODEL), ({}, {"context_tokens": 512})
    whole = tokenizer.decode(tokenizer(text)["input_ids"][:500])
    slots, after, found = [], [], []
    for chosen in (of_its_own, as_asked):
        lm = PagedLM(MODEL, memory_budget="70MiB", dtype="float32", **chosen)
        assert lm._engine is not None
        slots.append(lm._engine.cache.total_slots)
        found += lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(whole,)]), disable_tqdm=True)
        after.append(lm._engine.cache.total_slots)
    assert slots[0] > after[0]
    assert slots[0] > slots[1]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"memory_budget": "1MiB"}, "a memory budget of 1MiB is too small"),
        ({"memory_bugdet": "1GiB"}, "memory_bugdet is not known; the engine takes .*memory_budget"),
        ({}, "give exactly one of expert_cache"),
        ({"expert_cache": "2MiB", "router_delta": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        PagedLM(MODEL, **arguments)
