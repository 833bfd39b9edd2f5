"""Levers: residents are preferred, weights stay the router's own, little is lost, and it never happens unasked.

What a lever should choose is worked out once more here, token by token and expert by expert.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from configs.load import UserError
from evaluation.benchmark.families import make_tiny, tiny_config
from evaluation.engine.levers.attach import attach
from evaluation.engine.levers.drop import Drop
from evaluation.engine.levers.prior import Prior
from evaluation.engine.levers.spec import levers_of
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from evaluation.engine.stats import ReadCounts
from training.model.loading import load_pretrained
from training.model.routers import ask_routers, find_routers, router_kind

Checkpoint = Callable[..., Path]


def generate(model: Any, new_tokens: int = 24) -> Tensor:
    ids_BT = torch.randint(2, 258, (1, 9), generator=torch.Generator().manual_seed(4))
    output: Tensor = model.generate(
        input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=new_tokens, do_sample=False
    )
    return output


# in the engine


@pytest.mark.parametrize("space", ["probability", "logits"])
@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe", "mixtral", "deepseek_v2"])
def test_strength_0_changes_nothing_and_a_strong_prior_saves_reads(
    checkpoint: Checkpoint, family: str, space: str
) -> None:
    folder, tokens, misses, exact, swapped = checkpoint(family), {}, {}, {}, {}
    for delta in (None, 0.0, 0.5):
        lever = None if delta is None else f"prior:space={space},delta={delta}"
        with load(folder, EngineOptions("50%", cache_scope="per_layer", lever=lever)) as (model, engine):
            tokens[delta], stats = generate(model), engine.stats()
            misses[delta], exact[delta], swapped[delta] = (
                stats.misses_by_phase["decode"],
                engine.is_exact,
                stats.swapped,
            )
            if delta:
                assert stats.lost_weight > 0
    assert torch.equal(tokens[None], tokens[0.0])
    assert misses[None] == misses[0.0]
    assert misses[0.5] < 0.7 * misses[None]
    assert exact == {None: True, 0.0: False, 0.5: False}
    assert swapped[None] == swapped[0.0] == 0 < swapped[0.5]


def test_dropping_reads_less_and_without_missing_experts_of_little_weight_it_changes_nothing(
    checkpoint: Checkpoint,
) -> None:
    folder, misses, tokens = checkpoint("olmoe"), {}, {}
    for lever in (None, "drop:below=0", "drop:below=2"):
        with load(folder, EngineOptions("50%", cache_scope="per_layer", lever=lever)) as (model, engine):
            tokens[lever], misses[lever] = generate(model), engine.stats().misses_by_phase["decode"]
    assert torch.equal(tokens[None], tokens["drop:below=0"])
    assert misses[None] == misses["drop:below=0"]
    assert misses["drop:below=2"] < 0.7 * misses[None]


def test_prompts_are_routed_as_always_unless_asked(checkpoint: Checkpoint) -> None:
    folder = checkpoint("olmoe")
    ids = torch.randint(2, 258, (1, 30), generator=torch.Generator().manual_seed(4))
    logits = {}
    for lever in (None, "prior:delta=9", "prior:delta=9,prefill=true"):
        with (
            load(folder, EngineOptions("50%", cache_scope="per_layer", lever=lever)) as (model, engine),
            torch.no_grad(),
        ):
            model(ids[:, :10])
            logits[lever] = model(ids).logits
            assert engine.stats().swapped == 0, "only decoding is counted"
    assert torch.equal(logits[None], logits["prior:delta=9"])
    assert not torch.equal(logits[None], logits["prior:delta=9,prefill=true"])


# against what it should be, worked out slowly


def wanted(
    own: list[int],
    mass: list[float],
    decisive: list[float],
    resident: set[int],
    *,
    delta: float,
    regret: float,
    swaps: int,
) -> set[int]:
    """The experts of one token by the definition of the prior in probability space."""
    bonus = [score + (delta if expert in resident else 0.0) for expert, score in enumerate(decisive)]
    new = set(sorted(range(len(mass)), key=lambda expert: -bonus[expert])[: len(own)])
    leave = sorted(set(own) - new, key=lambda expert: mass[expert])
    come = sorted(new - set(own), key=lambda expert: -mass[expert])
    chosen, lost = set(own), 0.0
    for number, (left, came) in enumerate(zip(leave, come, strict=True)):
        lost += mass[left] - mass[came]
        if number >= swaps or lost > regret:
            break
        chosen = chosen - {left} | {came}
    return chosen


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("OlmoeConfig", {}),
    "normalised": ("Qwen3MoeConfig", {"norm_topk_prob": True}),
    "softmax of the chosen": ("GptOssConfig", {}),
    "top 1": ("Qwen2MoeConfig", {"num_experts_per_tok": 1}),
    "groups": ("DeepseekV2Config", {"n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"}),
    "sigmoid, bias, groups": ("DeepseekV3Config", {"n_group": 2, "topk_group": 1}),
    "bias of the block": ("MiniMaxM2Config", {}),
    "softmax and bias": ("Ernie4_5_MoeConfig", {}),
}


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    made: dict[str, Path] = {}

    def model(kind: str) -> Any:
        if kind not in made:
            config, changed = FAMILIES[kind]
            made[kind] = tmp_path_factory.mktemp("model")
            make_tiny(tiny_config(getattr(transformers, config), **changed), made[kind])
        loaded = load_pretrained(str(made[kind]), dtype=torch.float32)
        draw = torch.Generator().manual_seed(5)
        for name, tensor in [*loaded.named_buffers(), *loaded.named_parameters()]:
            if "bias" in name and tensor.dim() <= 2 and ("correction" in name or "expert_bias" in name):
                tensor.data.copy_(0.2 * torch.rand(tensor.shape, generator=draw))
        return loaded

    return model


def asked(model: Any, tokens: int = 40) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Logits, weights and ids of every layer's router for random hidden states, hooks included."""
    width, found = model.config.get_text_config().hidden_size, []
    for layer, router in enumerate(ask_routers(model).values()):
        hidden_TH = torch.randn(tokens, width, generator=torch.Generator().manual_seed(layer))
        hidden = hidden_TH if router.axes == 2 else hidden_TH[None]
        outputs = router.module(hidden, *router.further)
        found.append(tuple(part.reshape(tokens, -1) for part in outputs[:3]))
    return found


@pytest.mark.parametrize(("regret", "swaps"), [(math.inf, None), (0.05, None), (math.inf, 1), (0.1, 1)])
@pytest.mark.parametrize("delta", [0.02, 0.2, math.inf])
@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_what_is_chosen_is_what_the_definition_says(
    kind: str, delta: float, regret: float, swaps: int | None, model_of: Callable[[str], Any]
) -> None:
    model, draw = model_of(kind), np.random.default_rng(3)
    untouched, family = asked(model), router_kind(model)
    assert family.choosing is not None
    assert family.weighing is not None
    experts = untouched[0][0].shape[1]
    residents = [draw.random((40, experts)) < 0.4 for _ in untouched]
    counts = ReadCounts()
    how: Any = {"resident": lambda layer, _: residents[layer], "is_decode": lambda: True, "counts": counts}
    attach(model, [Prior(delta=delta, regret=regret, swaps=swaps)], **how)
    routers, swapped = list(ask_routers(model).values()), 0
    for layer, ((z_TE, w_TK, own_TK), (_, new_w_TK, new_TK)) in enumerate(zip(untouched, asked(model), strict=True)):
        p_TE = z_TE.softmax(-1) if family.weighing.scoring == "softmax" else z_TE.sigmoid()
        for token in range(40):
            own, p = own_TK[token].tolist(), p_TE[token]
            unit = float(p[own].sum()) if family.weighing.normalised else 1.0
            decisive, allowed = p.clone(), set(range(experts))
            if kind == "sigmoid, bias, groups":
                decisive = p + routers[layer].module.e_score_correction_bias
                worth = decisive.view(2, -1).topk(2).values.sum(-1)
                allowed = {expert for expert in allowed if expert // (experts // 2) == int(worth.argmax())}
            if kind == "groups":
                best = int(p.view(2, -1).amax(-1).argmax())
                allowed = {expert for expert in allowed if expert // (experts // 2) == best}
            if kind in ("bias of the block", "softmax and bias"):
                (bias,) = (
                    part for part in (*routers[layer].further, *routers[layer].module.buffers(), *(
                        weight for name, weight in routers[layer].module.named_parameters() if "bias" in name
                    )) if isinstance(part, Tensor) and part.numel() == experts
                )  # fmt: skip
                decisive = p + bias.flatten()
            decisive = torch.where(torch.tensor([e in allowed for e in range(experts)]), decisive, -torch.inf)
            resident = set(residents[layer][token].nonzero()[0].tolist()) & allowed
            numbers: Any = {"delta": min(delta, 1e6), "regret": regret, "swaps": len(own) if swaps is None else swaps}
            expected = wanted(own, (p / unit).tolist(), (decisive / unit).tolist(), resident, **numbers)
            assert set(new_TK[token].tolist()) == expected, (layer, token)
            swapped += len(set(own) - expected)
            if expected == set(own):
                assert torch.equal(new_w_TK[token], w_TK[token]), "the router's own bits"
                continue
            shares = p[new_TK[token]] / (p[new_TK[token]].sum() if family.weighing.normalised else 1.0)
            torch.testing.assert_close(new_w_TK[token], shares * family.weighing.scale, rtol=1e-4, atol=1e-5)
            assert (new_w_TK[token].diff() <= 0).all(), "heaviest first"
    assert counts.swapped == swapped
    assert swapped > 0 or delta < 0.1 or regret < 1 or kind == "top 1"


Z = torch.tensor([[4.0, 3.0, 2.0, 1.5, 0.0, -4.0]])  # spread 8


@torch.no_grad()
def routed(
    model: Any, lever: Prior | Drop, resident: list[int], *, logits: Tensor = Z, is_decode: bool = True
) -> tuple[list[int], Tensor]:
    """What the first router of a model of six experts, three of them chosen, makes of these logits."""
    mask = np.isin(np.arange(logits.shape[1]), resident)[None]
    attach(model, [lever], resident=lambda *_: mask, is_decode=lambda: is_decode, counts=ReadCounts())
    *_, hook = next(iter(find_routers(model).values()))._forward_hooks.values()
    probabilities = logits.softmax(-1)
    weights, ids = probabilities.topk(3)
    _, new_weights, new_ids = hook(torch.nn.Identity(), None, (logits, weights, ids))
    return new_ids[0].tolist(), new_weights[0]


@pytest.fixture
def plain(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model("olmoe")


def test_in_logits_residents_within_the_bonus_come_in_with_the_weights_of_their_own(plain: Any) -> None:
    ids, weights = routed(plain, Prior(space="logits", delta=0.1, keep=1), [3, 5])
    assert ids == [0, 1, 3], "2.0 leaves for 1.5 + 0.8; expert 5 is too far away"
    torch.testing.assert_close(weights, Z.softmax(-1)[0, [0, 1, 3]])


@pytest.mark.parametrize(("keep", "expected"), [(0, {3, 4, 5}), (1, {0, 3, 4}), (2, {0, 1, 3}), (3, {0, 1, 2})])
@pytest.mark.parametrize("space", ["probability", "logits"])
def test_the_routers_own_best_cannot_be_displaced(space: Any, keep: int, expected: set[int], plain: Any) -> None:
    assert set(routed(plain, Prior(space=space, delta=10.0, keep=keep), [3, 4, 5])[0]) == expected


def test_a_router_is_left_alone_outside_of_decoding(plain: Any) -> None:
    assert routed(plain, Prior(delta=10.0), [3, 4, 5], is_decode=False)[0] == [0, 1, 2]


@torch.no_grad()
def test_the_spread_is_the_mean_over_the_tokens_so_far(plain: Any) -> None:
    attach(plain, [Prior(space="logits", delta=0.1)], resident=lambda *_: np.arange(6)[None] == 3, is_decode=lambda: True,
           counts=ReadCounts())  # fmt: skip
    (hook,) = next(iter(find_routers(plain).values()))._forward_hooks.values()
    flat = torch.full((3, 6), 0.1)
    hook(torch.nn.Identity(), None, (flat, flat[:, :3].softmax(-1), torch.tensor([[0, 1, 2]] * 3)))
    weights, ids = Z.softmax(-1).topk(3)
    found = hook(torch.nn.Identity(), None, (Z, weights, ids))
    assert found[2][0].tolist() == [0, 1, 2], "the mean spread is 2, the bonus 0.2, the gap 0.5"


def test_what_is_dropped_has_no_weight_and_asks_for_nothing_and_the_rest_keeps_its_own(plain: Any) -> None:
    probabilities = Z.softmax(-1)[0]
    ids, weights = routed(plain, Drop(below=0.2), [1])
    assert ids == [0, 1, 0], "expert 2 of 0.09 is missing and left out; 0 of 0.64 is missing too, and heavy"
    torch.testing.assert_close(weights, torch.stack([probabilities[0], probabilities[1], torch.tensor(0.0)]))
    ids, weights = routed(plain, Drop(below=2.0), [])
    assert (ids, weights.tolist()[1:]) == ([0, 0, 0], [0.0, 0.0]), "the heaviest stays"


@pytest.mark.parametrize("own", [[0, 1, 2], [0, 1, 3]])
@pytest.mark.parametrize("space", ["probability", "logits"])
@torch.no_grad()
def test_of_experts_that_are_as_good_the_routers_own_stays(space: Any, own: list[int], plain: Any) -> None:
    """Logits in bfloat16 are often equal, and a strength of 0 changes nothing."""
    resident = np.isin(np.arange(6), [5])[None]
    how: Any = {"resident": lambda *_: resident, "is_decode": lambda: True, "counts": ReadCounts()}
    attach(plain, [Prior(delta=0.0, space=space)], **how)
    (hook,) = next(iter(find_routers(plain).values()))._forward_hooks.values()
    z = torch.tensor([[4.0, 3.0, 2.0, 2.0, 0.0, -4.0]])
    ids = torch.tensor([own])
    assert hook(torch.nn.Identity(), None, (z, z.softmax(-1).gather(1, ids), ids))[2].tolist() == [own]


@torch.no_grad()
def test_what_a_prior_has_not_replaced_may_be_dropped(plain: Any) -> None:
    resident = np.isin(np.arange(6), [3])[None]
    how: Any = {"resident": lambda *_: resident, "is_decode": lambda: True, "counts": ReadCounts()}
    attach(plain, levers_of("prior:delta=0.05+drop:below=0.3"), **how)
    (hook,) = next(iter(find_routers(plain).values()))._forward_hooks.values()
    p = Z.softmax(
        -1
    )  # 0.64, 0.24, 0.09, 0.05, ...: the resident 3 comes in for 2, and 1, which is missing, is left out
    weights, ids = p.topk(3)
    _, new_weights, new_ids = hook(torch.nn.Identity(), None, (Z, weights, ids))
    assert new_ids[0].tolist() == [0, 3, 0]
    torch.testing.assert_close(new_weights[0], torch.stack([p[0, 0], p[0, 3], torch.tensor(0.0)]))
    assert how["counts"].swapped == 2


def test_survivors_of_a_normalised_router_add_up_to_what_they_did(model_of: Callable[[str], Any]) -> None:
    model = model_of("normalised")
    counts = ReadCounts()
    attach(model, [Drop(below=0.9)], resident=lambda *_: np.zeros((1, 8), bool), is_decode=lambda: True, counts=counts)
    with torch.no_grad():
        for _, weights_TK, ids_TK in asked(model):
            torch.testing.assert_close(weights_TK.sum(-1), torch.ones(40))
            assert (weights_TK[:, 1:] == 0).all(-1).any()
            assert (ids_TK == ids_TK[:, :1])[weights_TK == 0].all()
    assert counts.swapped > 0


def test_each_layer_may_have_a_strength_of_its_own(plain: Any) -> None:
    with pytest.raises(UserError, match="delta has 3 numbers, the model 2 layers with experts"):
        routed(plain, Prior(delta=(0.1, 0.2, 0.3)), [])
    assert [Prior(delta=(0.1, 0.2)).of_layer(layer, 2).delta for layer in (0, 1)] == [0.1, 0.2]
    with pytest.raises(UserError, match="below has 1 numbers, the model 2 layers"):
        routed(plain, Drop(below=(0.1,)), [])


# in words


def test_levers_are_read_from_a_line() -> None:
    assert levers_of("prior:space=logits,delta=0.1,keep=1") == (Prior(space="logits", delta=0.1, keep=1),)
    assert levers_of("prior:delta=0.02/0.04;swaps=1 + drop:below=0.01") == (
        Prior(delta=(0.02, 0.04), swaps=1), Drop(below=0.01),
    )  # fmt: skip
    assert levers_of("prior:delta=inf,regret=0.05,prefill=true") == (Prior(delta=math.inf, regret=0.05, prefill=True),)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prio:delta=1", r"lever 'prio' is not known; did you mean prior\? Write for example prior:space="),
        ("x", "lever 'x' is not known; known: prior, drop"),
        ("prior", "lever prior: no delta: .*write for example prior:space=probability,delta=0.04"),
        ("prior:delta", "lever prior: 'delta' is no key of it; write prior:KEY=VALUE"),
        ("prior:delta=1,strength=2", "'strength=2' is no key of it; write prior:KEY=VALUE,... with delta, space, keep"),
        ("prior:delta=1,delta=2", "'delta=2' comes twice"),
        ("prior:delta=x", "lever prior: delta=x: "),
        ("prior:delta=0.1/-1", "lever prior: delta=0.1/-1: .* greater than or equal to 0"),
        ("prior:delta=1,space=logit", "space=logit: .*'probability' or 'logits'"),
        ("prior:delta=1,swaps=-1", "swaps=-1"),
        ("prior:delta=1+", "lever '' is not known"),
        ("drop:below=0.1+prior:delta=1", "write drop last, and once"),
        ("drop:below=0.1+drop:below=0.2", "write drop last, and once"),
    ],
)
def test_what_is_not_understood_is_named(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        levers_of(text)


def changed_routers(model: Any, change: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    for router in find_routers(model).values():
        router.forward = lambda hidden_TH, forward=router.forward: change(*forward(hidden_TH))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda z, w, ids: (z, w.sqrt(), ids), "Router weighs experts neither by a softmax nor by a sigmoid"),
        (lambda z, w, ids: (z, w + w.mean(), ids), "Router weighs experts neither by a softmax nor by a sigmoid"),
        (
            lambda z, _, ids: (z, (z.gather(1, ids).softmax(-1)) * z.abs().sum(-1, keepdim=True), ids),
            "Router weighs experts in a way that levers do not know",
        ),
        (
            lambda z, w, ids: (z, z.softmax(-1).gather(1, (ids + 1) % 8), (ids + 1) % 8),
            "Router chooses experts in a way that levers do not know",
        ),
    ],
)
def test_routers_that_choose_or_weigh_in_other_ways_are_refused(change: Any, words: str, plain: Any) -> None:
    changed_routers(plain, change)
    with pytest.raises(UserError, match=words):
        routed(plain, Prior(delta=0.1), [])
