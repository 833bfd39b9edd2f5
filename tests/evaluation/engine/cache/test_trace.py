"""The trace file: what is written is read, and what is no trace is named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from configs.load import UserError
from evaluation.engine.cache.trace import RouteTrace, TraceRecorder
from evaluation.engine.cache.trace_formats import read_trace, write_trace


def arguments(**changes: Any) -> dict[str, Any]:
    """Of a valid trace: a prompt of two tokens, one decoded token, then another request."""
    return {
        "expert_ids": np.arange(4 * 2 * 3).reshape(4, 2, 3) % 9,
        "phase": np.array([0, 0, 1, 1]),
        "request_id": np.array([0, 0, 0, 3]),
        "call": np.array([0, 0, 1, 2]),
        "num_experts": 9,
        "layer_ids": (1, 3),
        "expert_bytes": 4608,
        "model": "some/model",
        **changes,
    }


@pytest.mark.parametrize(("num_experts", "dtype"), [(9, np.uint8), (256, np.uint8), (257, np.int16)])
def test_a_trace_survives_the_round_trip(tmp_path: Path, num_experts: int, dtype: type) -> None:
    ids = np.arange(24).reshape(4, 2, 3) % 9
    ids[0, 0, 0] = num_experts - 1
    trace = RouteTrace(**arguments(num_experts=num_experts, expert_ids=ids))
    write_trace(trace, tmp_path / "t.safetensors")
    found = read_trace(tmp_path / "t.safetensors")
    assert found.expert_ids.dtype == dtype
    for name in ("expert_ids", "phase", "request_id", "call"):
        assert np.array_equal(getattr(found, name), getattr(trace, name))
    for name in ("num_experts", "layer_ids", "expert_bytes", "model", "tokens", "layers", "top_k"):
        assert getattr(found, name) == getattr(trace, name)
    assert [path.name for path in tmp_path.iterdir()] == ["t.safetensors"]


def test_some_tokens_of_a_trace_keep_their_calls_and_requests() -> None:
    trace = RouteTrace(**arguments())
    kept = trace.where(np.array([False, True, False, True]))
    assert np.array_equal(kept.expert_ids, trace.expert_ids[[1, 3]])
    assert (kept.phase.tolist(), kept.request_id.tolist(), kept.call.tolist()) == ([0, 1], [0, 3], [0, 2])
    assert (kept.num_experts, kept.layer_ids, kept.expert_bytes, kept.model) == (9, (1, 3), 4608, "some/model")
    assert kept.as_one_request().request_id.tolist() == [0, 0]
    with pytest.raises(UserError, match="it is empty"):
        trace.where(np.zeros(4, bool))


def test_whoever_may_read_other_files_may_read_a_trace(tmp_path: Path) -> None:
    write_trace(RouteTrace(**arguments()), tmp_path / "t.safetensors")
    (tmp_path / "other").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_unknown_expert_bytes_stay_unknown(tmp_path: Path) -> None:
    write_trace(RouteTrace(**arguments(expert_bytes=None)), tmp_path / "t.safetensors")
    assert read_trace(tmp_path / "t.safetensors").expert_bytes is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"expert_ids": np.zeros((4, 2), int)}, r"must be \[tokens, layers, top_k\], found shape \[4, 2\]"),
        ({"expert_ids": np.zeros((0, 2, 3), int)}, "it is empty"),
        ({"expert_ids": np.zeros((4, 2, 3))}, "expert_ids must hold integers, found float64"),
        ({"phase": np.zeros(4)}, "phase must hold integers, found float64"),
        ({"phase": np.zeros(5, int)}, r"phase has shape \[5\], expert_ids has 4 tokens"),
        ({"layer_ids": (1,)}, "1 layer ids for 2 layers"),
        ({"num_experts": 8}, "expert ids from 0 to 8, but there are 8 experts"),
        ({"expert_ids": np.array([[[1, 2, 0]] * 2] * 3 + [[[1, 2, 0], [1, 2, 1]]])}, "token 3 chose an expert twice"),
        ({"phase": np.array([0, 0, 2, 1])}, "phase holds values other than 0"),
        ({"call": np.array([0, 0, 2, 1])}, "call goes down"),
        ({"phase": np.array([0, 1, 1, 1])}, "tokens of one call differ in phase"),
        ({"request_id": np.array([0, 1, 1, 1])}, "tokens of one call differ in request_id"),
        ({"request_id": np.array([0, 0, 1, 0])}, "a request comes back"),
    ],
)
def test_what_does_not_hold_together_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        RouteTrace(**arguments(**changes))


def write(path: Path, metadata: dict[str, str] | None, **tensors: Any) -> Path:
    everything = {"format": "remoe-route-trace", "version": "1", "num_experts": "9", "layer_ids": "[1]"}
    everything |= {"expert_bytes": "", "model": "", "top_k": "2", **(metadata or {})}
    save_file(tensors or {"expert_ids": np.zeros((1, 1, 2), np.uint8)}, path, everything)
    return path


ONE_TOKEN = {
    "expert_ids": np.array([[[3, 0]]], np.uint8),
    **{name: np.zeros(1, np.int32) for name in ("phase", "request_id", "call")},
}


def test_files_that_are_no_traces_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with pytest.raises(UserError, match=r"t\.safetensors does not exist; write one with"):
        read_trace(path)
    path.write_text("hello")
    with pytest.raises(UserError, match="is not a safetensors file"):
        read_trace(path)
    with pytest.raises(UserError, match="is no routing trace: its format is 'pt'"):
        read_trace(write(path, {"format": "pt"}, **ONE_TOKEN))
    with pytest.raises(UserError, match="of version '2', this program reads '1'"):
        read_trace(write(path, {"version": "2"}, **ONE_TOKEN))
    with pytest.raises(UserError, match="without phase, request_id, call; write it again"):
        read_trace(write(path, None))
    with pytest.raises(UserError, match=r"t\.safetensors: num_experts and expert_bytes must be single numbers"):
        read_trace(write(path, {"num_experts": "many"}, **ONE_TOKEN))
    with pytest.raises(UserError, match=r"t\.safetensors: .*there are 0 experts"):
        read_trace(write(path, {"num_experts": "0"}, **ONE_TOKEN))
    assert read_trace(write(path, None, **ONE_TOKEN)).tokens == 1


def test_the_recorder_numbers_calls_and_requests_and_drops_what_was_cut_off() -> None:
    recorder = TraceRecorder(layers=2)
    with pytest.raises(UserError, match="nothing was recorded yet"):
        recorder.trace(num_experts=9, layer_ids=(0, 1), expert_bytes=None, model="")
    recorder.begin_request()  # nothing came yet: the first request keeps number 0
    for phase, tokens in ((0, 3), (1, 1)):
        recorder.begin_call(phase)
        recorder.add_layer(np.tile([4, 0], (tokens, 1)))
        recorder.add_layer(np.tile([5, 0], (tokens, 1)))
    recorder.begin_call(1)
    recorder.add_layer(np.array([[8, 0]]))  # this call fails before its second layer
    recorder.begin_request()
    recorder.begin_call(1)
    recorder.add_layer(np.array([[6, 0]]))
    recorder.add_layer(np.array([[7, 0]]))
    trace = recorder.trace(num_experts=9, layer_ids=(0, 1), expert_bytes=None, model="")
    assert trace.call.tolist() == [0, 0, 0, 1, 2]
    assert trace.phase.tolist() == [0, 0, 0, 1, 1]
    assert trace.request_id.tolist() == [0, 0, 0, 0, 1]
    assert trace.expert_ids[:, :, 0].tolist() == [[4, 5], [4, 5], [4, 5], [4, 5], [6, 7]]
