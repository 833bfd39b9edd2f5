"""Routing traces in the formats people have, told apart by the file's extension.

`.safetensors`: ours. Tensors are those of `RouteTrace`, with ids as uint8 (int16 above 256 experts); metadata, all strings:
format, version, num_experts, top_k, layer_ids, expert_bytes ("" if unknown), model.
`.csv`: `trace_csv.py`.
`.npy`: one request as [tokens, layers, top_k], heaviest first, which is what vLLM returns as `routed_experts`.
`.npz`: with an array `expert_ids`, any of `phase`, `request_id`, `call`, `layer_ids`, `num_experts`, `expert_bytes` and
`model` may lie beside it; without it, every array is one request as in `.npy`, in the file's order.
Where a file does not say otherwise, every token is a decode call of its own. Layers in which every token has nothing but
expert 0 several times are dense ones, as vLLM fills them in: they are left out, by name.
"""

import json
import logging
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from configs.files import writing_aside
from configs.load import UserError
from evaluation.engine.cache.counts import DECODE
from evaluation.engine.cache.trace import TENSORS, RouteTrace
from evaluation.engine.cache.trace_csv import read_csv, write_csv

logger = logging.getLogger(__name__)
FORMAT, VERSION = "remoe-route-trace", "1"
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
    else:
        arrays = _read_safetensors(path) if path.suffix == ".safetensors" else _read_numpy(path)
        trace = _of_arrays(path, arrays, num_experts)
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
    check_extension(path)
    if Path(path).suffix == ".npy":
        _check_fits_npy(trace, path)
    with writing_aside(path) as aside, aside.open("wb") as file:
        WRITERS[Path(path).suffix](trace, file)


def check_extension(path: str | Path) -> None:
    """Refuse a file whose extension names no format."""
    if Path(path).suffix not in WRITERS:
        raise UserError(
            f"routing trace {path}: extension {Path(path).suffix!r} names no format; use one of {', '.join(WRITERS)}"
        )


def _read_safetensors(path: Path) -> Arrays:
    try:
        with safe_open(path, framework="np") as file:
            said, arrays = file.metadata() or {}, {name: file.get_tensor(name) for name in list(file.keys())}
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file ({error}); a routing trace is one") from error
    if said.get("format") != FORMAT:
        raise UserError(f"{path} is no routing trace: its format is {said.get('format')!r}, not {FORMAT!r}")
    if said.get("version") != VERSION:
        raise UserError(
            f"{path} is a routing trace of version {said.get('version')!r}, this program reads {VERSION!r}; "
            "write the trace again with this program"
        )
    missing = [name for name in (*TENSORS, "num_experts", "layer_ids") if name not in {**arrays, **said}]
    if missing:
        raise UserError(f"{path}: routing trace without {', '.join(missing)}; write it again")
    return arrays | {name: np.array(said[name]) for name in FACTS if said.get(name)}


def _read_numpy(path: Path) -> Arrays:
    try:
        with path.open("rb") as file:
            content = np.load(file, allow_pickle=False)
            return {"array": content} if isinstance(content, np.ndarray) else dict(content)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path} is no readable numpy file of plain numbers ({error}); write it with np.save"
        ) from error


def _of_arrays(path: Path, arrays: Arrays, num_experts: int | None) -> RouteTrace:
    requests = {name: array for name, array in arrays.items() if name == "expert_ids" or "expert_ids" not in arrays}
    for name, array in requests.items():
        if array.ndim != 3 or 0 in array.shape:
            raise UserError(
                f"{path}: {name} has shape {list(array.shape)}; a request is [tokens, layers, top_k], none of them 0"
            )
        if not np.issubdtype(array.dtype, np.integer):
            raise UserError(
                f"{path}: {name} holds {array.dtype}, expert ids are integers; convert it with astype(np.int16)"
            )
    if "expert_ids" not in arrays:
        arrays = _joined(path, arrays)
    arrays = _without_dense_layers(path, arrays)
    _check_padding(path, arrays["expert_ids"], num_experts or arrays.get("num_experts"))
    unknown = [name for name in arrays if name not in (*TENSORS, *FACTS)]
    if unknown:
        raise UserError(
            f"{path}: unknown array {unknown[0]!r} beside expert_ids; known: {', '.join((*TENSORS, *FACTS))}"
        )
    try:
        return RouteTrace(**_defaults(arrays["expert_ids"], num_experts) | _plain(arrays))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _without_dense_layers(path: Path, arrays: Arrays) -> Arrays:
    """Without the layers that hold only zeros where a token has several experts, which must be distinct; they are named."""
    ids_TLK = arrays["expert_ids"]
    dense_L = (ids_TLK == 0).all(axis=(0, 2)) & (ids_TLK.shape[2] > 1)
    if not dense_L.any() or dense_L.all():
        return arrays
    numbers = np.array(_numbers(arrays["layer_ids"]) if "layer_ids" in arrays else range(ids_TLK.shape[1]))
    if len(numbers) != len(dense_L):
        return arrays  # which is refused for that
    left_out = ", ".join(map(str, numbers[dense_L]))
    logger.warning("%s: layers %s hold no expert but 0, several times: they are dense and left out", path, left_out)
    return arrays | {"expert_ids": ids_TLK[:, ~dense_L], "layer_ids": numbers[~dense_L]}


def _check_padding(path: Path, ids_TLK: npt.NDArray[np.integer], num_experts: Any) -> None:
    """Refuse tokens that hold -1, or the largest number of an unsigned type, everywhere, unless it is an expert's."""
    filler = -1 if ids_TLK.min() < 0 else int(np.iinfo(ids_TLK.dtype).max)
    padded_T = (ids_TLK == filler).all(axis=(1, 2))
    if padded_T.any() and (filler < 0 or num_experts is None):
        raise UserError(
            f"{path}: token {int(padded_T.argmax())} holds {filler} everywhere, as padding does; cut such tokens off"
            + (f", or say --num-experts {filler + 1} if it is an expert" if filler >= 0 else "")
        )


def _joined(path: Path, requests: Arrays) -> Arrays:
    shapes = {name: array.shape[1:] for name, array in requests.items()}
    if len(set(shapes.values())) != 1:
        told = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise UserError(f"{path}: requests differ in [layers, top_k] ({told}); one file holds requests of one model")
    request_id = np.repeat(np.arange(len(requests)), [len(array) for array in requests.values()])
    return {"expert_ids": np.concatenate(list(requests.values())), "request_id": request_id}


def _defaults(ids_TLK: npt.NDArray[np.integer], num_experts: int | None) -> dict[str, Any]:
    return {
        "phase": np.full(len(ids_TLK), DECODE),
        "request_id": np.zeros(len(ids_TLK), np.int32),
        "call": np.arange(len(ids_TLK)),
        "num_experts": num_experts or int(ids_TLK.max()) + 1,
        "layer_ids": tuple(range(ids_TLK.shape[1])),
    }


def _plain(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """Facts as Python values, arrays as they are."""
    try:
        return {name: FACTS[name](array) if name in FACTS else array for name, array in arrays.items()}
    except (TypeError, ValueError) as error:
        raise UserError(
            f"num_experts and expert_bytes must be single numbers, layer_ids a list of them ({error})"
        ) from error


def _numbers(array: npt.NDArray[Any]) -> tuple[int, ...]:
    """A list of numbers, as an array or written as JSON."""
    return tuple(map(int, array if array.dtype.kind != "U" else json.loads(str(array))))


def _write_safetensors(trace: RouteTrace, file: BinaryIO) -> None:
    types = dict.fromkeys(TENSORS, np.int32) | {
        "expert_ids": np.uint8 if trace.num_experts <= 256 else np.int16,
        "phase": np.uint8,
    }
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "num_experts": str(trace.num_experts),
        "top_k": str(trace.top_k),
        "layer_ids": json.dumps(trace.layer_ids),
        "expert_bytes": "" if trace.expert_bytes is None else str(trace.expert_bytes),
        "model": trace.model,
    }
    # not save_file (0.8), whose files nobody but their owner may read, whatever the umask
    file.write(save({name: np.ascontiguousarray(getattr(trace, name), types[name]) for name in TENSORS}, metadata))


def _write_npz(trace: RouteTrace, file: BinaryIO) -> None:
    content = {name: getattr(trace, name) for name in (*TENSORS, *FACTS)}
    np.savez_compressed(file, **{name: value for name, value in content.items() if value is not None})


def _check_fits_npy(trace: RouteTrace, path: str | Path) -> None:
    same_request = (trace.request_id == trace.request_id[0]).all()
    own_calls = (np.diff(trace.call) != 0).all() and (trace.phase == DECODE).all()
    if not (same_request and own_calls):
        raise UserError(
            f"{path}: a .npy file has no place for several requests, prompts and calls of several tokens, and would be "
            "read back as another trace; write .npz, .csv or .safetensors"
        )


FACTS: Mapping[str, Callable[[Any], Any]] = {
    "num_experts": int, "layer_ids": _numbers, "expert_bytes": int, "model": str
}  # fmt: skip
WRITERS: Mapping[str, Callable[[RouteTrace, BinaryIO], None]] = {
    ".safetensors": _write_safetensors,
    ".npz": _write_npz,
    ".npy": lambda trace, file: np.save(file, trace.expert_ids),
    ".csv": write_csv,
}
