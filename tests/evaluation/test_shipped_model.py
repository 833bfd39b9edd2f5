"""The model that ships: alive in every expert, better than chance at every task, and the same tokens when it is paged."""

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from configs.load import load as load_config
from data.batches import tokenize
from data.corpus import DOMAINS, read_corpus
from evaluation.arguments import EvaluationArguments
from evaluation.engine.cache.reuse import routing_summary
from evaluation.engine.greedy import decode
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from evaluation.engine.store.bandwidth import DEPTHS
from evaluation.quality.scores import TaskScores, run_tasks
from evaluation.quality.tasks import QualityArguments
from evaluation.tracing import mean_loss, teacher_forced_trace
from training.model.loading import load_pretrained, load_tokenizer

MODEL = "data/embedded/model"
PIECE = 64  # tokens


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return load_pretrained(MODEL)


@pytest.fixture(scope="module")
def pieces() -> list[np.ndarray]:
    """The first tokens of eight validation documents in every domain."""
    tokenizer = load_tokenizer(MODEL)
    texts = [[document.text for document in read_corpus("validation", [domain])][:8] for domain in DOMAINS]
    return [document[:PIECE] for domain in texts for document in tokenize(domain, tokenizer) if len(document) >= PIECE]


def test_it_is_what_the_readme_says(model: PreTrainedModel) -> None:
    config = model.config
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    assert (config.num_experts, config.num_experts_per_tok, config.norm_topk_prob) == (32, 4, False)
    assert (config.num_hidden_layers, config.shared_expert_intermediate_size > 0) == (4, True)
    assert model.dtype == torch.bfloat16


def test_it_has_learnt_to_predict_and_no_expert_is_dead(model: PreTrainedModel, pieces: list[np.ndarray]) -> None:
    trace, losses = teacher_forced_trace(model, pieces, max_length=PIECE)
    assert mean_loss(trace, losses) < 0.6 * np.log(model.config.vocab_size)  # guessing costs ln(4096) = 8.3 nats
    summary = routing_summary(trace)
    assert summary["dead_experts_per_layer"] == [0, 0, 0, 0]
    assert summary["reuse_rate_mean"] > summary["chance_reuse_rate"]


@pytest.mark.parametrize("name", ["demo", "smoke", "tiny"])
def test_budgets_that_are_planned_for_it_hold_some_experts_and_not_all(name: str) -> None:
    args = load_config(EvaluationArguments, f"configs/evaluation/{name}.yaml")
    assert args.plan.memory_budgets
    for budget in args.plan.memory_budgets:
        options = {"memory_budget": budget, "context_tokens": args.plan.context_tokens, "dtype": args.decode.dtype}
        for reads_in_flight in DEPTHS:  # whatever suits the disk
            with load(MODEL, EngineOptions(**options, reads_in_flight=reads_in_flight)) as (_, engine):
                assert engine.demand.token_experts < engine.cache.total_slots < engine.demand.all_experts


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # lm_eval and datasets warn about their own insides
def test_it_is_clearly_above_chance_at_every_task() -> None:
    model = load_pretrained(MODEL, dtype="float32")  # in bfloat16 a processor without AVX-512 takes ten times as long
    scores = run_tasks(model, load_tokenizer(MODEL), QualityArguments())
    assert sum(isinstance(task, TaskScores) for task in scores.values()) >= 4
    for name, task in scores.items():
        assert len(task.values) >= 300, name
        if isinstance(task, TaskScores):
            error = task.values.std() / np.sqrt(len(task.values))
            assert task.values.mean() - 3 * error > task.chance, name


@pytest.mark.slow
def test_paged_tokens_are_those_of_the_resident_model_at_every_cache_size(
    model: PreTrainedModel, pieces: list[np.ndarray]
) -> None:
    prompt = pieces[0][:24].tolist()
    expected = model.generate(  # type: ignore[operator]
        input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=16, do_sample=False,
    )[0, len(prompt):].tolist()  # fmt: skip
    with load(MODEL, EngineOptions("100%")) as (_, engine):
        slot_bytes, slots = engine.demand.slot_bytes, engine.demand.all_experts
    for n_slots in range(engine.demand.top_k, slots + 1):
        with load(MODEL, EngineOptions(n_slots * slot_bytes)) as (paged, engine):
            assert engine.cache.total_slots == n_slots
            found = decode(paged, engine, prompt_ids=prompt, max_new_tokens=16)
        assert found.token_ids == expected, f"{n_slots} slots"
