"""What people who fine-tune mixture-of-experts models report going wrong, one test for each trap that a run can fall into.

The traps of several processes are in `test_processes.py` (ranks that change losses, ZeRO-3 and FSDP on experts and on mixed
`requires_grad`), those of W&B without a network in `test_wandb.py`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, Ernie4_5_MoeConfig, Qwen3MoeConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from configs.load import UserError
from data.batches import PADDING, Batch
from evaluation.benchmark.families import make_tiny
from tests.conftest import SMALL, byte_tokenizer
from training.arguments import TrainArguments
from training.loop import train_step
from training.objective.objective import objective, total_counts
from training.run import Run, build, save_checkpoint

Arguments = Callable[..., TrainArguments]


def test_trap_trained_routers_without_a_gradient(train_args: Arguments) -> None:
    run = build(train_args())
    for tensor in run.trained.values():
        tensor.register_hook(torch.zeros_like)
    with pytest.raises(UserError, match="at the first step: it would not be trained"):
        train_step(run)


def test_trap_routers_that_the_task_loss_cannot_train(train_args: Arguments, tmp_path: Path) -> None:
    """Top-1 with normalised weights: the only gradient is rounding noise, which AdamW would make steps of full length from."""
    make_tiny(Qwen3MoeConfig(**SMALL, num_experts=8, num_experts_per_tok=1, norm_topk_prob=True), tmp_path / "base")
    base = str(tmp_path / "base")
    with pytest.raises(
        UserError, match=r"objective=ce_only: .*choose one expert and give it the weight 1 .*objective=remoe"
    ):
        build(train_args(model_name_or_path=base, objective="ce_only"))
    run = build(train_args(model_name_or_path=base, objective="remoe"))
    train_step(run)
    train_step(run)
    norms = json.loads((Path(run.args.output_dir) / "proof.json").read_text())["gradient_norms_at_step_1"]
    assert min(norms.values()) > 1e-6, "of the reuse term, which counts from the second step on"


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5"])
def test_trap_frozen_biases_that_drift(family: str, train_args: Arguments, tmp_path: Path) -> None:
    """Correction biases shift the choice of experts; some families hold them as parameters inside the router."""
    if family == "deepseek_v3":
        config: Any = DeepseekV3Config(
            **SMALL, n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=1, moe_intermediate_size=16,
            intermediate_size=24, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, n_group=1, topk_group=1,
            qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
        )  # fmt: skip
    else:
        config = Ernie4_5_MoeConfig(
            **SMALL, moe_num_experts=8, moe_k=2, moe_intermediate_size=16, intermediate_size=24, moe_layer_start_index=1,
            moe_num_shared_experts=1,
        )  # fmt: skip
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "e_score_correction_bias" in name or name.endswith("gate.weight"):
                tensor.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    run = build(train_args(model_name_or_path=str(tmp_path / "base"), weight_decay=0.1))
    biases = {name: t.clone() for name, t in run.model.state_dict().items() if "e_score_correction_bias" in name}
    for _ in range(3):
        train_step(run)
    assert biases
    assert all(torch.equal(run.model.state_dict()[name], bias) for name, bias in biases.items())


def of_batch(run: Run, batch: Batch) -> dict[str, torch.Tensor]:
    with torch.no_grad(), run.observer.recording(*batch.input_ids_BS.shape) as routings:
        logits = run.model(input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False).logits
    return objective(
        run.args, outputs_BSX=logits, routings=routings, batch=batch, count=total_counts(run.args, [batch]), step=9999
    ).terms


def test_trap_reuse_losses_that_count_padding(train_args: Arguments) -> None:
    run = build(train_args(objective="remoe"))
    batch = run.rows.batch([0, 1])
    padding = torch.full((2, 7), -100)
    padded = Batch(
        *(torch.cat([tensor, fill], 1) for tensor, fill in zip(
            batch, (torch.full_like(padding, 3), padding, torch.arange(7).expand(2, 7), torch.full_like(padding, PADDING)),
            strict=True,
        ))
    )  # fmt: skip
    plain, with_padding = of_batch(run, batch), of_batch(run, padded)
    for term, value in plain.items():
        torch.testing.assert_close(with_padding[term], value, rtol=1e-4, atol=1e-5, msg=term)


def test_trap_reuse_losses_that_cross_document_boundaries(train_args: Arguments) -> None:
    """Two documents in one row cost what each costs in a row of its own."""
    run = build(train_args(objective="remoe", working_set_window=2))
    ids = torch.randint(1, 264, (2, 8), generator=torch.Generator().manual_seed(3))
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    positions, documents = torch.arange(8).expand(2, 8), torch.tensor([[0] * 8, [1] * 8])
    apart = Batch(ids, labels, positions, documents)
    together = Batch(*(tensor.reshape(1, 16) for tensor in apart))
    one_row, two_rows = of_batch(run, together), of_batch(run, apart)
    for term, value in two_rows.items():
        torch.testing.assert_close(one_row[term], value, rtol=1e-4, atol=1e-5, msg=term)


def test_trap_gradient_checkpointing_with_frozen_embeddings_giving_no_gradient(train_args: Arguments) -> None:
    found = []
    for checkpointing in (False, True):
        run = build(
            train_args(gradient_checkpointing=checkpointing, output_dir=f"{train_args().output_dir}_{checkpointing}")
        )
        train_step(run)
        found.append({name: tensor.detach().clone() for name, tensor in run.trained.items()})
        layers = [module for module in run.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        assert [(layer.gradient_checkpointing, layer.training) for layer in layers] == [(checkpointing, True)] * 2
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-5, atol=1e-7)


def test_trap_checkpoints_bloated_by_frozen_weights(train_args: Arguments) -> None:
    run = build(train_args())
    train_step(run)
    save_checkpoint(run)
    files = list((Path(run.args.output_dir) / "checkpoint-1").iterdir())
    trained_bytes = sum(tensor.nbytes for tensor in run.trained.values())
    assert (
        sum(path.stat().st_size for path in files) < 3 * trained_bytes + 20_000
    )  # themselves, and AdamW's two moments
    assert 3 * trained_bytes + 20_000 < sum(p.nbytes for p in run.model.parameters())


def test_trap_dropout_and_jitter_while_only_routers_train(train_args: Arguments) -> None:
    """Routers learn to choose as they will when the model is used; the same rows give the same loss twice."""
    run = build(train_args(max_length=16))
    assert not any(m.training for m in run.model.modules() if not isinstance(m, GradientCheckpointingLayer))
    batch = run.rows.batch([0])
    assert all(
        torch.equal(a, b) for a, b in zip(of_batch(run, batch).values(), of_batch(run, batch).values(), strict=True)
    )
