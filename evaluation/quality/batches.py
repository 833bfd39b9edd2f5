"""Batches of requests to a model: as large as memory allows, shared out over processes, their answers kept in a file.

A batch is made of all requests, whatever was answered before and by however many processes: so its matrix products have
the same shapes, and every answer the same bits, in one process, in several, and in a run that was killed and taken up.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from evaluation.engine.engine import Engine
from evaluation.engine.memory.division import Call
from training.model.host_memory import trim_heap
from training.model.routers import router_parameters
from training.model.shards import shard_names
from training.run_folder.proof import combined, tensor_sha256

MOST_TOKENS = 2**14
"""Positions of a batch at most, padding included: larger ones read hardly less and make the last one wait longer."""
MOST_PADDING = 2
"""How many times as long as any other the longest of a batch may be: what is filled up is computed too."""
T = TypeVar("T")


def batches_that_fit(
    longest_first: Sequence[T], call_of: Callable[[int, T], Call], *, engine: Engine | None, most: int | None = None
) -> Iterator[Sequence[T]]:
    """Consecutive ones, as many at once as memory allows: a paged model reads an expert once a call at most.

    Args:
        call_of: the forward call of so many sequences as long as this one.
        most: at once, whatever memory allows.
    """
    start = 0
    while start < len(longest_first):
        size, largest = 1, min(len(longest_first) - start, most or len(longest_first))
        while size < largest:
            if MOST_PADDING * call_of(1, longest_first[start + size]).rows < call_of(1, longest_first[start]).rows:
                break
            call = call_of(size + 1, longest_first[start])
            if call.batch * call.context_tokens > MOST_TOKENS or (engine is not None and not engine.has_room(call)):
                break
            size += 1
        yield longest_first[start : start + size]
        start += size


class Answers:
    """What one model answered to batches of requests; a context manager if it has a folder.

    Args:
        folder: where answers are kept as they come, a file for each process; None: nowhere.
        identity: of everything that an answer depends on beside its batch; see `identity_of`.
        together: every process computes every answer, as a model that they share needs; otherwise each its part.
    """

    def __init__(self, folder: Path | None = None, identity: str = "", *, together: bool = False) -> None:
        self._identity, self._file, self._together = identity, None, together
        self._known: dict[str, Any] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob("*.jsonl")):
                self._known |= dict(_whole_lines(path))
            everyone(None)  # knows the same before anyone writes more
            if not together or process_index() == 0:
                self._file = (folder / f"{process_index()}.jsonl").open("a", encoding="utf-8")
                self._file.write("\n")  # a line that was cut off stays alone

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def of(
        self, batches: Sequence[Any], compute: Callable[[int], Any], *, engine: Engine | None,
        answered: Callable[[int], object] = lambda _: None,
    ) -> list[Any]:  # fmt: skip
        """The answer to every batch; what is not known yet is computed, by this process or by another one.

        Args:
            batches: JSON that says all about each.
            compute: the answer to the batch at this place, as JSON.
            engine: what computes, if it is paged: under a memory budget nothing that a batch freed is left behind.
            answered: told the place of a batch that is done, here or before.
        """
        keys = [self._key(batch) for batch in batches]
        missing = [place for place, key in enumerate(keys) if key not in self._known]
        for place in set(range(len(keys))) - set(missing):
            answered(place)
        mine = {}
        for place in missing if self._together else missing[process_index() :: processes()]:
            mine[keys[place]] = compute(place)
            if engine is not None and engine.division is not None:
                trim_heap()
            if self._file is not None:
                self._file.write(json.dumps([keys[place], mine[keys[place]]]) + "\n")
                self._file.flush()
            answered(place)
        for found in [mine] if self._together else everyone(mine):
            self._known |= found
        return [self._known[key] for key in keys]

    def _key(self, batch: Any) -> str:
        return hashlib.sha256(json.dumps([self._identity, batch], sort_keys=True, default=str).encode()).hexdigest()


def processes() -> int:
    """How many there are under `accelerate launch` or torchrun; 1 otherwise."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_index() -> int:
    """Of this one; the first writes results."""
    return int(os.environ.get("RANK", "0"))


def everyone(value: T) -> list[T]:
    """What each process has, in their order; waits for all of them."""
    if processes() == 1:
        return [value]
    PartialState(cpu=not torch.accelerator.is_available())
    return list(gather_object([value]))


def _whole_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(key, answer) of every line; one that a killed process left unfinished is passed over."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            key, answer = json.loads(line)
        except (ValueError, TypeError):
            continue
        yield key, answer


def identity_of(model: PreTrainedModel, model_dir: str | Path, engine: Engine | None) -> str:
    """Of what computes: the checkpoint's files by size and date, the routers as they are, precision, kernels, levers."""
    folder = Path(model_dir)
    names = [*shard_names(folder), *(path.name for pattern in ("*.json", "*.model") for path in folder.glob(pattern))]
    files = [(name, (stat := (folder / name).stat()).st_size, stat.st_mtime_ns) for name in sorted(set(names))]
    routers = combined({name: tensor_sha256(weight) for name, weight in router_parameters(model).items()})
    lever = None if engine is None or engine.is_exact else repr(engine.options)
    facts = [str(folder.resolve()), files, routers, str(model.dtype), str(model.device), torch.get_num_threads(), lever]
    return json.dumps([*facts, torch.__version__, transformers.__version__], default=str)
