"""Traces in other people's formats: what is written is read, and what is wrong is named with its place."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from configs.load import UserError
from evaluation.engine.cache.counts import DECODE
from evaluation.engine.cache.replay import requests_of
from evaluation.engine.cache.trace import RouteTrace
from evaluation.engine.cache.trace_formats import read_trace, write_trace
from tests.evaluation.engine.cache.made_traces import fixed_trace, teacher_forced, traces


def assert_same(found: RouteTrace, expected: RouteTrace) -> None:
    for name in ("expert_ids", "phase", "request_id"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    assert requests_of(found) == requests_of(expected)


@pytest.mark.parametrize("extension", [".safetensors", ".npz", ".csv"])
@given(trace=traces())
@settings(max_examples=50, deadline=None, derandomize=True)
def test_any_trace_survives_the_round_trip(
    extension: str, trace: RouteTrace, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("trace") / f"t{extension}"
    write_trace(trace, path)
    assert_same(read_trace(path), trace)
    assert [found.name for found in path.parent.iterdir()] == [path.name]


@given(trace=traces(longest_call=1))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_npy_holds_one_request_of_single_tokens_and_nothing_else(
    trace: RouteTrace, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("trace") / "t.npy"
    if trace.request_id[0] == trace.request_id[-1]:
        write_trace(trace, path)
        read = read_trace(path)
        assert np.array_equal(read.expert_ids, trace.expert_ids)
        assert len(requests_of(read)[0]) == len(requests_of(trace)[0])
    else:
        with pytest.raises(UserError, match=r"no place for several requests.*write \.npz, \.csv or \.safetensors"):
            write_trace(trace, path)
        assert not path.exists()


def test_npz_keeps_all_facts_and_csv_the_layers(tmp_path: Path) -> None:
    trace = RouteTrace(
        fixed_trace(4).expert_ids, phase=np.zeros(4, int), request_id=np.full(4, 3), call=np.array([0, 0, 2, 2]),
        num_experts=64, layer_ids=(1, 2, 5), expert_bytes=4096, model="some/model",
    )  # fmt: skip
    for name in ("t.npz", "t.csv"):
        write_trace(trace, tmp_path / name)
    full, rows = read_trace(tmp_path / "t.npz"), read_trace(tmp_path / "t.csv", num_experts=64)
    for found in (full, rows):
        assert_same(found, trace)
        assert (found.layer_ids, found.num_experts) == ((1, 2, 5), 64)
    assert (full.expert_bytes, full.model) == (4096, "some/model")
    assert (rows.expert_bytes, rows.model) == (None, "")
    assert full.call.tolist() == [0, 0, 2, 2]


def test_vllm_arrays_one_or_several(tmp_path: Path) -> None:
    first, second = fixed_trace(5).expert_ids.astype(np.int32), fixed_trace(3).expert_ids.astype(np.int32)
    np.save(tmp_path / "one.npy", first)
    one = read_trace(tmp_path / "one.npy")
    assert_same(one, teacher_forced(first.tolist(), experts=12))
    assert (one.num_experts, one.layer_ids) == (int(first.max()) + 1, (0, 1, 2))
    assert read_trace(tmp_path / "one.npy", num_experts=64).num_experts == 64
    np.savez(tmp_path / "two.npz", first, second)
    two = read_trace(tmp_path / "two.npz")
    assert two.request_id.tolist() == [0] * 5 + [1] * 3
    assert (two.phase == DECODE).all()
    assert np.array_equal(two.expert_ids[5:], second)


def save_npz(path: Path, **arrays: Any) -> None:
    np.savez(path, **arrays)


IDS = np.array([[[0, 1]], [[2, 1]]])


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"a": IDS[0]}, r"a has shape \[1, 2\]; a request is \[tokens, layers, top_k\]"),
        ({"a": IDS[:0]}, r"a has shape \[0, 1, 2\]"),
        ({"a": IDS + 0.5}, "a holds float64, expert ids are integers"),
        ({"a": IDS, "b": np.concatenate([IDS, IDS], axis=1)}, r"requests differ in \[layers, top_k\] \(a \[1, 2\], b \[2, 2\]"),
        ({"a": IDS * 0}, "token 0 chose an expert twice"),
        ({"a": IDS - 1}, "expert ids from -1 to 1"),
        ({"expert_ids": IDS, "weights": IDS}, "unknown array 'weights' beside expert_ids; known: expert_ids, phase"),
        ({"expert_ids": IDS, "call": np.array([1, 0])}, "call goes down"),
        ({"expert_ids": IDS, "num_experts": np.array(2)}, "expert ids from 0 to 2, but there are 2 experts"),
        ({"expert_ids": IDS, "num_experts": np.array("many")}, "must be single numbers"),
        ({"expert_ids": IDS, "layer_ids": np.array(3)}, "layer_ids a list of them"),
    ],
)  # fmt: skip
def test_arrays_that_are_no_trace_are_named(arrays: dict[str, Any], words: str, tmp_path: Path) -> None:
    save_npz(tmp_path / "t.npz", **arrays)
    with pytest.raises(UserError, match=rf"t\.npz: .*{words}"):
        read_trace(tmp_path / "t.npz")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"t\.npy does not exist; write one with `remoe trace`"):
        read_trace(tmp_path / "t.npy")
    with pytest.raises(UserError, match=r"extension '\.json' names no format; use one of \.safetensors, \.npz"):
        read_trace(tmp_path / "t.json")
    with pytest.raises(UserError, match=r"extension '' names no format"):
        write_trace(fixed_trace(3), tmp_path / "t")
    for content in (b"", b"PK\x03\x04 cut off", b"\x93NUMPY\x01"):
        (tmp_path / "t.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"t\.npz is no readable numpy file"):
            read_trace(tmp_path / "t.npz")
    np.save(tmp_path / "t.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(UserError, match=r"t\.npy is no readable numpy file"):
        read_trace(tmp_path / "t.npy")


@pytest.mark.parametrize("extension", [".safetensors", ".npz", ".csv"])
def test_what_the_command_line_says_must_agree_with_the_file(extension: str, tmp_path: Path) -> None:
    path = tmp_path / f"t{extension}"
    write_trace(fixed_trace(5), path)
    assert read_trace(path, num_experts=12, top_k=3).num_experts == 12
    with pytest.raises(UserError, match=r"top_k 3, not 2; leave --top-k out|has 3 experts in layer 0, not 2"):
        read_trace(path, top_k=2)
    if extension != ".csv":
        with pytest.raises(UserError, match="num_experts 12, not 64; leave --num-experts out"):
            read_trace(path, num_experts=64)


@pytest.mark.parametrize("extension", [".safetensors", ".npz", ".npy", ".csv"])
def test_a_full_disk_is_told_as_one_and_keeps_the_trace_that_was_there(extension: str, full_disk: Path) -> None:
    path = full_disk / f"t{extension}"
    draw = np.random.default_rng(0)

    def single_tokens(tokens: int) -> RouteTrace:
        nothing = np.zeros(tokens, np.int32)
        ids_TLK = draw.permuted(np.tile(np.arange(64), (tokens, 2, 1)), axis=2)[..., :4]
        return RouteTrace(ids_TLK, nothing + DECODE, nothing, np.arange(tokens), num_experts=64, layer_ids=(0, 1))

    write_trace(single_tokens(10), path)
    before = path.read_bytes()
    with pytest.raises(OSError, match="No space left on device") as full:
        write_trace(single_tokens(50_000), path)
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_bytes() == before
    assert list(full_disk.iterdir()) == [path]


def test_dense_layers_of_vllm_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A model whose first layer is dense: vLLM's `routed_experts` has zeros there."""
    trace = fixed_trace(8)
    ids = np.concatenate([np.zeros_like(trace.expert_ids[:, :1]), trace.expert_ids], axis=1).astype(np.int32)
    np.save(tmp_path / "t.npy", ids)
    found = read_trace(tmp_path / "t.npy")
    assert np.array_equal(found.expert_ids, trace.expert_ids)
    assert found.layer_ids == tuple(range(1, trace.layers + 1))
    assert "layers 0 hold no expert but 0" in caplog.text


@pytest.mark.parametrize(("filler", "dtype"), [(255, np.uint8), (-1, np.int16), (65535, np.uint16)])
def test_padding_is_no_expert(filler: int, dtype: Any, tmp_path: Path) -> None:
    ids = np.array([[[1], [2]], [[3], [1]], [[filler], [filler]]], dtype=dtype)
    np.save(tmp_path / "t.npy", ids)
    with pytest.raises(UserError, match=rf"token 2 holds {filler} everywhere, as padding does; cut such tokens off"):
        read_trace(tmp_path / "t.npy")
    np.save(tmp_path / "t.npy", ids[:2])
    assert read_trace(tmp_path / "t.npy").num_experts == 4


def test_256_experts_of_which_the_last_is_chosen_are_read_if_that_is_said(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.array([[[1], [2]], [[255], [255]]], dtype=np.uint8))
    assert read_trace(tmp_path / "t.npy", num_experts=256).expert_ids.max() == 255


def test_one_wild_number_is_no_expert(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.array([[[1, 2]], [[3, 2**40]]]))
    with pytest.raises(UserError, match=r"more than any model has: that is no expert's number"):
        read_trace(tmp_path / "t.npy")


@pytest.mark.parametrize(
    "text",
    [
        "\ufefflayer,expert\n0,1\n0,2\n1,1\n1,2\n", '"layer","expert"\r\n"0","1"\r\n"0","2"\r\n"1","1"\r\n"1","2"\r\n',
        "layer;expert\n0;1\n0;2\n1;1\n1;2\n", "layer\texpert\n0\t1\n0\t2\n1\t1\n1\t2\n",
    ],
)  # fmt: skip
def test_a_csv_that_a_spreadsheet_has_written_is_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text, encoding="utf-8", newline="")
    assert read_trace(tmp_path / "t.csv").expert_ids.tolist() == [[[1, 2], [1, 2]]]
