"""The teacher-forced trace: what the routers of a plain forward pass choose, request by request."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.command import run
from configs.load import UserError
from data.batches import tokenize
from evaluation.engine.cache.trace_formats import read_trace
from evaluation.tracing import mean_loss, teacher_forced_trace
from launch import trace as trace_module
from training.model.loading import load_pretrained, load_tokenizer
from training.model.routers import find_routers

MakeModelDir = Callable[[str], Path]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(
        "It is a truth universally acknowledged, that a single man must be in want of a wife.", encoding="utf-8"
    )
    return path


def choices_of_plain_forward(model_dir: Path, request: np.ndarray) -> np.ndarray:
    """[T, L, K] by hooks of this test's own, one request at a time, without padding."""
    model = load_pretrained(str(model_dir))
    seen: list[torch.Tensor] = []
    for router in find_routers(model).values():
        router.register_forward_hook(lambda _, __, output: seen.append(output[2]))
    with torch.no_grad():
        model(input_ids=torch.tensor([request.tolist()]), use_cache=False)
    return torch.stack(seen, dim=1).numpy()


@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe", "mixtral"])
def test_trace_is_what_a_plain_forward_pass_chooses(model_dir: MakeModelDir, text: Path, family: str) -> None:
    folder = model_dir(family)
    documents = tokenize([text.read_text(encoding="utf-8"), "short"], load_tokenizer(str(folder)))
    trace, losses = teacher_forced_trace(load_pretrained(str(folder)), documents, max_length=32, batch_size=3)
    assert np.unique(trace.request_id).tolist() == [0, 1, 2, 3]
    for number, request in enumerate([documents[0][:32], documents[0][32:64], documents[0][64:], documents[1]]):
        expected = choices_of_plain_forward(folder, request)
        assert np.array_equal(trace.expert_ids[trace.request_id == number], expected)
    assert (trace.phase == 1).all()
    assert trace.call.tolist() == list(range(trace.tokens))
    assert ((losses > 0) & (losses < 20 * 31)).all()
    assert len(losses) == 4


def test_losses_are_those_of_plain_transformers_request_by_request(model_dir: MakeModelDir, text: Path) -> None:
    folder = model_dir("qwen2_moe")
    document = tokenize([text.read_text(encoding="utf-8")], load_tokenizer(str(folder)))[0]
    model = load_pretrained(str(folder))
    expected, predicted = [], 0
    for start in range(0, len(document), 32):
        ids = torch.tensor([document[start : start + 32].tolist()])
        with torch.no_grad():
            expected.append(float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1))
        predicted += ids.shape[1] - 1
    trace, losses = teacher_forced_trace(model, [document], max_length=32, batch_size=3)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert mean_loss(trace, losses) == pytest.approx(sum(expected) / predicted, rel=1e-5)


@pytest.mark.parametrize("extension", ["safetensors", "npz", "csv"])
def test_command_writes_a_trace_that_can_be_read(
    model_dir: MakeModelDir, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extension: str
) -> None:
    out = tmp_path / "deep" / f"t.{extension}"
    arguments = [
        "--model",
        str(model_dir("qwen2_moe")),
        "--text-file",
        str(text),
        "--output",
        str(out),
        "--max-length",
        "40",
    ]
    capsys.readouterr()  # what making the model said
    assert run(trace_module.main, arguments) == 0
    trace = read_trace(out, num_experts=8)
    printed = json.loads(capsys.readouterr().out)
    assert printed["n_tokens"] == trace.tokens
    assert printed["chance_reuse_rate"] == trace.top_k / trace.num_experts


def test_a_budget_changes_nothing_of_what_is_traced(
    model_dir: MakeModelDir, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", str(model_dir("qwen2_moe")), "--text-file", str(text), "--max-length", "40"]
    printed: list[Any] = []
    capsys.readouterr()  # what making the model said
    for name, budget in (("all", []), ("paged", ["--expert-cache", "30%"]), ("both", ["--memory-budget", "1GiB"])):
        trace_module.main([*given, "--output", str(tmp_path / f"{name}.csv"), *budget])
        printed.append(json.loads(capsys.readouterr().out))
    assert all(one | {"trace": ""} == printed[0] | {"trace": ""} for one in printed)
    assert len({(tmp_path / f"{name}.csv").read_text() for name in ("all", "paged", "both")}) == 1
    with pytest.raises(UserError, match="exactly one of expert_cache"):
        trace_module.main([*given, "--output", "x.csv", "--expert-cache", "30%", "--memory-budget", "1GiB"])


def test_nothing_to_trace_is_refused(model_dir: MakeModelDir) -> None:
    model = load_pretrained(str(model_dir("qwen2_moe")))
    with pytest.raises(UserError, match="no text of two tokens to trace among 1; give more text"):
        teacher_forced_trace(model, [np.array([5])], max_length=8)


def test_an_unknown_format_is_refused_before_the_model_is_loaded(text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"extension '\.pt' names no format; use one of \.safetensors, \.npz"):
        trace_module.main(["--model", "none", "--text-file", str(text), "--output", str(tmp_path / "t.pt")])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"  \n", "is empty"),
        (b"\xff\xfe", "not UTF-8"),
        (None, "does not exist"),
    ],
)
def test_text_that_cannot_be_traced_is_one_clear_message(
    model_dir: MakeModelDir, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, words: str
) -> None:
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    code = run(
        trace_module.main,
        ["--model", str(model_dir("qwen2_moe")), "--text-file", str(path), "--output", str(tmp_path / "o.csv")],
    )
    assert code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "o.csv").exists()
