"""Log-probabilities in parts: those of the model's own logits for every family, in batches that memory allows."""

from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.benchmark.families import make_tiny
from evaluation.engine.loading import load
from evaluation.engine.memory.division import Call
from evaluation.engine.options import EngineOptions
from evaluation.quality import batches
from evaluation.quality import log_probabilities as scoring
from evaluation.quality.batches import batches_that_fit
from evaluation.quality.log_probabilities import log_probabilities
from tests.evaluation.test_families import FAMILIES, config_of
from training.model.loading import load_pretrained

ROOT = Path(__file__).parents[3]
MODEL = str(ROOT / "data" / "embedded" / "model")


@pytest.mark.parametrize("name", [*FAMILIES, "NemotronHConfig", "Gemma4TextConfig", "Llama4TextConfig"])
def test_parts_give_what_the_whole_gives(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny(config_of(name), tmp_path)
    model = load_pretrained(str(tmp_path))
    draw = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(1, 250, (3, 12), generator=draw)
    spots = torch.tensor([0, 1, 5, 5, 11, 14, 30, 35, 2])
    tokens = torch.randint(1, 250, (len(spots),), generator=draw)
    with torch.inference_mode():
        logits = model(input_ids=ids_BS).logits.flatten(0, 1)[spots]
    tokens[3] = int(logits[3].argmax())
    decoder = model.base_model
    monkeypatch.setattr(scoring, "LOGIT_BYTES", 12 * logits.shape[1] * 4)  # four positions at once
    log_p, is_best = log_probabilities(model, ids_BS, spots, tokens)
    expected = logits.float().log_softmax(-1)[torch.arange(len(spots)), tokens]
    torch.testing.assert_close(log_p, expected, atol=1e-5, rtol=1e-5)
    assert is_best.tolist() == (logits.argmax(-1) == tokens).tolist()
    assert is_best[3]
    assert model.base_model is decoder


def sizes(lengths: list[int], **how: Any) -> list[int]:
    def call_of(batch: int, tokens: int) -> Call:
        return Call(batch, batch * tokens, tokens, keeps=False)

    return [len(batch) for batch in batches_that_fit(lengths, call_of, **how)]


def test_a_batch_is_bounded_by_number_and_by_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sizes([10] * 7, engine=None, most=3) == [3, 3, 1]
    monkeypatch.setattr(batches, "MOST_TOKENS", 100)
    assert sizes([200, 40, 30, 16, 15, 10, 10], engine=None) == [1, 2, 4]
    assert sizes([40, 20, 19, 1], engine=None) == [2, 1, 1], "what is filled up is at most as much as what is read"


@pytest.mark.filterwarnings("ignore")
def test_a_batch_is_as_large_as_the_memory_budget_allows() -> None:
    found, lengths = {}, [64] * 200
    for more in ("5%", "60%"):
        with load(MODEL, EngineOptions(memory_budget=f"smallest + {more}", context_tokens=64)) as (model, engine):
            found[more] = sizes(lengths, engine=engine)
            (first, *_) = found[more]
            batch = Call(first, first * 64, 64, keeps=False)
            assert engine.has_room(batch)
            assert first == 200 or not engine.has_room(batch._replace(batch=first + 1, rows=(first + 1) * 64))
            ids_BS = torch.randint(1, 250, (first, 64))
            log_probabilities(model, ids_BS, torch.tensor([0]), torch.tensor([1]))
            assert engine.stats().misses <= engine.demand.all_experts  # each is read once at most
    assert 1 <= found["5%"][0] < found["60%"][0]


def test_a_larger_batch_than_fits_is_refused_when_it_is_called() -> None:
    from evaluation.engine.memory.division import ContextTooLong

    with load(MODEL, EngineOptions(memory_budget="smallest + 5%", context_tokens=64)) as (model, engine):
        (first, *_) = sizes([64] * 500, engine=engine)
        with pytest.raises(ContextTooLong):
            log_probabilities(model, torch.ones(first + 1, 64, dtype=torch.long), torch.tensor([0]), torch.tensor([1]))
