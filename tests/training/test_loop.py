"""The loop: what trains, that sharing out the work changes no number, and that stopping changes none either."""

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
from tests.conftest import SMALL
from training import checkpoint, loop, proof, router_delta
from training.loop import Run, TrainArguments, build, finish, save_checkpoint, train, train_step
from training.model import load_pretrained, plain_head
from training.routers import router_parameters

Arguments = Callable[..., TrainArguments]


def fill(folder: Path, *, leave_bytes: int) -> Path:
    """Write a file until only so much is free."""
    filler = folder / "filler"
    filler.write_bytes(b"x" * (shutil.disk_usage(folder).free - leave_bytes))
    return filler


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def without_time(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


def routers_of(run: Run) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.trained.items()}


def assert_same_run(one: Path, other: Path, *, step: int) -> None:
    """Bit for bit: metrics, routers, optimizer, random state, and the state of schedule and data."""
    assert without_time(metrics_of(one)) == without_time(metrics_of(other))
    for name in (checkpoint.TRAINED, checkpoint.OPTIMIZER, checkpoint.RANDOM):
        found, expected = (load_file(run / f"checkpoint-{step}" / name) for run in (one, other))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found), name
    assert checkpoint.load_state(one / f"checkpoint-{step}") == checkpoint.load_state(other / f"checkpoint-{step}")
    found, expected = (load_file(run / "router_delta" / router_delta.WEIGHTS) for run in (one, other))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


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


# stopping and going on


class Stop(Exception):
    pass


def train_until(args: TrainArguments, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and be interrupted just before the step after `step`."""

    def stepping(run: Run) -> dict[str, float]:
        if run.step == step:
            raise Stop
        return train_step(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", stepping)
        with pytest.raises(Stop):
            train(args)


@pytest.mark.parametrize("objective", ["remoe", "cache"])
@pytest.mark.parametrize("stops", [[2], [3], [5], [1, 4, 5]])
def test_a_resumed_run_equals_one_that_was_never_stopped(
    objective: str, stops: list[int], train_args: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it was stopped before its first checkpoint, and with metrics logged after the last one."""
    values = {"objective": objective, "max_steps": 6, "warmup_steps": 3}
    train(train_args(**values, output_dir=str(tmp_path / "whole")))
    stopped = train_args(**values, output_dir=str(tmp_path / "stopped"), resume_from_checkpoint="auto")
    for stop in stops:
        train_until(stopped, stop, monkeypatch)
        torch.manual_seed(stop)  # a new process would not have the old one's random state either
    train(stopped)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole", step=6)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_the_learning_rate_goes_on_where_it_was(
    schedule: str, train_args: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = train_args(lr_scheduler_type=schedule, resume_from_checkpoint="auto")
    train_until(args, 3, monkeypatch)
    run = build(args)
    assert run.step == 2
    assert [group["lr"] for group in run.optimizer.param_groups] == run.scheduler.get_last_lr() == [0.01]


def test_a_resumed_run_reads_the_rows_the_whole_one_would_have_read(
    train_args: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[range] = []
    batch_of = loop.PackedRows.batch
    monkeypatch.setattr(loop.PackedRows, "batch", lambda self, rows: (read.append(rows), batch_of(self, rows))[1])
    args = train_args(resume_from_checkpoint="auto", gradient_accumulation_steps=2)
    train_until(args, 3, monkeypatch)
    assert read == [range(first, first + 2) for first in range(0, 12, 2)]
    read.clear()
    train(args)
    assert read == [range(first, first + 2) for first in range(8, 16, 2)]


def test_resuming_with_other_accumulation_but_the_same_rows_is_allowed(
    train_args: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = train_args(resume_from_checkpoint="auto")
    train_until(args, 3, monkeypatch)
    train(train_args(resume_from_checkpoint="auto", per_device_train_batch_size=1, gradient_accumulation_steps=2))
    train(train_args(output_dir=str(tmp_path / "whole")))
    for line, expected in zip(metrics_of(Path(args.output_dir)), metrics_of(tmp_path / "whole"), strict=True):
        assert line["train/loss"] == pytest.approx(expected["train/loss"], abs=1e-5)


def test_a_finished_run_is_only_written_out_again(train_args: Arguments) -> None:
    args = train_args()
    folder = train(args)
    metrics, gates = metrics_of(Path(args.output_dir)), (folder / router_delta.WEIGHTS).read_bytes()
    shutil.rmtree(folder)
    train(replace(args, resume_from_checkpoint="auto"))
    assert metrics_of(Path(args.output_dir)) == metrics
    assert (folder / router_delta.WEIGHTS).read_bytes() == gates


def test_a_named_checkpoint_can_be_gone_back_to(train_args: Arguments) -> None:
    args = train_args()
    train(args)
    out = Path(args.output_dir)
    before = without_time(metrics_of(out))
    train(replace(args, resume_from_checkpoint=str(out / "checkpoint-2")))
    assert without_time(metrics_of(out)) == before


def test_a_half_written_checkpoint_is_not_taken(train_args: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    args = train_args(resume_from_checkpoint="auto")
    train_until(args, 3, monkeypatch)
    out = Path(args.output_dir)
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-3.tmp")
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-4")
    (out / "checkpoint-4" / checkpoint.STATE).unlink()
    assert build(args).step == 2


def test_as_many_checkpoints_as_asked_are_kept(train_args: Arguments) -> None:
    args = train_args(save_steps=1, save_total_limit=2, max_steps=5)
    train(args)
    found = sorted(path.name for path in Path(args.output_dir).glob("checkpoint-*"))
    assert found == ["checkpoint-4", "checkpoint-5"]


def test_a_folder_that_holds_a_run_is_not_written_over(train_args: Arguments) -> None:
    args = train_args()
    train(args)
    before = {path: path.read_bytes() for path in Path(args.output_dir).rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="already holds a run; write resume_from_checkpoint=auto to go on with it"):
        train(args)
    assert before == {path: path.read_bytes() for path in Path(args.output_dir).rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 0.02}, "was started with learning_rate=0.01, now it is 0.02"),
        ({"objective": "ce_only"}, "was started with objective=remoe, now it is ce_only"),
        ({"max_steps": 9}, "was started with max_steps=4, now it is 9"),
        ({"seed": 1}, "was started with seed=0, now it is 1"),
        ({"per_device_train_batch_size": 3}, "was written with rows_per_step=2, this run has 3"),
    ],
)
def test_going_on_with_another_config_is_refused(
    changed: dict[str, Any], message: str, train_args: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_until(train_args(), 3, monkeypatch)
    before = (Path(train_args().output_dir) / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=re.escape(message)):
        train(train_args(**changed, resume_from_checkpoint="auto"))
    assert (Path(train_args().output_dir) / "config.yaml").read_bytes() == before
    assert len(metrics_of(Path(train_args().output_dir))) == 3


def test_going_on_with_another_base_model_in_the_same_folder_is_refused(
    train_args: Arguments, model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(shutil.copytree(model_dir("qwen2_moe"), tmp_path / "base"))
    args = train_args(model_name_or_path=str(base), resume_from_checkpoint="auto")
    train_until(args, 3, monkeypatch)
    model = load_pretrained(str(base))
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[3] += 0.5
    model.save_pretrained(base)
    with pytest.raises(UserError, match="was written with frozen_sha256="):
        train(args)


def test_a_checkpoint_of_another_program_is_refused(train_args: Arguments, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / checkpoint.STATE).write_text('{"global_step": 5}', encoding="utf-8")
    with pytest.raises(UserError, match="was written with rows_per_step=None"):
        train(train_args(resume_from_checkpoint=str(tmp_path / "checkpoint-5")))


# numbers that are none


def test_a_loss_that_is_not_finite_stops_before_the_step(train_args: Arguments) -> None:
    run = build(train_args(gradient_accumulation_steps=2))
    train_step(run)
    before = routers_of(run)
    with torch.no_grad():
        run.model.get_parameter("model.norm.weight")[0] = float("nan")
    with pytest.raises(UserError, match="loss is nan at step 2, process 0, micro-batch 0: stopped before the step"):
        train_step(run)
    assert run.step == 1
    assert all(torch.equal(router, before[name]) for name, router in routers_of(run).items())


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


# a full disk


def test_a_disk_that_fills_up_keeps_the_earlier_checkpoint_and_can_be_gone_on_from(
    full_disk: Path, train_args: Arguments, tmp_path: Path
) -> None:
    args = train_args(output_dir=str(full_disk / "run"))
    run = build(args)
    for _ in range(2):
        train_step(run)
    save_checkpoint(run)
    train_step(run)
    filler = fill(full_disk, leave_bytes=8192)
    with pytest.raises(
        UserError, match=r"checkpoint-3 cannot be written .*No space left.*free some space and start again"
    ):
        save_checkpoint(run)
    assert [path.name for path in (full_disk / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    filler.unlink()
    train(replace(args, resume_from_checkpoint="auto"))
    train(train_args(output_dir=str(tmp_path / "whole")))
    assert without_time(metrics_of(tmp_path / "whole"))[2:] == without_time(metrics_of(full_disk / "run"))


def test_a_disk_that_is_full_at_the_end_loses_nothing(full_disk: Path, train_args: Arguments) -> None:
    args = train_args(output_dir=str(full_disk / "run"))
    folder = train(args)
    expected = (folder / router_delta.WEIGHTS).read_bytes()
    shutil.rmtree(folder)
    filler = fill(full_disk, leave_bytes=0)
    with pytest.raises((UserError, OSError), match=r"No space left"):
        train(replace(args, resume_from_checkpoint="auto"))
    assert not (full_disk / "run" / "router_delta").exists()
    filler.unlink()
    train(replace(args, resume_from_checkpoint="auto"))
    assert (folder / router_delta.WEIGHTS).read_bytes() == expected


def test_a_delta_that_does_not_fit_is_one_clear_error(full_disk: Path, train_args: Arguments) -> None:
    run = build(train_args(output_dir=str(full_disk / "run")))
    (full_disk / "run" / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    fill(full_disk, leave_bytes=0)
    with pytest.raises(UserError, match=r"router delta .* cannot be written .*No space left"):
        loop._save_delta(run, full_disk / "run" / "router_delta")
    assert not [path for path in (full_disk / "run").iterdir() if path.name.startswith("router_delta")]


# arguments


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"report_to": "tensorboard"}, "report_to='tensorboard': write none or wandb"),
        ({"max_steps": 0}, "max_steps=0 must be at least 1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 must be at least 1"),
        ({"logging_steps": 0}, "logging_steps=0 must be at least 1"),
        ({"save_steps": 0}, "save_steps=0 must be at least 1"),
        ({"save_total_limit": 0}, "save_total_limit=0 must be at least 1"),
        ({"trainable": "experts"}, "trainable='experts': write routers or all"),
        ({"config_name": "x"}, "write exactly one of model_name_or_path"),
        ({"model_name_or_path": None}, "write exactly one of model_name_or_path"),
        ({"model_name_or_path": None, "config_name": "x"}, "has nothing worth freezing; write trainable=all"),
        ({"max_length": 1}, "max_length=1 leaves no pair"),
        ({"objective": "x"}, "objective='x' is not known"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(changed: dict[str, Any], message: str, train_args: Arguments) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        train_args(**changed)


def test_a_run_is_named_after_its_folder_unless_it_has_a_name(train_args: Arguments) -> None:
    assert train_args(output_dir="runs/x").run_name == "x"
    assert train_args(output_dir="runs/x", run_name="mine").run_name == "mine"


@pytest.mark.parametrize("key", ["model_name_or_path", "tokenizer_name"])
def test_a_folder_that_is_not_there_is_refused(key: str, train_args: Arguments) -> None:
    with pytest.raises(
        UserError, match="/nowhere does not exist; give the folder of a saved model or its name on the hub"
    ):
        build(train_args(**{key: "/nowhere"}))


def test_a_folder_without_a_model_or_tokenizer_is_refused(train_args: Arguments, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        build(train_args(model_name_or_path=str(tmp_path)))
    with pytest.raises(UserError, match=r"tokenizer .* cannot be loaded"):
        build(train_args(tokenizer_name=str(tmp_path)))


def test_a_truncated_shard_is_refused(train_args: Arguments, model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(model_dir("qwen2_moe"), tmp_path / "base"))
    shard = base / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model .*base cannot be loaded"):
        build(train_args(model_name_or_path=str(base)))


def test_a_model_without_experts_is_refused(train_args: Arguments, model_dir: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"LlamaForCausalLM \(llama\) has no routers"):
        build(train_args(model_name_or_path=str(model_dir("llama"))))
