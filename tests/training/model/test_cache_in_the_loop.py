"""A cache in the training pass: choices are those of serving, step by step, and gradients those of the chosen weights."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from configs.load import UserError
from evaluation.benchmark.families import make_tiny, tiny_config
from evaluation.engine.levers.prior import Prior
from evaluation.frontier.steps import CacheKind, read_in_steps
from training.arguments import TrainArguments
from training.loop import train_step
from training.model.cache_in_the_loop import HALF_LIVES, CacheInTheLoop, served
from training.model.loading import load_pretrained
from training.model.packing import one_per_row
from training.model.router_kind import Choosing, RouterKind, Weighing
from training.model.routers import RouterObserver, router_parameters
from training.objective import losses
from training.run import build
from training.step import cache_in_the_loop

Arguments = Callable[..., TrainArguments]


def one_by_one(mass_SE: Any, own_SK: Any, starts_S: Any, *, slots: int, delta: float) -> list[list[int]]:
    """The choices of one row, with a cache that is a list: the latest last."""
    cache: list[int] = []
    chosen = []
    for mass, own, starts in zip(mass_SE.tolist(), own_SK.tolist(), starts_S.tolist(), strict=True):
        cache = [] if starts else cache
        score = [m + delta * (e in cache) + 1e-12 * (e in own) for e, m in enumerate(mass)]
        best = sorted(range(len(mass)), key=lambda e: -score[e])[: len(own)]
        ids = sorted(best, key=lambda e: -mass[e])
        chosen.append(ids)
        cache = ([e for e in cache if e not in ids] + ids[::-1])[-slots:]
    return chosen


@pytest.mark.parametrize("delta", [0.0, 0.03, 0.2, 9.0])
@pytest.mark.parametrize("slots", [3, 5, 12])
def test_choices_are_those_of_a_cache_that_is_a_list(slots: int, delta: float) -> None:
    draw = np.random.default_rng(1)
    logits = draw.normal(size=(4, 30, 12))
    mass = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).astype(np.float32)
    own = np.argsort(-mass, axis=-1)[..., :3]
    starts = draw.random((4, 30)) < 0.1
    starts[:, 0] = True
    found, resident = served(mass, mass, own, starts, slots=(slots, 4), delta=delta, policy="lru")
    for row in range(4):
        own_slots = (slots, 4)[row % 2]
        expected = one_by_one(mass[row].astype(np.float64), own[row], starts[row], slots=own_slots, delta=delta)
        assert found[row].tolist() == expected
    assert (found == own).all() == (delta == 0)
    documents = torch.from_numpy(starts.cumsum(1))
    for row in range(4):
        held = losses.lru_content(
            torch.from_numpy(found[row : row + 1]), documents[row : row + 1], 12, (slots, 4)[row % 2]
        )
        assert np.array_equal(resident[row], held[0].numpy())


FAMILIES: dict[str, dict[str, Any]] = {
    "OlmoeConfig": {}, "Qwen3MoeConfig": {"norm_topk_prob": True}, "Qwen2MoeConfig": {"num_experts_per_tok": 1},
    "DeepseekV3Config": {},
}  # fmt: skip


@pytest.mark.parametrize("policy", HALF_LIVES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_training_pass_is_what_serving_gives(family: str, policy: str, tmp_path: Any) -> None:
    """Losses and loads of texts that are read at once, and of the same texts token by token with the engine's lever."""
    make_tiny(tiny_config(getattr(transformers, family), **FAMILIES[family]), tmp_path)
    model = load_pretrained(str(tmp_path), dtype=torch.float32)
    texts = np.random.default_rng(2).integers(4, 200, size=(3, 20))
    expected = read_in_steps(model, texts, [Prior(delta=0.05)], CacheKind(4, policy))
    observer, ids = RouterObserver(model), torch.from_numpy(texts)
    starts = np.zeros(texts.shape, dtype=bool)
    starts[:, 0] = True
    with observer.recording(3, 20, cache=CacheInTheLoop(0.05, (4,), policy, starts)) as routings:
        logits = model(input_ids=ids, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    assert losses.view(3, 19).sum(1).numpy() == pytest.approx(expected.losses_R, rel=1e-4)
    loads = torch.zeros(3, dtype=torch.int64)
    for routing in routings:
        assert routing.resident_BSE is not None
        loads += (~routing.resident_BSE.gather(-1, routing.ids_BSK))[:, :-1].sum((1, 2))
    assert loads.tolist() == expected.loads_R.tolist()
    observer.close()
    untouched = read_in_steps(model, texts, [], CacheKind(4, policy))
    assert int(loads.sum()) < untouched.loads_R.sum()


def test_gradients_go_through_the_weights_of_what_was_chosen(tmp_path: Any) -> None:
    make_tiny(tiny_config(transformers.OlmoeConfig), tmp_path)
    model = load_pretrained(str(tmp_path), dtype=torch.float32)
    observer = RouterObserver(model)
    ids = torch.arange(4, 24)[None]
    starts = np.zeros((1, 20), dtype=bool)
    starts[0, 0] = starts[0, 9] = True
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    for router in (m for n, m in model.named_modules() if n.endswith("mlp.gate")):
        router.register_forward_hook(lambda _, __, output: seen.append(output))
    with observer.recording(1, 20, cache=CacheInTheLoop(0.1, (4,), "lru", starts)) as routings:
        model(input_ids=ids, use_cache=False)
    logits, weights, chosen = seen[0]
    torch.testing.assert_close(weights, logits.softmax(-1).gather(1, chosen))
    assert torch.equal(routings[0].ids_BSK[0], chosen)
    gradient = torch.autograd.grad(weights[:, 0].sum(), logits, retain_graph=True)[0]
    assert (gradient.abs().sum(1) > 0).all()
    assert routings[0].score_BSE is not None
    assert routings[0].resident_BSE is not None
    torch.testing.assert_close(routings[0].score_BSE[0], logits.softmax(-1) + 0.1 * routings[0].resident_BSE[0])
    assert not torch.equal(chosen, logits.topk(chosen.shape[1]).indices)
    observer.close()


def test_candidates_let_the_loss_say_which_expert_is_chosen() -> None:
    """One expert of three, nearly a tie between the first two, and only the second would give what is wanted."""
    kind = RouterKind("softmax", ("weight",), True, Weighing("softmax", False), Choosing())
    outputs, wanted = torch.tensor([0.0, 2.0, 0.0]), 0.7
    gradients = {}
    for candidates in (0, 1, 2, 9):
        logits = torch.tensor([[1.0, 0.99, -3.0]], requires_grad=True)
        own = logits.detach().softmax(-1).topk(1)
        cache = CacheInTheLoop(0.0, (2,), "lru", np.ones((1, 1), dtype=bool), candidates, 0.1)
        choice = cache.choose(logits, own.values, own.indices, kind=kind, bias_E=None)
        assert choice.ids.tolist() == [[0, 1, 2][: 1 + candidates]]
        assert float(choice.weights[0, 0].detach()) == pytest.approx(float(own.values))
        assert (choice.weights[0, 1:] == 0).all()
        loss = ((choice.weights * outputs[choice.ids]).sum() - wanted) ** 2
        gradients[candidates] = torch.autograd.grad(loss, logits)[0][0]
    assert gradients[0].abs().sum() == 0, "the output of the chosen one is 0 whatever its weight"
    assert gradients[1][1] < 0 < gradients[1][0], "the second is to come in for the first"
    p = torch.tensor([1.0, 0.99, -3.0]).softmax(-1)
    slope = -2 * wanted * outputs[1] * p[1]  # of the loss, by how far the second is chosen
    rise = 1e-3
    moved = [torch.tensor([1.0, 0.99 + sign * rise, -3.0]).softmax(-1)[None] for sign in (1, -1)]
    soft = [_soft_with_moving_threshold(m[0].tolist(), p.tolist(), 0.1)[1] for m in moved]
    assert float(gradients[1][1]) == pytest.approx(float(slope) * (soft[0] - soft[1]) / (2 * rise), rel=1e-2)
    torch.testing.assert_close(gradients[2], gradients[9])


def _soft_with_moving_threshold(scores: list[float], at: list[float], temperature: float) -> list[float]:
    """What sigmoids come to where the threshold lies between the two best of `at`, and moves so that their sum stays."""
    best, second = sorted(at, reverse=True)[:2]

    def soft(threshold: float, values: list[float]) -> list[float]:
        return [1 / (1 + math.exp(-(value - threshold) / temperature)) for value in values]

    wanted = sum(soft((best + second) / 2, at))
    low, high = min(scores) - 1, max(scores) + 1
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(soft(middle, scores)) > wanted else (low, middle)
    return soft(low, scores)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_computed_beside_the_choice_changes_no_number_and_gives_other_gradients(
    family: str, tmp_path: Any
) -> None:
    make_tiny(tiny_config(getattr(transformers, family), **FAMILIES[family]), tmp_path)
    model = load_pretrained(str(tmp_path), dtype=torch.float32)
    observer, ids = RouterObserver(model), torch.arange(4, 28).view(2, 12)
    starts = np.zeros((2, 12), dtype=bool)
    found = []
    for candidates in (0, 3):
        with observer.recording(2, 12, cache=CacheInTheLoop(0.05, (4,), "lru", starts, candidates)) as routings:
            logits = model(input_ids=ids, use_cache=False).logits
        first = next(iter(router_parameters(model).values()))
        gradient = torch.autograd.grad(logits.log_softmax(-1)[..., 7].sum(), first)[0]
        found.append((logits.detach(), [routing.ids_BSK for routing in routings], gradient))
    torch.testing.assert_close(found[0][0], found[1][0])
    for plain, with_candidates in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(plain, with_candidates)
    assert not torch.allclose(found[0][2], found[1][2], rtol=1e-2)
    observer.close()


def test_every_document_of_a_packed_row_begins_with_an_empty_cache(train_args: Arguments) -> None:
    args = train_args(objective="in_the_loop", cache_slots=[4, 6], lever_delta=0.1, cache_policy="decayed")
    documents = torch.tensor([[7, 7, 7, 9, 9, -1], [3, 3, 3, 3, 3, 3]])
    batch: Any = SimpleNamespace(on_host=SimpleNamespace(document_ids_BS=documents), alone=None)
    cache = cache_in_the_loop(args, batch)
    assert (cache.delta, cache.slots, cache.policy) == (0.1, (4, 6), "decayed")
    assert cache.starts_BS[:, 1:].tolist() == [[False, False, True, False, True], [False] * 5]
    alone = one_per_row(torch.arange(12).view(2, 6), documents)
    batch.alone = alone
    assert not cache_in_the_loop(args, batch).starts_BS[:, 1:].any(), "each has a row of its own"
    assert cache_in_the_loop(args, batch).starts_BS.shape == alone.input_ids_DT.shape


@pytest.mark.parametrize("changed", [{}, {"lever_delta": 0.0}, {"cache_policy": "decayed", "cache_slots": [4, 3]}])
def test_it_trains_and_misses_become_fewer_where_they_are_served_so(changed: Any, train_args: Arguments) -> None:
    own: dict[str, Any] = {"objective": "in_the_loop", "cache_slots": [4], "reuse_warmup_steps": 0, "max_steps": 30}
    own |= changed
    run = build(train_args(**own, warmup_steps=0, learning_rate=0.03, miss_coef=0.5))
    lines = [train_step(run) for _ in range(30)]
    assert lines[-1]["train/miss_loss"] < 0.9 * lines[0]["train/miss_loss"]
    assert lines[-1]["cache/in_the_loop/hit_rate"] > lines[0]["cache/in_the_loop/hit_rate"]
    run.observer.close()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"objective": "remoe", "lever_delta": 0.1},
            "acts on a cache, and so with objective=in_the_loop or local only",
        ),
        ({"objective": "in_the_loop", "cache_slots": [4], "cache_policy": "lfu"}, "write of lru, decayed"),
        ({"objective": "cache_miss", "candidate_experts": 2}, "has a meaning with objective=in_the_loop only"),
        ({"objective": "local", "candidate_experts": 2}, "has a meaning with objective=in_the_loop only"),
        ({"objective": "in_the_loop", "candidate_experts": -1}, "candidate_experts=-1: write a number of at least 0"),
        (
            {"objective": "in_the_loop", "cache_slots": [4], "lever_delta": -1.0},
            "lever_delta=-1.0: write a number of at least 0",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changed: Any, words: str, train_args: Arguments) -> None:
    with pytest.raises(ValueError, match=words):
        train_args(**changed)


def test_what_cannot_act_in_the_loop_is_refused_before_training(train_args: Arguments, tmp_path: Any) -> None:
    loop = {"objective": "in_the_loop", "cache_slots": [4]}
    with pytest.raises(UserError, match="gradient_checkpointing=true: what is computed anew"):
        build(train_args(**loop, gradient_checkpointing=True))
    make_tiny(tiny_config(transformers.PhimoeConfig), tmp_path)
    with pytest.raises(UserError, match="must choose and weigh experts in a way that is known"):
        build(train_args(**loop, miss_coef=0.0, model_name_or_path=str(tmp_path)))
