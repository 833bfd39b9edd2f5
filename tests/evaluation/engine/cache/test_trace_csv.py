"""CSV traces: llama.cpp's rows, rows with more columns, and every mistake with its line."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from configs.load import UserError
from evaluation.engine.cache.pool import event_order
from evaluation.engine.cache.replay import requests_of
from evaluation.engine.cache.trace import RouteTrace
from evaluation.engine.cache.trace_csv import read_csv, write_csv
from tests.evaluation.engine.cache.made_traces import fixed_trace, traces


def read(tmp_path: Path, text: str, **said: int) -> RouteTrace:
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    return read_csv(tmp_path / "t.csv", **said)


def rows(*rows: tuple[int, ...]) -> str:
    return "".join(",".join(map(str, row)) + "\n" for row in rows)


def llama_rows(trace: RouteTrace, *, last_layer_tokens: int | None = None) -> str:
    """As llama.cpp's eval callback comes by them: call by call, layer by layer, token by token."""
    written = []
    for call in np.unique(trace.call):
        tokens = np.flatnonzero(trace.call == call)
        for layer in range(trace.layers):
            computed = tokens[-last_layer_tokens:] if last_layer_tokens and layer == trace.layers - 1 else tokens
            written += [(trace.layer_ids[layer], int(e)) for token in computed for e in trace.expert_ids[token, layer]]
    return rows(*written)


def prompt_and_tokens() -> RouteTrace:
    """A prompt of four tokens, then six single ones; 3 layers, 3 experts of a token."""
    return RouteTrace(
        fixed_trace(10).expert_ids, phase=np.array([0] * 4 + [1] * 6), request_id=np.zeros(10, int),
        call=np.array([0] * 4 + list(range(1, 7))), num_experts=12, layer_ids=(1, 2, 4),
    )  # fmt: skip


@pytest.mark.parametrize("header", ["", "layer,expert\n"])
def test_rows_of_layer_and_expert_tell_calls_and_tokens(header: str, tmp_path: Path) -> None:
    trace = prompt_and_tokens()
    found = read(tmp_path, header + llama_rows(trace), num_experts=12)
    for name in ("expert_ids", "phase", "request_id", "call"):
        assert np.array_equal(getattr(found, name), getattr(trace, name)), name
    assert (found.layer_ids, found.num_experts) == ((1, 2, 4), 12)


@pytest.mark.parametrize("last_layer_tokens", [1, 2])
def test_tokens_that_the_last_layer_leaves_out_bring_it_no_expert(last_layer_tokens: int, tmp_path: Path) -> None:
    trace = prompt_and_tokens()
    found = read(tmp_path, llama_rows(trace, last_layer_tokens=last_layer_tokens))
    assert np.array_equal(found.expert_ids[:, :-1], trace.expert_ids[:, :-1])
    expected = requests_of(trace)[0]
    computed = event_order(trace.expert_ids[4 - last_layer_tokens : 4, -1])
    expected[2] = expected[2]._replace(keys=[(2, expert) for expert in computed])
    assert requests_of(found)[0] == expected


def test_top_k_can_be_said_where_a_trace_has_prompts_only(tmp_path: Path) -> None:
    text = rows((0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (1, 2), (1, 3), (1, 4))
    assert read(tmp_path, text).top_k == 4
    assert read(tmp_path, text, top_k=2).expert_ids.tolist() == [[[1, 2], [1, 2]], [[3, 4], [3, 4]]]


def test_a_phase_column_makes_a_prompt_one_call(tmp_path: Path) -> None:
    text = "phase,token,layer,rank,expert\n" + "".join(
        f"{phase},{token},{layer},{rank},{expert}\n"
        for phase, token, layer, rank, expert in [
            ("prefill", 0, 0, 0, 5), ("prefill", 0, 0, 1, 3), ("prefill", 1, 0, 1, 4), ("prefill", 1, 0, 0, 6),
            ("prefill", 1, 1, 0, 2), ("prefill", 1, 1, 1, 1), ("decode", 2, 0, 0, 7), ("decode", 2, 0, 1, 0),
            ("decode", 2, 1, 0, 1), ("decode", 2, 1, 1, 0),
        ]
    )  # fmt: skip
    trace = read(tmp_path, text)
    assert trace.call.tolist() == [0, 0, 1]
    assert trace.phase.tolist() == [0, 0, 1]
    assert trace.expert_ids[:2].tolist() == [[[5, 3], [2, 1]], [[6, 4], [2, 1]]]  # token 0 has no rows in layer 1


def test_requests_keep_their_order_and_rows_need_none(tmp_path: Path) -> None:
    text = "request,token,layer,expert\n" + rows(
        (7, 1, 0, 4), (7, 0, 0, 3), (2, 0, 0, 1), (7, 0, 1, 8), (7, 1, 1, 6), (2, 0, 1, 0)
    )
    trace = read(tmp_path, text)
    assert trace.request_id.tolist() == [7, 7, 2]
    assert trace.expert_ids.tolist() == [[[3], [8]], [[4], [6]], [[1], [0]]]
    assert trace.phase.tolist() == [1, 1, 1]


@given(trace=traces())
@settings(max_examples=50, deadline=None, derandomize=True)
def test_rows_in_any_order_give_the_same_trace(trace: RouteTrace, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    write_csv(trace, path)
    header, *lines = path.read_text().splitlines()
    ranked = [f"{line},{row % trace.top_k}" for row, line in enumerate(lines)]
    first_of_requests = {line.split(",")[0]: line for line in reversed(ranked)}
    shuffled = [
        *dict.fromkeys([*list(first_of_requests.values())[::-1], *np.random.default_rng(0).permutation(ranked)])
    ]
    path.write_text("\n".join([f"{header},rank", *shuffled]))
    found = read_csv(path)
    assert np.array_equal(found.expert_ids, trace.expert_ids)
    assert requests_of(found) == requests_of(trace)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"t\.csv:1: there are no rows"),
        ("layer,expert\n", r"t\.csv:1: there are no rows"),
        ("layer,weight\n0,1\n", r"t\.csv:1: unknown column 'weight'; known: request, call, phase, token, layer"),
        ("token,layer\n0,1\n", r"t\.csv:1: no column expert"),
        ("layer,expert,layer\n0,1,0\n", r"t\.csv:1: column layer comes twice"),
        ("call,layer,expert\n0,1,0\n", r"t\.csv:1: a column call, but none that says which token"),
        ("0,1\n0,1,2\n", r"t\.csv:2: '0,1,2' has 3 cells, not 2 \(layer,expert\)"),
        ("layer,expert\n0,1\n\n1,1\n", r"t\.csv:3: '' has 1 cells, not 2"),
        ("0,1\n0,x\n", r"t\.csv:2: expert is 'x'; write a whole number"),
        ("0,1\n0,1.0\n", r"t\.csv:2: expert is '1\.0'; write a whole number"),
        ("0,1\n0,99999999999999999999\n", r"t\.csv:2: expert is '9{20}'"),
        ("0,1\n-1,2\n", r"t\.csv:2: layer is '-1'; write a whole number from 0"),
        ("0,1\n1,9\n", r"t\.csv:2: expert 9, but there are 9 experts"),
        ("phase,layer,expert\nprompt,0,1\n", r"t\.csv:2: phase is 'prompt'; write prefill or decode"),
        ("0,1\n0,2\n", r"t\.csv:1: all rows are of layer 0, so tokens cannot be told apart; add a column token"),
        (rows((0, 1), (0, 2), (1, 1), (1, 2), (0, 3), (0, 4), (0, 5), (1, 0), (1, 1)),
         r"t\.csv:5: 3 rows of layer 0 in a row, no multiple of 2 experts per token; say how many with --top-k"),
        (rows((0, 1), (0, 2), (1, 1), (1, 2), (0, 3), (0, 4), (1, 0), (1, 1), (1, 2), (1, 3)),
         r"t\.csv:5: 1 tokens in layer 0, 2 in another of the same call; only the last layer may"),
        (rows((0, 1), (0, 2), (0, 3), (0, 2), (1, 1), (1, 2), (1, 3), (1, 4)),
         r"t\.csv:4: of the 4 experts of token 0 in layer 0 two are the same; if there are not 4, say how many"),
        (rows((0, 1), (1, 2), (0, 3), (2, 1)), r"t\.csv:1: token 0 has no experts in layer 2, others have"),
        ("token,layer,expert\n" + rows((0, 0, 1), (0, 0, 2), (1, 0, 1)), r"t\.csv:4: token 1 has 1 experts in layer 0, not 2"),
        ("token,layer,expert\n" + rows((0, 0, 1), (1, 0, 1), (1, 1, 2)), r"t\.csv:2: token 0 has no experts in layer 1"),
        ("call,token,layer,expert\n" + rows((0, 0, 0, 1), (1, 0, 0, 2)),
         r"t\.csv:3: call differs from that of another row of token 0"),
        ("call,token,layer,expert\n" + rows((1, 0, 0, 1), (0, 1, 0, 2)),
         r"t\.csv:3: token 1 is in call 0, the token before it in a later"),
        ("phase,token,layer,expert\nprefill,0,0,1\ndecode,0,0,2\n",
         r"t\.csv:3: phase differs from that of another row of token 0"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_their_line(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        read(tmp_path, text, num_experts=9)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"layer,expert\n\xff\xfe\n")
    with pytest.raises(UserError, match=r"t\.csv is not UTF-8 text \(invalid start byte at byte 13\)"):
        read_csv(tmp_path / "t.csv")
