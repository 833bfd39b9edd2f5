"""Folders that people might have: 300 seeded mutations of a tiny checkpoint through one step of training, decoding and export.

Each ends as plain transformers does, token by token and router by router, or is refused with a message; never silently
otherwise, never with a traceback.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, OlmoeConfig

from configs.load import UserError
from evaluation.benchmark.families import make_tiny
from evaluation.engine.generation_settings import take_stop_strings
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from launch import export
from tests.conftest import SMALL
from training.arguments import TrainArguments
from training.loop import train
from training.run_folder import router_delta

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SEEDS, TOGETHER = 300, 30
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CONFIG_VALUES: dict[str, list[Any]] = {
    "num_hidden_layers": [0, 1, 3, "two", None], "num_experts": [1, 7, 9, None],
    "num_experts_per_tok": [0, 1, 8, 9, "two", None], "hidden_size": [8, 24], "vocab_size": [17, 300],
    "intermediate_size": [8, None], "num_attention_heads": [1, 3], "num_key_value_heads": [1, None],
    "norm_topk_prob": [True, "yes"], "tie_word_embeddings": [True], "model_type": ["qwen3_moe", "llama", "x"],
    "dtype": ["bfloat16", "float16", "float99", None], "architectures": [["LlamaForCausalLM"], [], None],
    "rms_norm_eps": [1e-3, "small"], "rope_theta": [100.0], "hidden_act": ["gelu", "none"],
    "max_position_embeddings": [8, None], "eos_token_id": [5, [5, 6], None], "text_config": [{}], "attention_bias": [True],
    "quantization_config": [{"quant_method": "gptq", "bits": 4}, {}], "extra": [1], "pad_token_id": [None, 999],
    "clip_qkv": [0.5], "auto_map": [{"AutoModelForCausalLM": "modeling.Mine"}],
}  # fmt: skip
GENERATION: list[str] = [
    "", "{", "[]", "{}", '{"stop_strings": ["a"]}', '{"return_dict_in_generate": true}', '{"token_healing": true}',
    '{"num_return_sequences": 3}', '{"output_scores": true}', '{"cache_implementation": "static"}', '{"do_sample": true}',
    '{"repetition_penalty": 1.3}', '{"eos_token_id": [3, 4]}', '{"num_beams": 4}', '{"max_length": 5}',
]  # fmt: skip


class Folder:
    """A copy of the checkpoint, in one file or in two shards, that is changed."""

    def __init__(self, path: Path, draw: random.Random, *, sharded: bool) -> None:
        self.path, self.draw, self.sharded = path, draw, sharded
        self.tensors: dict[str, Tensor] = load_file(path / SINGLE)
        self.config: dict[str, Any] = json.loads((path / "config.json").read_text())
        self.left_behind = False

    def name(self) -> str:
        return self.draw.choice(sorted(self.tensors))

    def write(self) -> None:
        (self.path / "config.json").write_text(json.dumps(self.config))
        if not self.sharded:
            save_file(self.tensors, self.path / SINGLE, {"format": "pt"})
            return
        if not self.left_behind:
            (self.path / SINGLE).unlink()
        names, weight_map = sorted(self.tensors), {}
        for number, part in enumerate((names[::2], names[1::2]), start=1):
            shard = f"model-0000{number}-of-00002.safetensors"
            save_file({name: self.tensors[name] for name in part}, self.path / shard, {"format": "pt"})
            weight_map |= dict.fromkeys(part, shard)
        (self.path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def prefixed(folder: Folder) -> None:
    prefix = folder.draw.choice(["module.", "base_model.model.", "_orig_mod.", "model."])
    folder.tensors = {prefix + name: tensor for name, tensor in folder.tensors.items()}


def without_prefix(folder: Folder) -> None:
    folder.tensors = {name.removeprefix("model."): tensor for name, tensor in folder.tensors.items()}


def lacking(folder: Folder) -> None:
    for _ in range(folder.draw.choice([1, 1, 3])):
        del folder.tensors[folder.name()]


def lacking_routers(folder: Folder) -> None:
    folder.tensors = {name: tensor for name, tensor in folder.tensors.items() if "mlp.gate.weight" not in name}


def another_shape(folder: Folder) -> None:
    name = folder.name()
    tensor = folder.tensors[name]
    shapes = [tensor[:-1], tensor[None], tensor.flatten(), tensor[:0]]
    folder.tensors[name] = folder.draw.choice(shapes).clone()


def another_dtype(folder: Folder) -> None:
    dtype = folder.draw.choice([torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.float8_e4m3fn])
    names = folder.draw.choice([[folder.name()], list(folder.tensors)])
    folder.tensors |= {name: folder.tensors[name].to(dtype) for name in names}


def not_finite(folder: Folder) -> None:
    folder.tensors[folder.name()].view(-1)[0] = folder.draw.choice([float("nan"), float("inf")])


def more(folder: Folder) -> None:
    added = ["model.layers.0.mlp.gate.bias", "model.layers.7.mlp.gate.weight", "mtp.layers.0.mlp.experts.0.up_proj.weight",
             "model.layers.0.self_attn.q_proj.lora_A.weight", "vision.patch.weight", "model.layers.1.mlp.gate.weight_scale",
             "model.layers.1.mlp.experts.8.up_proj.weight", "x"]  # fmt: skip
    folder.tensors[folder.draw.choice(added)] = torch.ones(folder.draw.choice([1, 8]), 16)


def config_value(folder: Folder) -> None:
    key = folder.draw.choice(sorted(CONFIG_VALUES))
    folder.config[key] = folder.draw.choice(CONFIG_VALUES[key])
    if folder.config[key] is None:
        del folder.config[key]


def generation_config(folder: Folder) -> None:
    (folder.path / "generation_config.json").write_text(folder.draw.choice(GENERATION))


def two_sets_of_weights(folder: Folder) -> None:
    folder.sharded = folder.left_behind = True


def nothing(folder: Folder) -> None:
    pass


BEFORE = (prefixed, without_prefix, lacking, lacking, lacking_routers, another_shape, another_shape, another_dtype,
          another_dtype, not_finite, more, more, config_value, config_value, config_value, config_value,
          generation_config, two_sets_of_weights, nothing)  # fmt: skip


def cut(path: Path, draw: random.Random) -> None:
    file = draw.choice(sorted(path.glob("*.safetensors")))
    file.write_bytes(file.read_bytes()[: draw.choice([0, 7, 300, file.stat().st_size - 5])])


def gone(path: Path, draw: random.Random) -> None:
    draw.choice(sorted(path.iterdir())).unlink()


def garbled(path: Path, draw: random.Random) -> None:
    draw.choice(sorted(path.glob("*.json"))).write_text(draw.choice(["", "{", "[]", "null", '{"a": 1}']))


def stray(path: Path, draw: random.Random) -> None:
    name = draw.choice(["adapter_model.safetensors", "consolidated.safetensors", "model-00003-of-00003.safetensors"])
    save_file({"model.layers.0.mlp.gate.weight": torch.ones(8, 16)}, path / name)


def wrong_index(path: Path, draw: random.Random) -> None:
    if (path / INDEX).is_file():
        index = json.loads((path / INDEX).read_text())
        name = draw.choice(sorted(index["weight_map"]))
        shard, without = "model-00001-of-00002.safetensors", {**index["weight_map"]}
        del without[name]
        maps = [
            {**without, name: "model-00009-of-00002.safetensors"},
            {**index["weight_map"], "extra": shard},
            without,
            {},
        ]
        index["weight_map"] = draw.choice(maps)
        (path / INDEX).write_text(json.dumps(index))


AFTER: tuple[Callable[[Path, random.Random], None] | None, ...] = (
    None,
    None,
    None,
    cut,
    gone,
    garbled,
    stray,
    wrong_index,
)


def mutated(base: Path, path: Path, seed: int) -> str:
    """Make the folder of a seed; what was done to it."""
    draw = random.Random(seed)
    folder = Folder(Path(shutil.copytree(base, path)), draw, sharded=draw.random() < 0.5)
    before, after = draw.choice(BEFORE), draw.choice(AFTER)
    before(folder)
    folder.write()
    if after is not None:
        after(path, draw)
    return f"{before.__name__}, {after.__name__ if after else 'whole'}, {'sharded' if folder.sharded else 'single'}"


PROMPT = torch.randint(1, 256, (1, 6), generator=torch.Generator().manual_seed(3))
OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "num_beams": 1}


def plain(path: Path) -> Any:
    """transformers' model; None where it fails, or fills in what is missing."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, trust_remote_code=False)
        return None if info["missing_keys"] or info["mismatched_keys"] else model.eval()
    except Exception:
        return None


def plain_tokens(path: Path) -> Tensor | None:
    """What that model decodes; None where it fails."""
    options = {**OPTIONS, "attention_mask": torch.ones_like(PROMPT), "return_dict_in_generate": False}
    try:
        model = plain(path)
        take_stop_strings(model)
        return model.generate(PROMPT, **options, num_return_sequences=1, cache_implementation=None)
    except Exception:
        return None


def decoded(path: Path) -> Tensor | None:
    try:
        with load(path, EngineOptions("60%", warn=False)) as (model, _):
            take_stop_strings(model)  # as the server does, which has the tokenizer for them
            tokens: Tensor = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **OPTIONS)
            return tokens
    except UserError:
        return None


def trained_and_exported(path: Path, text_file: Path, out: Path) -> dict[str, Tensor] | None:
    """The routers that one step has tuned, once they are in an exported folder."""
    args = {"model_name_or_path": str(path), "output_dir": str(out / "run"), "train_file": str(text_file), "max_length": 8,
            "max_steps": 1, "per_device_train_batch_size": 1, "warmup_steps": 0, "learning_rate": 0.01, "lags": [1],
            "working_set_window": 2, "reuse_warmup_steps": 0, "consistency_warmup_steps": 0}  # fmt: skip
    try:
        delta = train(TrainArguments(**args))
        export.main(["--model", str(path), "--router-delta", str(delta), "--output", str(out / "exported")])
    except UserError:
        return None
    return router_delta.load_for(path, delta)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_tiny(OlmoeConfig(**SMALL, num_experts=8, num_experts_per_tok=2, intermediate_size=16), folder)
    return folder


@pytest.mark.parametrize("first", range(0, SEEDS, TOGETHER))
def test_every_folder_ends_as_in_transformers_or_with_a_message(
    first: int, base: Path, text_file: Path, tmp_path: Path
) -> None:
    wrong, ran = [], 0
    for seed in range(first, first + TOGETHER):
        path = tmp_path / str(seed)
        what = f"{seed}: {mutated(base, path, seed)}"
        try:
            tokens, routers = decoded(path), trained_and_exported(path, text_file, tmp_path / f"{seed}-out")
        except Exception as error:
            wrong.append(f"{what}: {type(error).__name__}: {error}")
            continue
        if tokens is not None:
            ran += 1
            if (expected := plain_tokens(path)) is None or not torch.equal(tokens, expected):
                wrong.append(f"{what}: decoded {tokens.tolist()}, transformers {expected}")
        if routers is not None:
            found = plain(exported := tmp_path / f"{seed}-out" / "exported")
            state = found.state_dict() if found is not None else {}
            files = [load_file(file) for file in exported.glob("*.safetensors")]
            dtypes = {
                name.split("layers.")[-1]: t.dtype for tensors in files for name, t in tensors.items()
            }  # as stored
            for name, tensor in routers.items():
                expected = tensor.to(dtypes[name.split("layers.")[-1]])
                if name not in state or not torch.equal(state[name], expected.to(state[name].dtype)):
                    wrong.append(f"{what}: the exported router {name} is not the tuned one")
    assert not wrong, "\n".join(wrong)
    assert ran > TOGETHER // 8, "most folders are refused: that is no test"
