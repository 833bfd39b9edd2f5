"""The loop: what trains, and that sharing out the work changes no number."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GraniteMoeConfig

from configs.load import UserError
from data.batches import IGNORE_LABEL
from tests.conftest import SMALL, byte_tokenizer
from training.arguments import TrainArguments
from training.loop import train, train_step
from training.model.loading import load_pretrained, plain_head
from training.model.routers import router_parameters
from training.run import Run, build, finish
from training.run_folder import checkpoint, proof, router_delta

Arguments = Callable[..., TrainArguments]


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def without_time(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


def routers_of(run: Run) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.trained.items()}


# what trains


@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe", "deepseek_v2"])
@pytest.mark.parametrize("objective", ["ce_only", "remoe", "cache"])
def test_only_router_weights_change_after_steps(
    family: str, objective: str, train_args: Arguments, model_dir: Callable[[str], Path]
) -> None:
    run = build(train_args(model_name_or_path=str(model_dir(family)), objective=objective))
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    for _ in range(3):
        train_step(run)
    changed = {name for name, tensor in run.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(router_parameters(run.model)) == set(run.trained)
    assert proof.frozen_sha256(run.model.state_dict().items(), run.trained) == run.frozen_sha256


def test_the_proof_holds_names_gradients_and_equal_hashes(train_args: Arguments) -> None:
    args = train_args()
    train(args)
    found = json.loads((Path(args.output_dir) / "proof.json").read_text(encoding="utf-8"))
    routers = list(router_parameters(load_pretrained(str(args.model_name_or_path))))
    assert found["trained_tensors"] == routers
    assert list(found["gradient_norms_at_step_1"]) == routers
    assert all(0 < norm < 1e6 for norm in found["gradient_norms_at_step_1"].values())
    assert found["frozen_sha256_before"] == found["frozen_sha256_after"]


def test_gradients_are_checked_at_the_first_step(train_args: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build(train_args())
    run.model.get_parameter("model.norm.weight").requires_grad_()
    with pytest.raises(UserError, match=r"frozen tensor model\.norm\.weight has a gradient"):
        train_step(run)


def test_a_changed_frozen_tensor_gives_no_delta(train_args: Arguments) -> None:
    run = build(train_args())
    train_step(run)
    with torch.no_grad():
        run.model.get_parameter("model.norm.weight")[0] += 1e-3
    with pytest.raises(UserError, match=r"frozen tensors changed during training .*no delta is written"):
        finish(run)
    assert not (Path(run.args.output_dir) / "router_delta").exists()


def test_the_delta_is_the_trained_routers_and_fits_its_base(train_args: Arguments) -> None:
    args = train_args(objective="cache")
    folder = train(args)
    assert folder == Path(args.output_dir) / "router_delta"
    weights = router_delta.load_for(str(args.model_name_or_path), folder)
    trained = load_file(Path(args.output_dir) / "checkpoint-4" / checkpoint.TRAINED)
    assert weights.keys() == trained.keys()
    assert all(torch.equal(weights[name], trained[name]) for name in trained)
    about = router_delta.describe(folder)
    assert about["objective"] == "cache"
    assert about["config"]["reuse_coef"] == 0.2
    assert about["metrics"] == metrics_of(Path(args.output_dir))[-1]
    assert about["base_model"] == args.model_name_or_path
    assert re.fullmatch(r"[0-9a-f]{40}(\+dirty)?", about["code_commit"])


def test_a_machine_without_git_trains_too(train_args: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert router_delta.describe(train(train_args()))["code_commit"] is None


def test_everything_trains_when_asked_and_the_result_is_a_model(
    train_args: Arguments, model_dir: Callable[[str], Path]
) -> None:
    args = train_args(
        model_name_or_path=None, config_name=str(model_dir("qwen2_moe")), trainable="all", objective="ce_only",
        router_aux_loss_coef=0.01, max_steps=2,
    )  # fmt: skip
    run = build(args)
    assert run.trained.keys() == {name for name, _ in run.model.named_parameters()}
    folder = train(replace(args, resume_from_checkpoint="auto"))
    model = load_pretrained(str(folder))
    assert model.dtype == torch.bfloat16
    assert "train/load_balance_loss" in metrics_of(Path(args.output_dir))[-1]
    trained = load_file(Path(args.output_dir) / "checkpoint-2" / checkpoint.TRAINED)
    assert all(torch.equal(tensor, trained[name].bfloat16()) for name, tensor in model.named_parameters())


def test_a_new_model_depends_on_the_seed_alone(train_args: Arguments, model_dir: Callable[[str], Path]) -> None:
    made = []
    for seed, name in ((3, "a"), (3, "b"), (4, "c")):
        torch.manual_seed(len(name) + seed)
        values = {"model_name_or_path": None, "config_name": str(model_dir("olmoe")), "trainable": "all"}
        run = build(train_args(**values, seed=seed, output_dir=f"{train_args().output_dir}_{name}"))
        made.append(run.model.state_dict()["model.layers.0.mlp.gate.weight"])
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_in_bfloat16_routers_stay_float32_and_frozen_tensors_as_they_were(
    train_args: Arguments, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    load_pretrained(str(model_dir("qwen2_moe")), dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    run = build(
        train_args(model_name_or_path=str(tmp_path / "bf16"), tokenizer_name=str(model_dir("qwen2_moe")), bf16=True)
    )
    for _ in range(2):
        train_step(run)
    assert {parameter.dtype for parameter in run.trained.values()} == {torch.float32}
    assert {t.dtype for name, t in run.model.state_dict().items() if name not in run.trained} == {torch.bfloat16}
    assert proof.frozen_sha256(run.model.state_dict().items(), run.trained) == run.frozen_sha256


def test_a_packed_document_is_read_as_if_it_were_alone(train_args: Arguments) -> None:
    run = build(train_args())
    batch = run.rows.batch([0])
    documents = batch.document_ids_BS[0]
    assert len(documents.unique()) > 1
    with torch.no_grad():
        packed = run.model(input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False).logits
        for document in documents.unique():
            alone = run.model(input_ids=batch.input_ids_BS[:, documents == document], use_cache=False).logits
            torch.testing.assert_close(packed[:, documents == document], alone, rtol=1e-4, atol=1e-5)


def test_the_first_loss_is_the_models_own_cross_entropy(train_args: Arguments) -> None:
    run = build(train_args(max_length=16))
    batch = run.rows.batch([0, 1])
    found = train_step(run)
    model, losses = load_pretrained(str(run.args.model_name_or_path), dtype=torch.float32), []
    for ids, labels, _, documents in zip(*batch, strict=True):
        for document in documents.unique():
            part = ids[documents == document].unsqueeze(0)
            with torch.no_grad():
                logs = model(input_ids=part, use_cache=False).logits.log_softmax(-1)
            targets = labels[documents == document]
            losses += [-logs[0, t, target] for t, target in enumerate(targets.tolist()) if target != IGNORE_LABEL]
    assert found["train/loss"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)
    assert found["train/num_tokens"] == len(losses)


def test_logits_are_made_some_at_a_time_where_the_head_is_all_that_makes_them(
    train_args: Arguments, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    assert build(train_args()).head is not None
    config = GraniteMoeConfig(**{**SMALL, "num_local_experts": 8, "intermediate_size": 16, "logits_scaling": 3.0})
    scaled = AutoModelForCausalLM.from_config(config)
    assert plain_head(scaled.requires_grad_(False)) is None, "logits are divided after the head"
    trains = tiny_model("olmoe")
    assert plain_head(trains) is None
    assert plain_head(trains.requires_grad_(False)) is trains.lm_head


# sharing out the work


@pytest.mark.parametrize("objective", ["remoe", "cache"])
def test_accumulation_changes_neither_losses_nor_routers(objective: str, train_args: Arguments) -> None:
    courses, routers = [], []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        run = build(
            train_args(
                objective=objective, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
                output_dir=f"{train_args().output_dir}_{accumulation}",
            )
        )  # fmt: skip
        courses.append([train_step(run) for _ in range(4)])
        routers.append(routers_of(run))
    for course, found in zip(courses[1:], routers[1:], strict=True):
        for line, expected in zip(course, courses[0], strict=True):
            assert line.keys() == expected.keys()
            for key in line:
                assert key.startswith("time/") or line[key] == pytest.approx(expected[key], abs=1e-5), key
        for name, router in found.items():
            torch.testing.assert_close(router, routers[0][name], rtol=0, atol=1e-6)


def test_gradient_checkpointing_trains_the_same_routers(train_args: Arguments) -> None:
    found = []
    for checkpointing in (False, True):
        run = build(
            train_args(gradient_checkpointing=checkpointing, output_dir=f"{train_args().output_dir}_{checkpointing}")
        )
        for _ in range(3):
            train_step(run)
        assert run.model.is_activation_checkpointing == checkpointing
        found.append(routers_of(run))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=1e-6)


# numbers that are none


def test_a_loss_that_is_not_finite_stops_before_the_step(train_args: Arguments) -> None:
    run = build(train_args(gradient_accumulation_steps=2))
    train_step(run)
    before = routers_of(run)
    router, *_ = run.trained
    whose = {router: "loss is nan at step 2, process 0, micro-batch 0: stopped before the step",
             "model.norm.weight": r"loss is nan, because model\.norm\.weight of the model holds numbers"}  # fmt: skip
    for name, words in whose.items():
        with torch.no_grad():
            kept = run.model.get_parameter(name).clone()
            run.model.get_parameter(name).view(-1)[0] = float("nan")
        with pytest.raises(UserError, match=words):
            train_step(run)
        with torch.no_grad():
            run.model.get_parameter(name).copy_(kept)
    assert run.step == 1
    assert all(torch.equal(router, before[name]) for name, router in routers_of(run).items())


def test_bytes_of_quantised_experts_are_no_numbers_that_could_be_infinite(
    train_args: Arguments, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint("qwen3_moe_blocks"), tmp_path / "model")
    byte_tokenizer().save_pretrained(folder)
    run = build(train_args(model_name_or_path=str(folder), experts="fp8"))
    bytes_of_experts = [tensor for name, tensor in run.model.named_parameters() if ".packed_" in name]
    with torch.no_grad():
        bytes_of_experts[0][0, 0] = float("inf")  # as scales or codes may look
        next(iter(run.trained.values())).view(-1)[0] = float("nan")
    with pytest.raises(UserError, match="loss is nan at step 1, process 0, micro-batch 0: stopped before the step"):
        train_step(run)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_before_the_step_and_is_named(value: float, train_args: Arguments) -> None:
    run = build(train_args())
    train_step(run)
    before = routers_of(run)
    name = list(run.trained)[1]
    run.trained[name].register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(2), value))
    with pytest.raises(
        UserError, match=f"gradient of {re.escape(name)} is not finite at step 2: stopped before the step"
    ):
        train_step(run)
    assert all(torch.equal(router, before[name]) for name, router in routers_of(run).items())


def test_gradients_are_clipped_to_the_norm(train_args: Arguments) -> None:
    run = build(train_args(max_grad_norm=1e-3))
    norms: list[float] = []

    def record(*_: object) -> None:
        norms.append(float(torch.stack([p.grad.norm() for p in run.trained.values() if p.grad is not None]).norm()))

    run.optimizer.register_step_pre_hook(record)
    found = train_step(run)
    assert found["train/grad_norm"] > 1e-3
    assert norms == [pytest.approx(1e-3, rel=1e-3)]
