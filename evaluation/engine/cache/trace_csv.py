"""Routing traces as CSV, a row for every chosen expert: what llama.cpp's `moe-trace` writes, and with more columns all.

A header names the columns, in any order: `layer`, `expert`, and if wanted `token`, `request`, `call`, `phase` (prefill or
decode) and `rank`. Without a header they are `layer,expert`.
With `token` (counted in its request), rows may come in any order; the experts of a token in a layer are heaviest first,
or by `rank`. Without `token`, rows come as a model computes them: call by call, in it layer by layer, in it token by
token, heaviest first; a call begins where the layer number falls, and `top_k` is the fewest rows of a layer in any call.
Tokens of a prompt that the last layer leaves out (llama.cpp computes it for wanted outputs only) are given the experts of
the token after them: to the event that is no difference.
Without `call`, the prefill tokens of a prompt are one call and every other token is one; without `phase`, calls of several
tokens are prefill. Axes: N rows, G groups of rows (a token in a layer), T tokens, L layers, K experts chosen.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from configs.files import writing_aside
from configs.load import UserError
from evaluation.engine.cache.counts import DECODE, PHASES, PREFILL
from evaluation.engine.cache.trace import RouteTrace

COLUMNS = ("request", "call", "phase", "token", "layer", "rank", "expert")
WHOLE_NUMBER = re.compile(r"\s*[+-]?\d{1,18}\s*", re.ASCII)
Array = npt.NDArray[np.integer]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Rows:
    """The cells of a file, as whole numbers, by column."""

    path: Path
    first_line: int
    columns: dict[str, Array]

    def refuse(self, where_N: Mask, message: str) -> None:
        """Raise for the first row of the file where something is wrong; the message may name columns."""
        if where_N.any():
            row = int(where_N.argmax())
            cells = {name: cells_N[row] for name, cells_N in self.columns.items()}
            raise UserError(f"{self.path}:{self.first_line + row}: {message.format(**cells)}")

    def refuse_row(self, row: int, message: str) -> None:
        where_N = np.zeros(len(self.columns["layer"]), bool)
        where_N[row] = True
        self.refuse(where_N, message)


def read_csv(path: Path, *, num_experts: int | None = None, top_k: int | None = None) -> RouteTrace:
    """Read a trace; see the top of this file.

    Args:
        num_experts: of a layer; left out: the largest expert id + 1, which changes no count.
        top_k: experts of a token in a layer, to be checked.

    Raises:
        UserError: what is wrong, with file and line.
    """
    rows = _read_rows(path)
    for name, cells_N in rows.columns.items():
        rows.refuse(cells_N < 0, f"{name} is {{{name}}}; write whole numbers from 0")
    if num_experts is not None:
        rows.refuse(rows.columns["expert"] >= num_experts, f"expert {{expert}}, but there are {num_experts} experts")
    if "token" not in rows.columns:
        rows = _with_tokens(rows, top_k)
    return _trace(rows, num_experts=num_experts, top_k=top_k)


def write_csv(trace: RouteTrace, path: Path) -> None:
    """Write everything but the number of experts, their bytes and the model's name."""
    with writing_aside(path) as aside, aside.open("w", encoding="utf-8") as file:
        file.write("request,call,phase,token,layer,expert\n")
        file.writelines(_lines(trace))


def _lines(trace: RouteTrace) -> Iterator[str]:
    for token, ids_LK in enumerate(trace.expert_ids.tolist()):
        phase = PHASES[trace.phase[token]]
        start = f"{trace.request_id[token]},{trace.call[token]},{phase},{token}"
        for layer, ids in zip(trace.layer_ids, ids_LK, strict=True):
            yield from (f"{start},{layer},{expert}\n" for expert in ids)


def _read_rows(path: Path) -> _Rows:
    try:
        lines = path.read_text(encoding="utf-8").rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); a CSV trace is") from error
    header = bool(lines) and not any(WHOLE_NUMBER.fullmatch(cell) for cell in lines[0].split(","))
    names = [cell.strip() for cell in lines[0].split(",")] if header else ["layer", "expert"]
    _check_header(path, names)
    body = lines[1:] if header else lines
    if not body:
        raise UserError(f"{path} holds no rows; a CSV trace has one `layer,expert` row per chosen expert")
    return _Rows(path, 1 + header, _cells(path, 1 + header, body, names))


def _check_header(path: Path, names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in COLUMNS]
    if unknown:
        raise UserError(f"{path}:1: unknown column {unknown[0]!r}; known: {', '.join(COLUMNS)}; leave the others out")
    repeated = [name for name in names if names.count(name) > 1]
    missing = [name for name in ("layer", "expert") if name not in names]
    if repeated or missing:
        what = f"column {repeated[0]} comes twice" if repeated else f"no column {missing[0]}"
        raise UserError(f"{path}:1: {what}; name the columns as `layer,expert` or `request,token,layer,expert`")
    if "call" in names and "token" not in names:
        raise UserError(f"{path}:1: a column call, but none that says which token; add a column token")


def _cells(path: Path, first_line: int, lines: Sequence[str], names: Sequence[str]) -> dict[str, Array]:
    """The columns as int64, phases by their codes."""
    if any(line.count(",") != len(names) - 1 for line in lines):
        _raise_first_problem(path, first_line, lines, names)
    numbers = [position for position, name in enumerate(names) if name != "phase"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # numpy only warns when it reads 1.0 as a whole number
            cells = np.loadtxt(lines, np.int64, delimiter=",", comments=None, usecols=numbers, unpack=True, ndmin=2)
    except (ValueError, Warning):
        _raise_first_problem(path, first_line, lines, names)
        raise
    columns = {names[position]: cells_N for position, cells_N in zip(numbers, cells, strict=True)}
    if "phase" in names:
        columns["phase"] = _phases(path, first_line, [line.split(",")[names.index("phase")].strip() for line in lines])
    return columns


def _phases(path: Path, first_line: int, cells: Sequence[str]) -> Array:
    codes = {name: code for code, name in enumerate(PHASES)} | {str(code): code for code in range(len(PHASES))}
    for row, cell in enumerate(cells):
        if cell not in codes:
            raise UserError(f"{path}:{first_line + row}: phase {cell!r}; write {' or '.join(PHASES)}")
    return np.array([codes[cell] for cell in cells])


def _raise_first_problem(path: Path, first_line: int, lines: Sequence[str], names: Sequence[str]) -> None:
    for number, line in enumerate(lines, start=first_line):
        cells = line.split(",")
        if len(cells) != len(names):
            raise UserError(f"{path}:{number}: {line!r} has {len(cells)} cells, not {len(names)} ({','.join(names)})")
        for name, cell in zip(names, cells, strict=True):
            if name != "phase" and not WHOLE_NUMBER.fullmatch(cell):
                raise UserError(f"{path}:{number}: {name} is {cell!r}; write a whole number")


def _with_tokens(rows: _Rows, top_k: int | None) -> _Rows:
    """Tell tokens, calls and phases by the order of the rows."""
    layer_N = rows.columns["layer"]
    request_N = rows.columns.get("request", np.zeros_like(layer_N))
    if (layer_N == layer_N[0]).all():
        rows.refuse_row(0, "all rows are of layer {layer}, so tokens cannot be told apart; add a column token")
    other_request_N = _changes(request_N)
    run = np.flatnonzero(_changes(layer_N) | other_request_N)  # rows of one layer in one call
    run_rows = np.diff(np.r_[run, len(layer_N)])
    new_call = np.r_[True, np.diff(layer_N[run]) < 0] | other_request_N[run]
    top_k = top_k or int(run_rows.min())
    for bad in np.flatnonzero(run_rows % top_k)[:1]:
        told = f"{run_rows[bad]} rows of layer {{layer}} in a row, no multiple of {top_k} experts per token"
        rows.refuse_row(int(run[bad]), f"{told}; say how many with --top-k, or add a column token")
    run_tokens, run_call = run_rows // top_k, np.cumsum(new_call) - 1
    call_tokens = np.maximum.reduceat(run_tokens, np.flatnonzero(new_call))
    absent = call_tokens[run_call] - run_tokens
    for bad in np.flatnonzero((absent > 0) & (layer_N[run] != layer_N.max()))[:1]:
        told = f"{run_tokens[bad]} tokens in layer {{layer}}, {call_tokens[run_call[bad]]} in another of the same call"
        rows.refuse_row(int(run[bad]), f"{told}; only the last layer may leave tokens out")
    first_token = np.cumsum(call_tokens)[run_call] - run_tokens
    run_N = np.repeat(np.arange(len(run)), run_rows)
    token_N = first_token[run_N] + (np.arange(len(layer_N)) - run[run_N]) // top_k
    phase_N = np.where(call_tokens[run_call[run_N]] > 1, PREFILL, DECODE)
    found = {"token": token_N, "call": run_call[run_N], "phase": phase_N}
    return _Rows(rows.path, rows.first_line, found | rows.columns)


def _trace(rows: _Rows, *, num_experts: int | None, top_k: int | None) -> RouteTrace:
    columns, row_N = rows.columns, _in_order(rows.columns)
    request_N, token_N, layer_N = (columns.get(name, row_N * 0)[row_N] for name in ("request", "token", "layer"))
    begins_N = _changes(request_N) | _changes(token_N)
    group = np.flatnonzero(begins_N | _changes(layer_N))
    ids_GK = _experts_of_groups(rows, row_N, group, top_k)
    _check_same_in_token(rows, row_N, begins_N)
    layers, first_T = np.unique(layer_N), row_N[begins_N]
    ids_TLK = np.full((len(first_T), len(layers), ids_GK.shape[1]), -1, np.int64)
    ids_TLK[np.cumsum(begins_N)[group] - 1, np.searchsorted(layers, layer_N[group])] = ids_GK
    request_T, phase_T, call_T = _calls(rows, first_T)
    _complete(rows, ids_TLK, layers, call_T, first_T)
    return RouteTrace(
        ids_TLK,
        phase=phase_T,
        request_id=request_T,
        call=call_T,
        num_experts=num_experts or int(ids_TLK.max()) + 1,
        layer_ids=tuple(layers.tolist()),
    )


def _experts_of_groups(rows: _Rows, row_N: Array, group: Array, top_k: int | None) -> Array:
    """[group, k]: the experts of each token in each layer; `group` says where they begin among the sorted rows."""
    group_rows = np.diff(np.r_[group, len(row_N)])
    top_k = top_k or int(group_rows[0])
    for bad in np.flatnonzero(group_rows != top_k)[:1]:
        told = f"token {{token}} has {group_rows[bad]} experts in layer {{layer}}, not {top_k}"
        rows.refuse_row(int(row_N[group[bad]]), f"{told}; every token has as many in every layer")
    ids_GK: Array = rows.columns["expert"][row_N].reshape(-1, top_k)
    for bad in np.flatnonzero((np.diff(np.sort(ids_GK)) == 0).any(axis=1))[:1]:
        told = f"of the {top_k} experts of token {{token}} in layer {{layer}} two are the same"
        rows.refuse_row(int(row_N[group[bad]]), f"{told}; if there are not {top_k}, say how many with --top-k")
    return ids_GK


def _check_same_in_token(rows: _Rows, row_N: Array, begins_N: Mask) -> None:
    for name in ("call", "phase"):
        if name in rows.columns:
            first_N = rows.columns[name][row_N[begins_N]][np.cumsum(begins_N) - 1]
            differs_N = np.empty_like(begins_N)
            differs_N[row_N] = rows.columns[name][row_N] != first_N
            rows.refuse(differs_N, f"{name} differs from that of another row of token {{token}}")


def _in_order(columns: dict[str, Array]) -> Array:
    """Rows by request, as requests appear, token, layer, and rank or row."""
    zeros = np.zeros_like(columns["layer"])
    _, first, request = np.unique(columns.get("request", zeros), return_index=True, return_inverse=True)
    return np.lexsort(
        (columns.get("rank", zeros), columns["layer"], columns["token"], np.argsort(np.argsort(first))[request])
    )


def _calls(rows: _Rows, first_T: Array) -> tuple[Array, Array, Array]:
    """Request, phase and number of the call of every token."""
    request_T = rows.columns.get("request", np.zeros_like(rows.columns["layer"]))[first_T]
    phase_T = rows.columns["phase"][first_T] if "phase" in rows.columns else None
    if "call" in rows.columns:
        call_T = rows.columns["call"][first_T]
        falls_T = np.r_[False, np.diff(call_T) < 0] & ~_changes(request_T)
        for bad in np.flatnonzero(falls_T)[:1]:
            rows.refuse_row(int(first_T[bad]), "token {token} is in call {call}, the token before it in a later one")
        begins_T = _changes(request_T) | _changes(call_T)
    elif phase_T is not None:
        begins_T = _changes(request_T) | _changes(phase_T) | (phase_T == DECODE)
    else:
        begins_T = np.ones(len(first_T), bool)
    call_T = np.cumsum(begins_T) - 1
    if phase_T is None:
        phase_T = np.where(np.bincount(call_T)[call_T] > 1, PREFILL, DECODE)
    return request_T, phase_T, call_T


def _complete(rows: _Rows, ids_TLK: Array, layers: Array, call_T: Array, first_T: Array) -> None:
    """Give tokens that the last layer left out the experts of the next token of their call."""
    absent_TL = ids_TLK[..., 0] < 0
    token_T = np.arange(len(ids_TLK))
    next_T = np.minimum.accumulate(np.where(absent_TL[:, -1], len(token_T), token_T)[::-1])[::-1]
    next_T = np.minimum(next_T, len(token_T) - 1)
    absent_TL[:, -1] &= absent_TL[next_T, -1] | (call_T[next_T] != call_T)
    for token, position in np.argwhere(absent_TL)[:1]:
        rows.refuse_row(int(first_T[token]), f"token {{token}} has no experts in layer {layers[position]}, others have")
    ids_TLK[:, -1] = ids_TLK[next_T, -1]


def _changes(values_N: Array) -> Mask:
    """True where a value differs from the one before, and at the first."""
    return np.r_[True, values_N[1:] != values_N[:-1]]
