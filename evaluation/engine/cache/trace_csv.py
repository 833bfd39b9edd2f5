"""Routing traces as CSV, a row for every chosen expert: what llama.cpp's `moe-trace` writes, and with more columns all.

A header names the columns, in any order: `layer`, `expert`, and if wanted `token`, `request`, `call`, `phase` (prefill or
decode) and `rank`. Without a header they are `layer,expert`.
With `token` (counted in its request), rows may come in any order; the experts of a token in a layer are heaviest first,
or by `rank`. Without `token`, rows come as a model computes them: call by call, in it layer by layer, in it token by
token, heaviest first; a call begins where the layer number falls, and `top_k` is the fewest rows of a layer in any call.
Tokens of a prompt that the last layer leaves out (llama.cpp computes it for wanted outputs only) are given the experts of
the token after them: to the event that is no difference.
Cells may be in quotes, and semicolons or tabs between them, as spreadsheets write them.
Without `call`, the prefill tokens of a prompt are one call and every other token is one; without `phase`, calls of several
tokens are prefill. Axes: N rows, G groups of rows (a token in a layer), T tokens, L layers, K experts chosen.
"""

import re
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd

from configs.load import UserError
from evaluation.engine.cache.counts import DECODE, PHASES, PREFILL
from evaluation.engine.cache.trace import RouteTrace

COLUMNS = ("request", "call", "phase", "token", "layer", "rank", "expert")
PHASE_CODES = {spelling: code for code, name in enumerate(PHASES) for spelling in (name, str(code))}
WHOLE_NUMBER = r"\s*\+?\d{1,18}\s*"
CELLS = dict.fromkeys(COLUMNS, WHOLE_NUMBER) | {"phase": rf"\s*({'|'.join(PHASE_CODES)})\s*"}


def read_csv(path: Path, *, num_experts: int | None = None, top_k: int | None = None) -> RouteTrace:
    """Read a trace; see the top of this file.

    Args:
        num_experts: of a layer; left out: the largest expert id + 1, which changes no count.
        top_k: experts of a token in a layer, to be checked.

    Raises:
        UserError: what is wrong, with file and line.
    """
    try:
        lines = _plain(path.read_text(encoding="utf-8-sig").rstrip().splitlines())
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); a CSV trace is") from error
    try:
        rows = _read_rows(lines)
        if num_experts is not None:
            _refuse(rows, rows["expert"] >= num_experts, f"expert {{expert}}, but there are {num_experts} experts")
        if "token" not in rows:
            rows = _with_tokens(rows, top_k)
        return _trace(rows, num_experts=num_experts, top_k=top_k)
    except _LineError as error:
        raise UserError(f"{path}:{error}") from error


def write_csv(trace: RouteTrace, file: Path | BinaryIO) -> None:
    """Write everything but the number of experts, their bytes and the model's name."""
    token_N = np.repeat(np.arange(trace.tokens), trace.layers * trace.top_k)
    columns = {
        "request": trace.request_id[token_N],
        "call": trace.call[token_N],
        "phase": np.array(PHASES)[trace.phase[token_N]],
        "token": token_N,
        "layer": np.tile(np.repeat(trace.layer_ids, trace.top_k), trace.tokens),
        "expert": trace.expert_ids.ravel(),
    }
    pd.DataFrame(columns).to_csv(file, index=False)


def _plain(lines: Sequence[str]) -> list[str]:
    """Lines as spreadsheets write them too: cells in quotes, and semicolons or tabs between them."""
    between = next((mark for mark in ";\t" if lines and mark in lines[0] and "," not in lines[0]), ",")
    return [line.replace('"', "").replace(between, ",") for line in lines]


class _LineError(Exception):
    """What is wrong, after the number of the line and a colon."""


def _refuse(rows: pd.DataFrame, where: pd.Series, message: str) -> None:
    """Raise for the first row for which `where` is true; the message may name columns."""
    if where.any():
        row = rows[where].iloc[0]
        raise _LineError(f"{row.name}: {message.format(**row)}")


def _read_rows(lines: Sequence[str]) -> pd.DataFrame:
    """Columns of whole numbers, phases by their codes; the index is the line."""
    header = bool(lines) and not any(re.fullmatch(WHOLE_NUMBER, cell) for cell in lines[0].split(","))
    names = [cell.strip() for cell in lines[0].split(",")] if header else ["layer", "expert"]
    _check_header(names)
    body, first_line = lines[header:], 1 + header
    if not body:
        raise _LineError("1: there are no rows; a CSV trace has one `layer,expert` row per chosen expert")
    whole = re.compile(",".join(CELLS[name] for name in names), re.ASCII)
    for number, line in enumerate(body, start=first_line):
        if not whole.fullmatch(line):
            raise _LineError(f"{number}: {_problem(line, names)}")
    rows = pd.read_csv(StringIO("\n".join(body)), names=names, skip_blank_lines=False)
    if "phase" in names:
        rows["phase"] = rows["phase"].astype(str).str.strip().map(PHASE_CODES)
    rows.index += first_line
    return rows.assign(**{name: 0 for name in ("request", "rank") if name not in names})


def _problem(line: str, names: Sequence[str]) -> str:
    cells = line.split(",")
    if len(cells) != len(names):
        return f"{line!r} has {len(cells)} cells, not {len(names)} ({','.join(names)})"
    name, cell = next((n, c) for n, c in zip(names, cells, strict=True) if not re.fullmatch(CELLS[n], c, re.ASCII))
    return f"{name} is {cell!r}; write {' or '.join(PHASES) if name == 'phase' else 'a whole number from 0'}"


def _check_header(names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in COLUMNS]
    if unknown:
        raise _LineError(f"1: unknown column {unknown[0]!r}; known: {', '.join(COLUMNS)}; leave the others out")
    repeated = [name for name in names if names.count(name) > 1]
    missing = [name for name in ("layer", "expert") if name not in names]
    if repeated or missing:
        what = f"column {repeated[0]} comes twice" if repeated else f"no column {missing[0]}"
        raise _LineError(f"1: {what}; name the columns as `layer,expert` or `request,token,layer,expert`")
    if "call" in names and "token" not in names:
        raise _LineError("1: a column call, but none that says which token; add a column token")


def _with_tokens(rows: pd.DataFrame, top_k: int | None) -> pd.DataFrame:
    """Tell tokens, calls and phases by the order of the rows."""
    if rows["layer"].nunique() == 1:
        told = "all rows are of layer {layer}, so tokens cannot be told apart; add a column token"
        _refuse(rows, rows["layer"] >= 0, told)
    run = (_changes(rows["layer"]) | _changes(rows["request"])).cumsum().rename("run")  # rows of one layer in one call
    runs = rows.assign(line=rows.index, rows=rows.groupby(run)["layer"].transform("size")).groupby(run).first()
    runs = runs.set_index("line")
    top_k = top_k or int(runs["rows"].min())
    told = f"{{rows}} rows of layer {{layer}} in a row, no multiple of {top_k} experts per token; say how many with --top-k"
    _refuse(runs, runs["rows"] % top_k != 0, f"{told}, or add a column token")
    runs["call"] = ((runs["layer"].diff() < 0) | _changes(runs["request"])).cumsum() - 1
    runs["tokens"] = runs["rows"] // top_k
    runs["of_call"] = runs.groupby("call")["tokens"].transform("max")
    short = (runs["tokens"] < runs["of_call"]) & (runs["layer"] != runs["layer"].max())
    told = "{tokens} tokens in layer {layer}, {of_call} in another of the same call"
    _refuse(runs, short, f"{told}; only the last layer may leave tokens out")
    runs["phase"] = np.where(runs["of_call"] > 1, PREFILL, DECODE)
    runs["end"] = runs["call"].map(runs.groupby("call")["of_call"].first().cumsum())
    run_N = run.to_numpy() - 1
    token_N = (runs["end"] - runs["tokens"]).to_numpy()[run_N] + rows.groupby(run).cumcount() // top_k
    found = {"token": token_N, **{name: runs[name].to_numpy()[run_N] for name in ("call", "phase")}}
    return rows.assign(**{name: cells_N for name, cells_N in found.items() if name not in rows})


def _trace(rows: pd.DataFrame, *, num_experts: int | None, top_k: int | None) -> RouteTrace:
    rows = rows.assign(line=rows.index, order=pd.factorize(rows["request"])[0])
    rows = rows.sort_values(["order", "token", "layer", "rank", "line"])
    top_k = _check_tokens(rows, top_k)
    tokens = _with_calls(rows.drop_duplicates(["order", "token"]))
    layers, layer_N = np.unique(rows["layer"], return_inverse=True)
    ids_TLK = np.full((len(tokens), len(layers), top_k), -1, np.int64)
    token_N = rows.groupby(["order", "token"]).ngroup()
    ids_TLK[token_N, layer_N, np.arange(len(rows)) % top_k] = rows["expert"]
    _complete(ids_TLK, layers, tokens)
    return RouteTrace(
        ids_TLK,
        phase=tokens["phase"].to_numpy(),
        request_id=tokens["request"].to_numpy(),
        call=tokens["call"].to_numpy(),
        num_experts=num_experts or int(ids_TLK.max()) + 1,
        layer_ids=tuple(layers.tolist()),
    )


def _check_tokens(rows: pd.DataFrame, top_k: int | None) -> int:
    """Refuse rows, sorted, of which some are too many, too few or contradict others; return how many a token has in a layer."""
    group = ["order", "token", "layer"]
    rows = rows.assign(size=rows.groupby(group)["expert"].transform("size"))
    top_k = top_k or int(rows["size"].iloc[0])
    told = f"token {{token}} has {{size}} experts in layer {{layer}}, not {top_k}; every token has as many in each"
    _refuse(rows, rows["size"] != top_k, told)
    told = f"of the {top_k} experts of token {{token}} in layer {{layer}} two are the same"
    twice = rows.duplicated([*group, "expert"])
    _refuse(rows, twice, f"{told}; if there are not {top_k}, say how many with --top-k")
    for name in [name for name in ("call", "phase") if name in rows]:
        differs = rows[name] != rows.groupby(["order", "token"])[name].transform("first")
        _refuse(rows, differs, f"{name} differs from that of another row of token {{token}}")
    return top_k


def _with_calls(tokens: pd.DataFrame) -> pd.DataFrame:
    """A row for every token, with its phase and the number of its call."""
    begins = _changes(tokens["order"])
    if "call" in tokens:
        falls = (tokens["call"].diff() < 0) & ~begins
        _refuse(tokens, falls, "token {token} is in call {call}, the token before it in a later one")
        begins |= _changes(tokens["call"])
    elif "phase" in tokens:
        begins |= _changes(tokens["phase"]) | (tokens["phase"] == DECODE)
    else:
        begins |= True
    tokens = tokens.assign(call=begins.cumsum() - 1)
    if "phase" not in tokens:
        tokens["phase"] = np.where(tokens.groupby("call")["call"].transform("size") > 1, PREFILL, DECODE)
    return tokens


def _complete(ids_TLK: np.ndarray, layers: np.ndarray, tokens: pd.DataFrame) -> None:
    """Give tokens that the last layer left out the experts of the next token of their call."""
    absent_TL = ids_TLK[..., 0] < 0
    place = pd.Series(np.arange(len(tokens)), tokens.index).mask(absent_TL[:, -1])
    next_T = place.groupby(tokens["call"]).bfill()
    absent_TL[:, -1] = next_T.isna()
    absent = absent_TL.any(axis=1)
    tokens = tokens.assign(lacking=layers[absent_TL.argmax(axis=1)])
    _refuse(tokens, pd.Series(absent, tokens.index), "token {token} has no experts in layer {lacking}, others have")
    ids_TLK[:, -1] = ids_TLK[next_T.astype(int), -1]


def _changes(values: pd.Series) -> pd.Series:
    """True where a value differs from the one before, and at the first."""
    return values != values.shift()
