"""Tuned routers for others: a folder for transformers, a GGUF for llama.cpp; nothing but the routers is different."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.load import UserError
from data.corpus import EMBEDDED
from data.pieces import document_beginnings
from evaluation.benchmark.order import COLD, Leg, Order
from evaluation.benchmark.sides.side import open_side
from evaluation.engine.greedy import greedy
from evaluation.export import gguf_patch, hf_folder
from evaluation.export.gguf_file import write_gguf
from evaluation.export.hf_folder import model_card
from launch.export import main
from training.model.loading import load_pretrained, load_tokenizer
from training.model.routers import copy_into_routers, router_parameters
from training.run_folder import router_delta

ModelDir = Callable[[str], Path]
PROMPT = [5, 9, 200, 31, 17]


def perturbed(model_dir: Path, folder: Path, *, scale: float = 0.3) -> dict[str, torch.Tensor]:
    """A delta as training writes it, its routers moved at random."""
    routers = router_parameters(load_pretrained(str(model_dir), dtype=torch.float32))
    draw = torch.Generator().manual_seed(7)
    moved = {n: (p + scale * p.std() * torch.randn(p.shape, generator=draw)).detach() for n, p in routers.items()}
    about = {
        "objective": "cache_miss", "code_commit": "0" * 40, "metrics": {"train/loss": 3.25, "moe/reuse_rate_mean": 0.4},
        "config": {"miss_coef": 0.25, "reuse_coef": 0.0, "max_steps": 300, "learning_rate": 0.003, "seed": 1},
    }  # fmt: skip
    base_sha256 = router_delta.checkpoint_sha256(model_dir, moved)
    router_delta.save(folder, moved, base_model=str(model_dir), base_sha256=base_sha256, about=about)
    return moved


def export(model: Path, delta: Path, output: Path, *more: str) -> None:
    main(["--model", str(model), "--router-delta", str(delta), "--output", str(output), *more])


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v2"])
def test_a_folder_that_plain_transformers_loads_with_the_tuned_routers(
    family: str, model_dir: ModelDir, tmp_path: Path
) -> None:
    base = model_dir(family)
    moved = perturbed(base, tmp_path / "delta")
    export(base, tmp_path / "delta", tmp_path / "out")
    tuned = load_pretrained(str(base), dtype=torch.float32)
    copy_into_routers(tuned, moved)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert greedy(exported, PROMPT, max_new_tokens=20) == greedy(tuned, PROMPT, max_new_tokens=20)
    ids = torch.tensor([PROMPT])
    assert torch.equal(exported(ids).logits, tuned(ids).logits)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(AutoTokenizer.from_pretrained(base))
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert before.keys() == after.keys(), "per-expert keys, as they were"
    assert sum(not torch.equal(before[name], after[name]) for name in before) == len(moved)
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_shards_without_a_router_are_linked_and_other_weights_left_behind(model_dir: ModelDir, tmp_path: Path) -> None:
    base = Path(shutil.copytree(model_dir("olmoe"), tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    shards = {"a.safetensors": [n for n in weights if "gate.weight" in n and ".experts." not in n]}
    shards["b.safetensors"] = [n for n in weights if n not in shards["a.safetensors"]]
    for shard, names in shards.items():
        save_file({name: weights[name] for name in names}, base / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, names in shards.items() for name in names}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "pytorch_model.bin").write_bytes(b"the routers of before")
    perturbed(base, tmp_path / "delta")
    untouched = (base / "a.safetensors").read_bytes()
    export(base, tmp_path / "delta", tmp_path / "out")
    assert (tmp_path / "out" / "b.safetensors").samefile(base / "b.safetensors")
    assert not (tmp_path / "out" / "a.safetensors").samefile(base / "a.safetensors")
    assert (base / "a.safetensors").read_bytes() == untouched
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    assert not list(tmp_path.glob(".*partial*"))


def test_the_card_names_base_licence_objective_and_figures(model_dir: ModelDir, tmp_path: Path) -> None:
    base = Path(shutil.copytree(model_dir("olmoe"), tmp_path / "base"))
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# OLMoE\n")
    perturbed(base, tmp_path / "delta")
    about = {**router_delta.describe(tmp_path / "delta"), "base_model": "allenai/OLMoE-1B-7B-0924"}
    card = model_card(base, about)
    assert "license: apache-2.0" in card
    assert "base_model: allenai/OLMoE-1B-7B-0924" in card
    assert "cache_miss (miss_coef 0.25)" in card
    assert "train/loss | 3.25" in card
    (base / "README.md").unlink()
    assert "that of the base: see there" in model_card(base, about)


def test_weights_that_are_not_the_models_stay_behind_and_templates_come_along(
    model_dir: ModelDir, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(model_dir("olmoe"), tmp_path / "base"))
    shutil.copy(base / "model.safetensors", base / "consolidated.safetensors")
    (base / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/tools.jinja", "LICENSE"):
        (base / name).write_text("text")
    perturbed(base, tmp_path / "delta")
    export(base, tmp_path / "delta", tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"chat_template.jinja", "additional_chat_templates/tools.jinja", "LICENSE", "README.md"} < found
    assert [name for name in found if name.endswith(".safetensors")] == ["model.safetensors"]


def test_routers_are_read_back_before_the_folder_has_its_name(
    model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    perturbed(model_dir("olmoe"), tmp_path / "delta")
    monkeypatch.setattr(hf_folder, "_write_over", lambda *_: None)
    with pytest.raises(UserError, match=r"mlp\.gate\.weight was not written as it should be"):
        export(model_dir("olmoe"), tmp_path / "delta", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["delta"]


@pytest.mark.parametrize(
    "card", ["---\n- no\n- mapping\n---\n", "---\nlicense: [unclosed\n---\n", "---\nmodel-index: 3\n---\n"]
)
def test_a_base_card_that_cannot_be_read_is_said_and_no_hindrance(
    card: str, model_dir: ModelDir, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = Path(shutil.copytree(model_dir("olmoe"), tmp_path / "base"))
    (base / "README.md").write_text(card)
    perturbed(base, tmp_path / "delta")
    export(base, tmp_path / "delta", tmp_path / "out")
    assert "that of the base: see there" in (tmp_path / "out" / "README.md").read_text()
    assert "has no metadata that can be read" in caplog.text


def test_a_delta_with_numbers_that_are_not_finite_is_refused(model_dir: ModelDir, tmp_path: Path) -> None:
    perturbed(model_dir("olmoe"), tmp_path / "delta", scale=float("nan"))
    with pytest.raises(UserError, match=r"mlp\.gate\.weight holds numbers that are not finite"):
        export(model_dir("olmoe"), tmp_path / "delta", tmp_path / "out")


def test_mistakes_are_told_before_anything_is_written(model_dir: ModelDir, tmp_path: Path) -> None:
    base, other = model_dir("qwen2_moe"), model_dir("olmoe")
    perturbed(base, tmp_path / "delta")
    with pytest.raises(UserError, match=r"was trained on .* and the frozen weights of .* differ"):
        export(other, tmp_path / "delta", tmp_path / "out")
    with pytest.raises(UserError, match=r"--format gguf and --gguf BASE\.gguf go together"):
        export(base, tmp_path / "delta", tmp_path / "out", "--format", "gguf")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already; name a new one"):
        export(base, tmp_path / "delta", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_leaves_nothing_behind(model_dir: ModelDir, tmp_path: Path, full_disk: Path) -> None:
    perturbed(model_dir("qwen2_moe"), tmp_path / "delta")
    (full_disk / "filler").write_bytes(b"x" * (shutil.disk_usage(full_disk).free - 30_000))
    with pytest.raises(OSError, match="No space left"):
        export(model_dir("qwen2_moe"), tmp_path / "delta", full_disk / "out")
    assert [path.name for path in full_disk.iterdir()] == ["filler"]


# GGUF


def rewritten(
    source: Path, target: Path, *, quantised: Sequence[str] = (), changed: dict[str, float] | None = None,
    kind: str = "Q8_0", fields: Mapping[str, Any] = MappingProxyType({}), added: Mapping[str, Any] = MappingProxyType({}),
) -> None:  # fmt: skip
    """A copy by PyPI's gguf: tensors whose name has one of `quantised` in that kind, a number added to those in `changed`."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", *fields):
            array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if array else None)
    for name, value in fields.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(name, value)
    for tensor in reader.tensors:
        data: Any = np.asarray(tensor.data) + np.float32((changed or {}).get(tensor.name, 0))
        if any(part in tensor.name for part in quantised):
            coarse = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(tensor.name, gguf.quants.quantize(data, coarse), raw_dtype=coarse)
        else:
            writer.add_tensor(tensor.name, data)
    for name, data in added.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def small_gguf(target: Path, architecture: str, *, tensors: int = 1) -> None:
    writer = gguf.GGUFWriter(target, architecture)
    for number in range(tensors):
        writer.add_tensor(f"tensor{number}", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def shipped_gguf(tmp_path: Path) -> Path:
    write_gguf(EMBEDDED / "model", tmp_path / "base.gguf", precision="float32")
    return tmp_path / "base.gguf"


@pytest.mark.parametrize("quantised", [(), ("gate_exps", "up_exps")])
def test_in_a_gguf_only_the_routers_change(quantised: tuple[str, ...], shipped_gguf: Path, tmp_path: Path) -> None:
    base = tmp_path / "q.gguf"
    rewritten(shipped_gguf, base, quantised=quantised)
    moved = perturbed(EMBEDDED / "model", tmp_path / "delta")
    export(EMBEDDED / "model", tmp_path / "delta", tmp_path / "out.gguf", "--format", "gguf", "--gguf", str(base))
    old, new = (gguf.GGUFReader(path) for path in (base, tmp_path / "out.gguf"))
    assert [tensor.name for tensor in old.tensors] == [tensor.name for tensor in new.tensors]
    for before, after in zip(old.tensors, new.tensors, strict=True):
        assert (before.tensor_type, before.shape.tolist()) == (after.tensor_type, after.shape.tolist())
        layer = before.name.removeprefix("blk.").split(".")[0]
        expected = np.asarray(before.data)
        if before.name.endswith("ffn_gate_inp.weight"):
            expected = moved[f"model.layers.{layer}.mlp.gate.weight"].numpy()
        np.testing.assert_array_equal(np.asarray(after.data), expected)
    more = {name: field.contents() for name, field in new.fields.items() if name not in old.fields}
    assert more.keys() == {
        f"remoe.{key}"
        for key in ("router_delta_sha256", "base_model", "base_frozen_sha256", "objective", "code_commit")
    }
    assert more["remoe.objective"] == "cache_miss"
    same = [name for name in old.fields if not name.startswith("GGUF.")]
    assert all(old.fields[name].contents() == new.fields[name].contents() for name in same)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_routers_that_are_stored_coarsely_become_float32(kind: str, shipped_gguf: Path, tmp_path: Path) -> None:
    """What lies behind them moves, and is what it was."""
    base = tmp_path / "q.gguf"
    rewritten(shipped_gguf, base, quantised=["ffn_gate_inp.weight"], kind=kind)
    moved = perturbed(EMBEDDED / "model", tmp_path / "delta")
    export(EMBEDDED / "model", tmp_path / "delta", tmp_path / "out.gguf", "--format", "gguf", "--gguf", str(base))
    old, new = (gguf.GGUFReader(path) for path in (base, tmp_path / "out.gguf"))
    for before, after in zip(old.tensors, new.tensors, strict=True):
        if before.name.endswith("ffn_gate_inp.weight"):
            assert (before.tensor_type.name, after.tensor_type.name) == (kind, "F32")
            layer = before.name.split(".")[1]
            np.testing.assert_array_equal(
                np.asarray(after.data), moved[f"model.layers.{layer}.mlp.gate.weight"].numpy()
            )
        else:
            assert before.tensor_type == after.tensor_type
            np.testing.assert_array_equal(np.asarray(after.data), np.asarray(before.data))


def test_a_gguf_that_was_not_written_as_it_should_be_is_not_left_behind(
    shipped_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    perturbed(EMBEDDED / "model", tmp_path / "delta")
    read = gguf_patch._read

    def damaged(path: Path) -> gguf.GGUFReader:
        """What a bad disk gives back of the new file: one bit of a router is another."""
        if path != shipped_gguf:
            router = next(tensor for tensor in read(path).tensors if "ffn_gate_inp.weight" in tensor.name)
            with path.open("r+b") as file:
                file.seek(int(router.data_offset))
                flipped = file.read(1)[0] ^ 1
                file.seek(int(router.data_offset))
                file.write(bytes([flipped]))
        return read(path)

    monkeypatch.setattr(gguf_patch, "_read", damaged)
    with pytest.raises(UserError, match=r"ffn_gate_inp\.weight was not written as it should be; check the disk"):
        export(
            EMBEDDED / "model",
            tmp_path / "delta",
            tmp_path / "out.gguf",
            "--format",
            "gguf",
            "--gguf",
            str(shipped_gguf),
        )
    assert not (tmp_path / "out.gguf").exists()


def test_routers_of_layers_that_predict_ahead_stay(shipped_gguf: Path, tmp_path: Path) -> None:
    """As GLM-4.5's GGUFs have one more block than the model has layers."""
    blocks = int(gguf.GGUFReader(shipped_gguf).fields["qwen2moe.block_count"].contents())
    fields = {"qwen2moe.block_count": blocks + 1, "qwen2moe.nextn_predict_layers": 1}
    name, ahead = f"blk.{blocks}.ffn_gate_inp.weight", np.ones((4, 8), np.float32)
    rewritten(shipped_gguf, tmp_path / "more.gguf", fields=fields, added={name: ahead})
    perturbed(EMBEDDED / "model", tmp_path / "delta")
    more = ("--format", "gguf", "--gguf", str(tmp_path / "more.gguf"))
    export(EMBEDDED / "model", tmp_path / "delta", tmp_path / "out.gguf", *more)
    (found,) = (tensor for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors if tensor.name == name)
    np.testing.assert_array_equal(np.asarray(found.data), ahead)


def test_a_gguf_that_was_tuned_once_is_tuned_again(shipped_gguf: Path, tmp_path: Path) -> None:
    base = EMBEDDED / "model"
    for number in (1, 2):
        moved = perturbed(base, tmp_path / f"delta{number}")
        export(base, tmp_path / f"delta{number}", tmp_path / f"model{number}")
        more = ("--format", "gguf", "--gguf", str(shipped_gguf))
        export(base, tmp_path / f"delta{number}", tmp_path / f"{number}.gguf", *more)
        base, shipped_gguf = tmp_path / f"model{number}", tmp_path / f"{number}.gguf"
    found = gguf.GGUFReader(shipped_gguf)
    (router,) = (tensor for tensor in found.tensors if tensor.name == "blk.0.ffn_gate_inp.weight")
    np.testing.assert_array_equal(np.asarray(router.data), moved["model.layers.0.mlp.gate.weight"].numpy())
    assert found.fields["remoe.base_model"].contents() == str(tmp_path / "model1")


def test_a_gguf_that_names_its_alignment_is_tuned(shipped_gguf: Path, tmp_path: Path) -> None:
    reader, aligned = gguf.GGUFReader(shipped_gguf), tmp_path / "aligned.gguf"
    writer = gguf.GGUFWriter(aligned, "qwen2moe")
    writer.add_custom_alignment(64)
    for name in ("qwen2moe.block_count",):
        writer.add_uint32(name, reader.fields[name].contents())
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.asarray(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    moved = perturbed(EMBEDDED / "model", tmp_path / "delta")
    more = ("--format", "gguf", "--gguf", str(aligned))
    export(EMBEDDED / "model", tmp_path / "delta", tmp_path / "out.gguf", *more)
    for before, after in zip(
        gguf.GGUFReader(aligned).tensors, gguf.GGUFReader(tmp_path / "out.gguf").tensors, strict=True
    ):
        if ".ffn_gate_inp." in before.name:
            layer = before.name.split(".")[1]
            np.testing.assert_array_equal(
                np.asarray(after.data), moved[f"model.layers.{layer}.mlp.gate.weight"].numpy()
            )
        else:
            np.testing.assert_array_equal(np.asarray(after.data), np.asarray(before.data))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda base, to: rewritten(base, to, changed={"blk.1.ffn_gate_inp.weight": 1e-3}),
            "other values in blk.1.ffn_gate",
        ),
        (
            lambda base, to: rewritten(base, to, fields={"general.type": "imatrix"}),
            r"not this model's GGUF .*\(imatrix\)",
        ),
        (
            lambda base, to: rewritten(base, to, fields={"general.type": "mmproj"}),
            r"not this model's GGUF .*\(mmproj\)",
        ),
        (
            lambda base, to: rewritten(base, to, fields={"split.count": 3}),
            r"one of 3 parts; merge .*llama-gguf-split --merge",
        ),
        (lambda _, to: to.write_bytes(b"GGUF, or not"), "cannot be read as GGUF"),
        (lambda base, to: to.write_bytes(base.read_bytes()[:-1000]), "cannot be read as GGUF"),
        (lambda _, to: small_gguf(to, "nobodys"), "is of architecture 'nobodys', which this gguf does not know"),
        (lambda _, to: small_gguf(to, "qwen2moe", tensors=0), "holds no tensors"),
        (
            lambda base, to: rewritten(
                base,
                to,
                fields={"qwen2moe.block_count": 5},
                added={"blk.4.ffn_gate_inp.weight": np.ones((4, 8), np.float32)},
            ),
            "has a router blk.4.ffn_gate_inp.weight that the delta does not hold",
        ),
    ],
)
def test_a_gguf_of_another_base_is_refused(make: Any, words: str, shipped_gguf: Path, tmp_path: Path) -> None:
    make(shipped_gguf, tmp_path / "other.gguf")
    perturbed(EMBEDDED / "model", tmp_path / "delta")
    with pytest.raises(UserError, match=words):
        export(
            EMBEDDED / "model", tmp_path / "delta", tmp_path / "out.gguf", "--format", "gguf",
            "--gguf", str(tmp_path / "other.gguf"),
        )  # fmt: skip
    assert not (tmp_path / "out.gguf").exists()


def test_a_gguf_of_another_shape_is_refused(model_dir: ModelDir, shipped_gguf: Path, tmp_path: Path) -> None:
    perturbed(model_dir("qwen2_moe"), tmp_path / "delta")
    with pytest.raises(UserError, match=r"has blk\.0\.ffn_gate_inp\.weight of shape \[32, .*of shape \[8, 16\]"):
        export(
            model_dir("qwen2_moe"),
            tmp_path / "delta",
            tmp_path / "o.gguf",
            "--format",
            "gguf",
            "--gguf",
            str(shipped_gguf),
        )


def llamacpp_tokens(path: Path, prompts: Sequence[list[int]], *, new_tokens: int) -> list[list[int]]:
    legs = [Leg(COLD, prompt, new_tokens) for prompt in prompts]
    order = Order("llamacpp", str(EMBEDDED / "model"), legs, threads=1, gguf=str(path), kv_cache="F32")
    with open_side(order) as serving:
        return [serving.request(leg).token_ids for leg in legs]


@pytest.mark.slow
def test_llamacpp_speaks_with_the_tuned_routers(shipped_gguf: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="the bench extra is not installed")
    moved = perturbed(EMBEDDED / "model", tmp_path / "delta")
    arguments = (EMBEDDED / "model", tmp_path / "delta")
    export(*arguments, tmp_path / "tuned.gguf", "--format", "gguf", "--gguf", str(shipped_gguf))
    rewritten(shipped_gguf, tmp_path / "q8.gguf", quantised=["gate_exps", "up_exps"])
    export(*arguments, tmp_path / "tuned-q8.gguf", "--format", "gguf", "--gguf", str(tmp_path / "q8.gguf"))
    tuned = load_pretrained(str(EMBEDDED / "model"), dtype=torch.float32)
    tuned.generation_config.eos_token_id = None
    beginnings = document_beginnings(load_tokenizer(str(EMBEDDED / "model")), "test", tokens=24, count=60)
    before = [greedy(tuned, prompt, max_new_tokens=24) for prompt in beginnings]
    copy_into_routers(tuned, moved)
    expected = {tuple(prompt): greedy(tuned, prompt, max_new_tokens=24) for prompt in beginnings}
    assert list(expected.values()) != before
    prompts = [prompt for prompt in beginnings if not has_a_tie(tuned, prompt, expected[tuple(prompt)])][:50]
    assert len(prompts) == 50
    found = llamacpp_tokens(tmp_path / "tuned.gguf", prompts, new_tokens=24)
    assert found == [expected[tuple(prompt)] for prompt in prompts]
    answers = llamacpp_tokens(tmp_path / "tuned-q8.gguf", prompts[:5], new_tokens=24)
    assert [len(answer) for answer in answers] == [24] * 5


def has_a_tie(model: Any, prompt: list[int], new: list[int]) -> bool:
    """Whether two tokens were so close somewhere that the order of a sum decides between them."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
    best_T2 = logits_TV.topk(2, dim=-1).values
    return bool((best_T2[:, 0] - best_T2[:, 1]).min() < 1e-3)
