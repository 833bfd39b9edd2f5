"""What a checkpoint lacks, or holds in vain, is refused by every way of loading; transformers would draw it at random."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.load import UserError
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from training.model.layerwise_checkpoint import LayerwiseCheckpoint
from training.model.loading import load_pretrained, load_tokenizer

Tensors = dict[str, torch.Tensor]
Q_PROJ, ROUTER = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.gate.weight"


def without(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not any(part in name for part in parts)}


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def with_(**more: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, **more}


def unmerged(tensors: Tensors) -> Tensors:
    """As peft saves a model whose adapter was not merged."""
    part = Q_PROJ.removesuffix(".weight")
    named = {name.replace(part, f"{part}.base_layer"): tensor for name, tensor in tensors.items()}
    return {**named, f"{part}.lora_A.default.weight": torch.zeros(2, 16)}


def shorter(tensors: Tensors) -> Tensors:
    return {**tensors, Q_PROJ: tensors[Q_PROJ][:-1].contiguous()}


def by_transformers(folder: Path) -> None:
    load_pretrained(str(folder))


def by_layers(folder: Path) -> None:
    LayerwiseCheckpoint(str(folder), dtype=torch.float32).skeleton()


def by_the_engine(folder: Path) -> None:
    with load(folder, EngineOptions("100%")):
        pass


FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], str]] = {
    "wrapper": (prefixed("module."), {}, r"every name begins with 'module\.': save the model without its wrapper"),
    "peft_wrapper": (prefixed("base_model.model."), {}, r"every name begins with 'base_model\.model\.'"),
    "unmerged_adapter": (unmerged, {}, r"q_proj\.lora_A\.default\.weight, an adapter's; merge it"),
    "no_router": (without(ROUTER), {}, rf"lacks {ROUTER}; copy the model again"),
    "no_attention": (without("layers.0.self_attn"), {}, r"lacks model\.layers\.0\.self_attn\.\S+ and \d others"),
    "no_head": (without("lm_head"), {}, r"lacks lm_head\.weight"),
    "no_embeddings": (without("embed_tokens"), {}, r"lacks model\.embed_tokens\.weight"),
    "more_layers": (lambda tensors: tensors, {"num_hidden_layers": 3}, r"lacks model\.layers\.2\."),
    "scales": (with_(**{f"{Q_PROJ}_scale_inv": torch.ones(1)}), {}, r"q_proj\.weight_scale_inv, which .* quantised"),
    "bias": (with_(**{Q_PROJ.replace("weight", "bias"): torch.ones(16)}), {}, r"q_proj\.bias, which the model"),
    "shape": (shorter, {}, r"the weights do not fit config\.json"),
}
WAYS = {"transformers": by_transformers, "layers": by_layers, "engine": by_the_engine}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_are_not_the_models_are_refused(
    fault: str, way: str, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    spoil, config, words = FAULTS[fault]
    folder = Path(shutil.copytree(model_dir("olmoe"), tmp_path / "model"))
    tensors = spoil(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**known, **config}))
    with pytest.raises(UserError, match=words):
        WAYS[way](folder)


@pytest.mark.parametrize("way", WAYS)
def test_what_belongs_to_no_layer_of_the_model_is_left_alone(
    way: str, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_dir("olmoe"), tmp_path / "model"))
    more = {"model.layers.2.eh_proj.weight": torch.ones(2), "model.visual.blocks.0.norm.weight": torch.ones(2)}
    tensors = {**load_file(folder / "model.safetensors"), **more}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    WAYS[way](folder)


class Hub(BaseHTTPRequestHandler):
    """One model of a few bytes, as the hub serves it."""

    files: ClassVar[dict[str, bytes]] = {}

    def do_HEAD(self) -> None:
        self.answer(b"", len(self.files.get(self.path.partition("/resolve/")[2].partition("/")[2], b"")))

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "/resolve/" in path:
            content = self.files[path.partition("/resolve/")[2].partition("/")[2]]
        elif "/tree/" in path:
            entries = [{"type": "file", "path": n, "size": len(c), "oid": "b" * 40} for n, c in self.files.items()]
            content = json.dumps(entries).encode()
        else:
            siblings = [{"rfilename": name} for name in self.files]
            content = json.dumps({"id": "some/model", "sha": "a" * 40, "siblings": siblings}).encode()
        self.answer(content, len(content))

    def answer(self, content: bytes, length: int) -> None:
        self.send_response(200)
        named = {"ETag": f'"{hash(self.path)}"', "X-Repo-Commit": "a" * 40, "Content-Length": str(length)}
        for name, value in named.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_of_a_model_on_the_hub_its_own_weights_templates_and_cards_are_fetched(hub: str, tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    wanted = {
        "model.safetensors.index.json": json.dumps(index).encode(), "model-1-of-2.safetensors": b"1",
        "model-2-of-2.safetensors": b"2", "config.json": b"{}", "tokenizer.model": b"t", "chat_template.jinja": b"c",
        "additional_chat_templates/tools.jinja": b"c", "README.md": b"r", "LICENSE": b"l",
    }  # fmt: skip
    Hub.files = {
        **wanted, "original/consolidated.safetensors": b"x", "original/params.json": b"x", "pytorch_model.bin": b"x",
        "consolidated.safetensors": b"x", "adapter_model.safetensors": b"x", "modeling.py": b"x",
    }  # fmt: skip
    says = "from training.model.loading import local_folder; print(local_folder('some/model'))"
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", says], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip().splitlines()[-1])
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == wanted.keys()


def test_code_in_a_folder_is_not_run_for_its_tokenizer(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(model_dir("qwen2_moe"), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    settings["auto_map"] = {"AutoTokenizer": [None, "mine.Mine"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    code = f"import pathlib\nfrom transformers import PreTrainedTokenizerFast\npathlib.Path({str(ran)!r}).touch()\n"
    (folder / "mine.py").write_text(f"{code}class Mine(PreTrainedTokenizerFast):\n    pass\n", "utf-8")
    with suppress(UserError):
        load_tokenizer(str(folder))
    assert not ran.exists()
