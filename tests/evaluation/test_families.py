"""Every family end to end: routers train and nothing else, the delta goes over to the engine, tokens stay the resident ones.

A tiny random model is made of any mixture-of-experts configuration class of transformers. To try another one:
`python -m pytest tests/evaluation/test_families.py --family Qwen3MoeConfig`
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from configs.load import UserError
from evaluation.benchmark.families import TRACEBACK, WRONG, check, make_tiny, moe_configs, tiny_config
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from training.arguments import TrainArguments
from training.loop import train_step
from training.model.layerwise_checkpoint import LayerwiseCheckpoint
from training.model.lazy_weights import decoder_layers
from training.model.loading import load_pretrained
from training.model.routers import RouterObserver, copy_into_routers, router_kind, router_parameters
from training.run import build, finish, save_checkpoint
from training.run_folder import proof, router_delta

FAMILIES = (
    "OlmoeConfig", "Qwen2MoeConfig", "Qwen3MoeConfig", "MixtralConfig", "DeepseekV2Config", "DeepseekV2Config:groups",
    "DeepseekV3Config", "GptOssConfig", "GraniteMoeConfig", "PhimoeConfig", "Glm4MoeConfig", "Ernie4_5_MoeConfig",
    "Qwen3NextConfig",
)  # fmt: skip
SIGMOID = {"DeepseekV3Config", "Glm4MoeConfig"}
NOT_THE_LARGEST = {"DeepseekV2Config:groups", "DeepseekV3Config", "Glm4MoeConfig", "Ernie4_5_MoeConfig"}
GROUPS = {"n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"}
TERMS = {
    "router_kl_coef": "trust_kl", "reuse_coef": "reuse_loss", "smooth_coef": "smooth_loss", "lag_coef": "lag_loss",
    "working_set_coef": "working_set_loss",
}  # fmt: skip


def config_of(family: str) -> Any:
    """Of this configuration class, with groups of experts if the name says so."""
    name, _, variant = family.partition(":")
    return tiny_config(getattr(transformers, name), **(GROUPS if variant == "groups" else {}))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", metafunc.config.getoption("--family") or FAMILIES)


@pytest.fixture(scope="session")
def family_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The saved model of a family, experts as they lie on the Hub, and a tokenizer. Never write into it."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family.replace(":", "-"))
            make_tiny(config_of(family), made[family])
        return made[family]

    return make


@pytest.fixture
def arguments(train_args: Callable[..., TrainArguments], family: str, family_dir: Any) -> Callable[..., TrainArguments]:
    return lambda **changed: train_args(model_name_or_path=str(family_dir(family)), **changed)


def logits_of(model: Any) -> Tensor:
    ids = torch.randint(1, 264, (2, 11), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return found


def test_how_routers_score_and_choose_is_found_out(family: str, family_dir: Any) -> None:
    model = load_pretrained(str(family_dir(family)))
    with torch.inference_mode():
        kind = router_kind(model)
    assert kind.scoring == ("sigmoid" if family in SIGMOID else "softmax")
    assert kind.takes_largest == (family not in NOT_THE_LARGEST)
    assert kind.trained == (("weight", "bias") if family == "GptOssConfig" else ("weight",))


def test_the_probabilities_that_losses_see_are_those_the_router_weighs_with(family: str, family_dir: Any) -> None:
    if family == "PhimoeConfig":
        pytest.skip("SparseMixer weighs each of its two experts among the closest calls alone")
    model = load_pretrained(str(family_dir(family)))
    observer = RouterObserver(model)
    with torch.no_grad(), observer.recording(2, 11) as routings:
        logits_of(model)
    for routing in routings:
        chosen = routing.logits_BSE.softmax(-1).gather(-1, routing.ids_BSK)
        shares, weighed = (part / part.sum(-1, keepdim=True) for part in (chosen, routing.weights_BSK))
        torch.testing.assert_close(shares, weighed, rtol=1e-4, atol=1e-5)


def test_from_training_to_paged_decoding(family: str, arguments: Any, family_dir: Any, tmp_path: Path) -> None:
    run = build(arguments())
    base = family_dir(family)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    for _ in range(run.args.max_steps):  # the first one checks that routers have gradients and nothing else has any
        metrics = train_step(run)
    terms = {key: metrics[f"train/{key}"] for key in ("loss", *TERMS.values())}
    assert all(torch.isfinite(torch.tensor(value)) for value in terms.values()), terms
    changed = {name for name, tensor in run.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(router_parameters(run.model)) == set(run.trained)
    assert not any("correction" in name for name in changed)
    assert proof.frozen_sha256(run.model.state_dict().items(), run.trained) == run.frozen_sha256
    (Path(run.args.output_dir) / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    delta = router_delta.load_for(base, finish(run))

    tuned = load_pretrained(str(base), dtype=torch.float32)
    untouched = logits_of(tuned)
    copy_into_routers(tuned, delta)
    assert not torch.equal(logits_of(tuned), untouched)
    tuned.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits_of(load_pretrained(str(tmp_path / "saved"))), logits_of(tuned))

    ids = torch.randint(1, 264, (1, 9), generator=torch.Generator().manual_seed(3))
    options: Any = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 24,
        "do_sample": False,
        "eos_token_id": None,
    }
    expected = tuned.generate(ids, **options)
    with load(base, EngineOptions("100%")) as (_, sized):
        smallest = sized.demand.top_k * sized.demand.slot_bytes
    with load(base, EngineOptions(smallest), router_delta=delta) as (paged, engine):
        assert torch.equal(paged.generate(ids, **options), expected)
        assert engine.stats().misses > engine.demand.top_k, "something was evicted"


def test_layers_loaded_one_by_one_are_the_model(family: str, family_dir: Any) -> None:
    weights = LayerwiseCheckpoint(str(family_dir(family)), dtype=torch.float32)
    model = weights.skeleton()
    for layer in decoder_layers(model):
        weights.fill(model, layer)
    whole = load_pretrained(str(family_dir(family)), dtype=torch.float32).state_dict()
    assert model.state_dict().keys() == whole.keys()
    assert [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, whole[name])] == []


@pytest.mark.parametrize("coefficient", TERMS)
def test_a_term_that_is_optimised_falls(coefficient: str, arguments: Any) -> None:
    """With a weight that leaves the task loss nothing to say."""
    others = dict.fromkeys(TERMS, 0.0)
    args = arguments(
        **{**others, coefficient: 1e4}, objective="remoe", max_steps=8, warmup_steps=0, lr_scheduler_type="constant",
        reuse_warmup_steps=0, consistency_warmup_steps=0, learning_rate=0.02, per_device_train_batch_size=4,
    )  # fmt: skip
    run = build(args)
    if coefficient == "router_kl_coef":  # the distance to the original is zero at first
        with torch.no_grad():
            for parameter in run.trained.values():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)), alpha=0.1)
    found = []
    for _ in range(args.max_steps):
        found.append(train_step(run)[f"train/{TERMS[coefficient]}"])
        run.step = 0  # the same rows again
    assert found[-1] < found[0], found


def test_soft_misses_are_refused_where_not_the_largest_logits_are_chosen(family: str, arguments: Any) -> None:
    args = replace(arguments(), objective="cache_miss", miss_coef=0.25)
    if family not in NOT_THE_LARGEST:
        build(args)
        return
    with pytest.raises(
        UserError, match=r"miss_coef=0.25: .*choose experts by groups or a correction bias.*objective=cache"
    ):
        build(args)


def test_checkpoints_hold_the_routers_alone(arguments: Any) -> None:
    run = build(arguments(max_steps=1))
    train_step(run)
    save_checkpoint(run)
    files = (Path(run.args.output_dir) / "checkpoint-1").glob("*")
    routers = sum(parameter.nbytes for parameter in run.trained.values())
    assert sum(path.stat().st_size for path in files) < 4 * routers + 20_000


@pytest.mark.slow
@pytest.mark.parametrize("config_class", moe_configs(), ids=lambda config_class: config_class.__name__)
def test_no_class_of_transformers_ends_in_a_traceback_or_in_something_wrong(config_class: Any) -> None:
    """What `remoe bench families` prints for it: trained, packed, paged, read ahead, traced, levered and exported, or refused."""
    row = check(config_class)
    assert not {WRONG, TRACEBACK} & set(row.words.values()), (row.words, row.reasons)


@pytest.mark.parametrize("asked", [{"prefetch": 2}, {"lever": "prior:delta=1"}])
def test_layers_whose_choice_is_no_routers_are_not_taken_for_another_layer(asked: Any, tmp_path: Path) -> None:
    """DeepSeek-V4's first layers choose by token ids."""
    make_tiny(tiny_config(transformers.DeepseekV4Config), tmp_path)
    with (
        pytest.raises(UserError, match="layers with experts have a router that is known"),
        load(tmp_path, EngineOptions("100%", **asked)),
    ):
        pass
