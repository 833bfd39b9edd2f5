"""Routing traces in the formats people have, told apart by the file's extension.

`.safetensors`: ours, with everything (`trace.py`). `.csv`: `trace_csv.py`.
`.npy`: one request as [tokens, layers, top_k], heaviest first, which is what vLLM returns as `routed_experts`.
`.npz`: with an array `expert_ids`, any of `phase`, `request_id`, `call`, `layer_ids`, `num_experts`, `expert_bytes` and
`model` may lie beside it, as in our own file; without it, every array is one request as in `.npy`, in the file's order.
Where a file does not say otherwise, every token is a decode call of its own.
"""

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.files import writing_aside
from configs.load import UserError
from evaluation.engine.cache.counts import DECODE
from evaluation.engine.cache.trace import TENSORS, RouteTrace
from evaluation.engine.cache.trace_csv import read_csv, write_csv

EXTENSIONS = (".safetensors", ".npz", ".npy", ".csv")
FACTS = ("num_experts", "layer_ids", "expert_bytes", "model")
Arrays = dict[str, npt.NDArray[Any]]


def read_trace(path: str | Path, *, num_experts: int | None = None, top_k: int | None = None) -> RouteTrace:
    """Read a trace of any of the formats.

    Args:
        num_experts: of a layer, where the file does not say; left out: the largest expert id + 1, which changes no count.
        top_k: experts of a token in a layer, where a CSV leaves it open.

    Raises:
        UserError: missing, unknown extension, content that does not hold together, or that differs from what is said here.
    """
    path = Path(path)
    check_extension(path)
    if not path.is_file():
        raise UserError(f"routing trace {path} does not exist; write one with `remoe trace` or `--route-trace`")
    if path.suffix == ".csv":
        trace = read_csv(path, num_experts=num_experts, top_k=top_k)
    elif path.suffix == ".safetensors":
        trace = RouteTrace.read(path)
    else:
        trace = _of_arrays(path, _load(path), num_experts)
    for name, said in (("num_experts", num_experts), ("top_k", top_k)):
        if said is not None and said != getattr(trace, name):
            raise UserError(
                f"{path} has {name} {getattr(trace, name)}, not {said}; leave --{name.replace('_', '-')} out"
            )
    return trace


def write_trace(trace: RouteTrace, path: str | Path) -> None:
    """Write a trace, aside and renamed, in the format of the extension.

    `.csv` and `.npy` leave out the number of experts, their bytes and the model's name, `.npy` the layers' numbers too.

    Raises:
        UserError: unknown extension, or a format that cannot hold the calls and requests of this trace.
    """
    path = Path(path)
    check_extension(path)
    if path.suffix == ".csv":
        write_csv(trace, path)
    elif path.suffix == ".safetensors":
        trace.save(path)
    elif path.suffix == ".npz":
        _write_npz(trace, path)
    else:
        _write_npy(trace, path)


def check_extension(path: str | Path) -> None:
    """Refuse a file whose extension names no format."""
    if Path(path).suffix not in EXTENSIONS:
        raise UserError(
            f"routing trace {path}: extension {Path(path).suffix!r} names no format; use one of {', '.join(EXTENSIONS)}"
        )


def _load(path: Path) -> Arrays:
    try:
        with path.open("rb") as file:
            content = np.load(file, allow_pickle=False)
            return (
                {"array": content}
                if isinstance(content, np.ndarray)
                else {name: content[name] for name in content.files}
            )
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path} is no readable numpy file of plain numbers ({error}); write it with np.save"
        ) from error


def _of_arrays(path: Path, arrays: Arrays, num_experts: int | None) -> RouteTrace:
    if "expert_ids" not in arrays:
        arrays = _of_requests(path, arrays)
    unknown = [name for name in arrays if name not in (*TENSORS, *FACTS)]
    if unknown:
        raise UserError(
            f"{path}: unknown array {unknown[0]!r} beside expert_ids; known: {', '.join((*TENSORS, *FACTS))}"
        )
    _check_ids(path, "expert_ids", arrays["expert_ids"])
    try:
        return RouteTrace(**_defaults(arrays["expert_ids"], num_experts) | _plain(path, arrays))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _of_requests(path: Path, arrays: Arrays) -> Arrays:
    for name, array in arrays.items():
        _check_ids(path, name, array)
    shapes = {name: array.shape[1:] for name, array in arrays.items()}
    if len(set(shapes.values())) != 1:
        told = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise UserError(f"{path}: requests differ in [layers, top_k] ({told}); one file holds requests of one model")
    request_id = np.repeat(np.arange(len(arrays)), [len(array) for array in arrays.values()])
    return {"expert_ids": np.concatenate(list(arrays.values())), "request_id": request_id}


def _check_ids(path: Path, name: str, array: npt.NDArray[Any]) -> None:
    if array.ndim != 3 or 0 in array.shape:
        raise UserError(
            f"{path}: {name} has shape {list(array.shape)}; a request is [tokens, layers, top_k], none of them 0"
        )
    if not np.issubdtype(array.dtype, np.integer):
        raise UserError(
            f"{path}: {name} holds {array.dtype}, expert ids are integers; convert it with astype(np.int16)"
        )


def _defaults(ids_TLK: npt.NDArray[np.integer], num_experts: int | None) -> dict[str, Any]:
    return {
        "phase": np.full(len(ids_TLK), DECODE),
        "request_id": np.zeros(len(ids_TLK), np.int32),
        "call": np.arange(len(ids_TLK)),
        "num_experts": num_experts or int(ids_TLK.max()) + 1,
        "layer_ids": tuple(range(ids_TLK.shape[1])),
    }


def _plain(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """Facts as Python values, arrays as they are."""
    try:
        return {
            **{name: arrays[name] for name in TENSORS if name in arrays},
            **{name: int(arrays[name]) for name in ("num_experts", "expert_bytes") if name in arrays},
            **{name: str(arrays[name]) for name in ("model",) if name in arrays},
            **{name: tuple(map(int, arrays[name])) for name in ("layer_ids",) if name in arrays},
        }
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path}: num_experts and expert_bytes must be single numbers, layer_ids a list of them ({error})"
        ) from error


def _write_npz(trace: RouteTrace, path: Path) -> None:
    facts = {name: getattr(trace, name) for name in FACTS if getattr(trace, name) is not None}
    with writing_aside(path) as aside, aside.open("wb") as file:
        np.savez_compressed(file, **{name: getattr(trace, name) for name in TENSORS}, **facts)


def _write_npy(trace: RouteTrace, path: Path) -> None:
    same_request = (trace.request_id == trace.request_id[0]).all()
    own_calls = (np.diff(trace.call) != 0).all() and (trace.phase == DECODE).all()
    if not (same_request and own_calls):
        raise UserError(
            f"{path}: a .npy file has no place for several requests, prompts and calls of several tokens, and would be "
            "read back as another trace; write .npz, .csv or .safetensors"
        )
    with writing_aside(path) as aside, aside.open("wb") as file:
        np.save(file, trace.expert_ids)
