"""Presets, ramps, and that every term moves what it is meant to move."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.load import UserError
from data.batches import Batch
from training.model.routers import RouterObserver, Routing, router_parameters
from training.objective import losses
from training.objective import objective as objective_module
from training.objective.objective import objective, total_counts
from training.objective.terms import PRESETS, ObjectiveArguments
from training.objective.token_loss import token_sums

COEFFICIENTS = ("router_kl_coef", "reuse_coef", "smooth_coef", "lag_coef", "working_set_coef")
TERMS = {
    "router_kl_coef": "trust_kl",
    "reuse_coef": "reuse_loss",
    "smooth_coef": "smooth_loss",
    "lag_coef": "lag_loss",
    "working_set_coef": "working_set_loss",
    "router_aux_loss_coef": "load_balance_loss",
}
LATE = 10_000  # a step after every ramp


def a_batch(rows: int = 2, *, length: int = 12) -> Batch:
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 264, (rows, length), generator=draw)
    documents = torch.arange(length).ge(length - 5).long().repeat(rows, 1)
    positions = torch.cat([torch.arange(length - 5), torch.arange(5)]).repeat(rows, 1)
    labels = ids.roll(-1, 1)
    labels[:, [length - 6, length - 1]] = -100
    return Batch(ids, labels, positions, documents)


def two_layers(rows: int = 2, *, length: int = 12, experts: int = 6) -> list[Routing]:
    draw = torch.Generator().manual_seed(4)
    layers = []
    for _ in range(2):
        logits, reference = (torch.randn(rows, length, experts, generator=draw) for _ in range(2))
        chosen = logits.softmax(-1).topk(2)
        layers.append(Routing(logits.requires_grad_(), chosen.values, chosen.indices, reference))
    return layers


def evaluate(args: ObjectiveArguments, batch: Batch, routings: list[Routing], *, step: int = LATE) -> Any:
    vocabulary = torch.randn(*batch.input_ids_BS.shape, 264, generator=torch.Generator().manual_seed(5))
    count = total_counts(args, [batch])
    return objective(
        args,
        outputs_BSX=vocabulary,
        routings=routings,
        batch=batch,
        count=count,
        step=step,
        base_outputs_BSX=vocabulary,
    )


@pytest.mark.parametrize(
    ("name", "switched_off"),
    [
        ("remoe", set()),
        ("ce_only", set(COEFFICIENTS)),
        ("remoe_no_trust", {"router_kl_coef"}),
        ("remoe_no_reuse", {"reuse_coef"}),
        ("remoe_no_consistency", {"smooth_coef", "lag_coef", "working_set_coef"}),
        ("cache", {"smooth_coef", "lag_coef", "working_set_coef"}),
    ],
)
def test_an_ablation_switches_exactly_its_terms_off(name: str, switched_off: set[str]) -> None:
    args, full = ObjectiveArguments(objective=name, cache_slots=[3]), ObjectiveArguments()
    for key in COEFFICIENTS:
        assert getattr(args, key) == (0 if key in switched_off else getattr(full, key)), key
    found = evaluate(args, a_batch(), two_layers())
    expected = found.terms["loss"] + sum(
        getattr(full, key) * found.terms[TERMS[key]] for key in COEFFICIENTS if key not in switched_off
    )
    torch.testing.assert_close(found.loss, expected)


def test_cache_miss_adds_the_soft_misses_of_its_caches_to_trust() -> None:
    args = ObjectiveArguments(objective="cache_miss", cache_slots=[2, 4], miss_coef=0.3, distill_coef=0.0)
    batch, layers = a_batch(), two_layers()
    found = evaluate(args, batch, layers)
    slow = torch.stack([
        losses.miss_loss_sum(
            layer.logits_BSE, losses.lru_content(layer.ids_BSK, batch.document_ids_BS, 6, slots), batch.document_ids_BS, 2, 0.25
        )
        for layer in layers for slots in (2, 4)
    ]).mean() / 24  # fmt: skip
    torch.testing.assert_close(found.terms["miss_loss"], slow.detach())
    expected = found.terms["loss"] + PRESETS["cache_miss"]["router_kl_coef"] * found.terms["trust_kl"] + 0.3 * slow
    torch.testing.assert_close(found.loss, expected)


def test_with_a_lever_in_the_loop_misses_are_of_the_score_that_decides() -> None:
    args = ObjectiveArguments(
        objective="in_the_loop", cache_slots=[3], lever_delta=0.1, miss_coef=0.3, distill_coef=0.0
    )
    batch = a_batch()
    layers, slow = [], []
    for layer in two_layers():
        held = losses.lru_content(layer.ids_BSK, batch.document_ids_BS, 6, 3)
        scores = layer.logits_BSE.softmax(-1) + 0.1 * held
        layers.append(layer._replace(score_BSE=scores, resident_BSE=held))
        slow.append(losses.miss_loss_sum(scores, held, batch.document_ids_BS, 2, 0.02))
    found = evaluate(args, batch, layers)
    miss = torch.stack(slow).mean() / 24
    torch.testing.assert_close(found.terms["miss_loss"], miss.detach())
    expected = found.terms["loss"] + PRESETS["in_the_loop"]["router_kl_coef"] * found.terms["trust_kl"] + 0.3 * miss
    torch.testing.assert_close(found.loss, expected)


def test_melinoe_adds_what_its_soft_cache_lacks_and_its_margins_to_the_task_loss() -> None:
    args = ObjectiveArguments(objective="melinoe", cache_slots=[2, 4], soft_cache_coef=0.3, rank_coef=0.7)
    batch, layers = a_batch(), two_layers()
    found = evaluate(args, batch, layers)
    lacking, margins = [], []
    for layer in layers:
        probs = layer.logits_BSE.softmax(-1)
        hard = torch.zeros_like(probs).scatter_(-1, layer.ids_BSK, 1.0)
        for slots in (2, 4):
            cache = losses.soft_cache(hard, batch.document_ids_BS, slots=slots, top_k=2, decay=0.9)
            lacking.append(losses.soft_request_sum(hard, cache, batch.document_ids_BS))
        assert layer.reference_logits_BSE is not None
        margins.append(
            losses.margin_rank_sum(probs, layer.reference_logits_BSE, batch.document_ids_BS, margin=args.rank_margin)
        )
    terms = {"soft_cache_loss": torch.stack(lacking).mean() / 24, "rank_loss": torch.stack(margins).mean() / 24}
    for name, slow in terms.items():
        torch.testing.assert_close(found.terms[name], slow.detach())
    expected = found.terms["loss"] + 0.3 * terms["soft_cache_loss"] + 0.7 * terms["rank_loss"]
    torch.testing.assert_close(found.loss, expected)


def test_distillation_takes_its_share_of_the_task_loss() -> None:
    args = ObjectiveArguments(objective="ce_only", distill_coef=0.75)
    batch, layers = a_batch(), two_layers()
    ours, base = (torch.randn(2, 12, 264, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6))
    count = total_counts(args, [batch])
    found = objective(
        args, outputs_BSX=ours, routings=layers, batch=batch, count=count, step=LATE, base_outputs_BSX=base
    )
    kl = token_sums(ours, batch.labels_BS, base).distill_kl / count["tokens"]
    torch.testing.assert_close(found.terms["distill_kl"], kl.float(), check_dtype=False)
    torch.testing.assert_close(found.loss, 0.25 * found.terms["loss"] + 0.75 * kl, check_dtype=False)


def test_a_cache_below_one_tokens_choice_is_refused() -> None:
    args = ObjectiveArguments(objective="cache", cache_slots=[4, 1])
    with pytest.raises(UserError, match=r"a cache of 1 experts cannot hold the 2 .* write at least 2"):
        evaluate(args, a_batch(), two_layers())


@pytest.mark.parametrize("step", [0, 100, 400, 600, 800, 2000])
def test_reuse_and_consistency_terms_have_ramps_of_their_own_and_trust_has_none(step: int) -> None:
    args = ObjectiveArguments()
    found = evaluate(args, a_batch(), two_layers(), step=step)
    terms = found.terms
    expected = (
        terms["loss"]
        + 0.45 * terms["trust_kl"]
        + min(1, step / 400) * 0.2 * terms["reuse_loss"]
        + min(1, step / 800)
        * (0.05 * terms["smooth_loss"] + 0.05 * terms["lag_loss"] + 0.01 * terms["working_set_loss"])
    )
    torch.testing.assert_close(found.loss, expected)


def test_terms_are_means_over_layers_and_items_and_lags_that_do_not_fit_are_skipped() -> None:
    args = ObjectiveArguments(lags=[1, 3, 6, 50], working_set_window=4)
    batch, layers = a_batch(), two_layers()
    found = evaluate(args, batch, layers)
    documents = batch.document_ids_BS
    n_sequences, pairs = 4, {1: 20, 3: 12, 6: 2}  # rows of sequences of 7 and 5 tokens
    logs = [layer.logits_BSE.log_softmax(-1) for layer in layers]
    expected = {
        "trust_kl": mean(
            losses.trust_kl_sum(log.exp(), log, layer.reference_logits_BSE.log_softmax(-1), documents) / 24  # type: ignore[union-attr]
            for log, layer in zip(logs, layers, strict=True)
        ),
        "reuse_loss": mean(
            losses.reuse_loss_sum(log.exp(), losses.previous_choice(layer.ids_BSK, documents, 6), documents, 2)
            / n_sequences
            for log, layer in zip(logs, layers, strict=True)
        ),
        "smooth_loss": mean(losses.symmetric_kl_sums(log.exp(), log, documents, [1])[0] / pairs[1] for log in logs),
        "lag_loss": mean(
            losses.symmetric_kl_sums(log.exp(), log, documents, [lag])[0] / n
            for lag, n in pairs.items()
            for log in logs
        ),
        "working_set_loss": mean(losses.working_set_sum(log.exp(), documents, 4) / 4 for log in logs),
    }
    for key, value in expected.items():
        torch.testing.assert_close(found.terms[key], value.detach(), msg=key)


@pytest.mark.parametrize("name", PRESETS)
def test_layers_that_are_worked_on_together_give_what_each_gives_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = [4] if name == "in_the_loop" else [2, 4]
    args = ObjectiveArguments(objective=name, cache_slots=slots, working_set_window=4, router_aux_loss_coef=0.1)
    outcomes = []
    for numbers in (1, 2 * 2 * 12 * 6, 2**20):  # one layer at a time, two, all
        monkeypatch.setattr(objective_module, "STACKED_NUMBERS", numbers)
        layers = two_layers() + [layer._replace(ids_BSK=layer.ids_BSK.flip(1)) for layer in two_layers()]
        if args.is_in_the_loop:
            held = torch.arange(6) < 3
            in_the_loop = [(layer.logits_BSE.softmax(-1), held.expand_as(layer.logits_BSE)) for layer in layers]
            pairs = zip(layers, in_the_loop, strict=True)
            layers = [layer._replace(score_BSE=score, resident_BSE=resident) for layer, (score, resident) in pairs]
        found = evaluate(args, a_batch(), layers)
        of_logits = torch.autograd.grad(found.loss, [layer.logits_BSE for layer in layers], allow_unused=True)
        outcomes.append((found.terms, found.reuse_L, found.load_LE, found.hits_C, found.loss.detach(), of_logits))
    assert len(outcomes[0][1]) == 4
    for together in outcomes[1:]:
        torch.testing.assert_close(together, outcomes[0])


def mean(values: Any) -> Tensor:
    return torch.stack(list(values)).mean()


def test_the_cache_term_is_the_mean_over_the_sizes() -> None:
    batch, layers = a_batch(), two_layers()
    both, small, large = (
        evaluate(ObjectiveArguments(objective="cache", cache_slots=slots), batch, layers).terms["reuse_loss"]
        for slots in ([2, 4], [2], [4])
    )
    torch.testing.assert_close(both, (small + large) / 2)
    assert small > large


def test_shares_of_micro_batches_add_up_to_the_whole() -> None:
    args = ObjectiveArguments(objective="remoe", working_set_window=4)
    batch, layers = a_batch(rows=4), two_layers(rows=4)
    whole = evaluate(args, batch, layers)
    vocabulary = torch.randn(4, 12, 264, generator=torch.Generator().manual_seed(5))
    count = total_counts(args, [batch])
    shares = []
    for rows in (slice(0, 1), slice(1, 4)):
        part = [Routing(*(None if tensor is None else tensor[rows] for tensor in layer)) for layer in layers]  # type: ignore[arg-type]
        shares.append(
            objective(
                args, outputs_BSX=vocabulary[rows], routings=part, batch=Batch(*(t[rows] for t in batch)), count=count,
                step=LATE,
            )
        )  # fmt: skip
    torch.testing.assert_close(shares[0].loss + shares[1].loss, whole.loss)
    torch.testing.assert_close(shares[0].reuse_L + shares[1].reuse_L, whole.reuse_L)
    torch.testing.assert_close(shares[0].load_LE + shares[1].load_LE, whole.load_LE)
    for key in whole.terms:
        torch.testing.assert_close(shares[0].terms[key] + shares[1].terms[key], whole.terms[key])


def test_recorded_reuse_load_and_hits_are_counted_on_the_hard_choices() -> None:
    batch = Batch(*(torch.zeros(1, 5, dtype=torch.long) for _ in range(3)), torch.tensor([[0, 0, 0, 1, -1]]))
    ids = torch.tensor([[[0, 1], [1, 2], [3, 1], [1, 2], [4, 5]]])
    logits = torch.zeros(1, 5, 6)
    args = ObjectiveArguments(objective="cache", cache_slots=[2, 3])
    found = evaluate(args, batch, [Routing(logits, torch.ones(1, 5, 2), ids, logits)])
    assert found.reuse_L.tolist() == [2 / 4]  # 1 of two at the second token, 1 of two at the third
    assert found.load_LE.tolist() == [[1, 4, 2, 1, 0, 0]]
    assert found.hits_C.tolist() == [2 / 8, 2 / 8]


@pytest.mark.parametrize("coefficient", TERMS)
def test_each_term_alone_decreases_when_only_routers_are_trained_on_it(
    coefficient: str, tiny_model: Callable[..., Any]
) -> None:
    check_that_it_decreases(coefficient, TERMS[coefficient], tiny_model, objective_name="ce_only")


def test_the_cache_term_alone_decreases_too(tiny_model: Callable[..., Any]) -> None:
    check_that_it_decreases("reuse_coef", "reuse_loss", tiny_model, objective_name="cache")


def test_the_soft_misses_alone_decrease_too(tiny_model: Callable[..., Any]) -> None:
    check_that_it_decreases("miss_coef", "miss_loss", tiny_model, objective_name="cache_miss")


def check_that_it_decreases(
    coefficient: str, term: str, tiny_model: Callable[..., Any], *, objective_name: str
) -> None:
    model, batch = tiny_model().requires_grad_(False), a_batch()
    observer = RouterObserver(model, with_reference=True)
    routers = list(router_parameters(model).values())
    if term == "trust_kl":  # starts at its minimum, so start elsewhere
        for router in routers:
            router.data += 0.3 * torch.randn(router.shape, generator=torch.Generator().manual_seed(6))
    for router in routers:
        router.requires_grad_()
    zero = dict.fromkeys((*COEFFICIENTS, "distill_coef"), 0.0)
    args = ObjectiveArguments(
        objective=objective_name, lags=[1, 2], working_set_window=4, cache_slots=[3], **{**zero, coefficient: 1.0}
    )
    optimizer = torch.optim.SGD(routers, lr=0.1)
    course = []
    for _ in range(6):
        with observer.recording(2, 12) as routings:
            logits = model(input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False).logits
        found = objective(
            args, outputs_BSX=logits, routings=routings, batch=batch, count=total_counts(args, [batch]), step=LATE
        )
        course.append(float(found.terms[term]))
        assert found.loss.item() == pytest.approx(float(found.terms["loss"]) + course[-1], rel=1e-5)
        optimizer.zero_grad()
        (found.loss - token_sums(logits, batch.labels_BS).loss / 20).backward()
        optimizer.step()
    assert course[-1] < course[0] - 1e-4, course
