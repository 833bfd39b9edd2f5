"""A shard written anew so that whatever is whole pages long starts on a page: experts can then be read straight into slots.

Nothing but the order of the tensors and the length of the header changes; the file is an ordinary safetensors shard. The
library itself aligns data to 8 bytes only. Files and bytes; no torch.
"""

import json
import shutil
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from configs.files import folder_aside, writing_aside
from configs.load import UserError
from evaluation.engine.store.experts import ExpertStore
from evaluation.engine.store.pages import PAGE_BYTES
from training.model.shards import AGAIN, StoredTensor, read_shard

CHUNK_BYTES = 16 * 2**20
OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5"}
"""Weights in other forms, which a copy of a checkpoint leaves behind."""


def write_packed(model_dir: Path, output: Path) -> None:
    """Write the whole folder anew, aside and renamed; a damaged shard is a `UserError`, which leaves nothing behind."""
    with folder_aside(output) as aside:
        for path in tqdm(sorted(model_dir.iterdir()), desc="pack", unit="file"):
            if path.suffix == ".safetensors":
                pack_shard(path, aside / path.name)
            elif path.is_file() and path.suffix not in OTHER_WEIGHTS:
                shutil.copyfile(path, aside / path.name)


def pack_shard(shard: Path, packed: Path) -> None:
    """Write `shard` to `packed`, which may be the same, aside and renamed. What is whole pages long comes first."""
    metadata, tensors = read_shard(shard)
    order = sorted(tensors, key=lambda tensor: (tensor.length_bytes % PAGE_BYTES != 0, tensor.offset))
    with writing_aside(packed) as aside, shard.open("rb") as source, aside.open("wb") as target:
        target.write(header(metadata, order))
        for tensor in order:
            for chunk in chunks(source, tensor):
                target.write(chunk)


def header(metadata: dict[str, str], order: Iterable[StoredTensor]) -> bytes:
    """Length and JSON of a safetensors file with these tensors, filled up with spaces to whole pages."""
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for tensor in order:
        start, end = end, end + tensor.length_bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % PAGE_BYTES)
    return struct.pack("<Q", len(text)) + text


def chunks(source: BinaryIO, tensor: StoredTensor) -> Iterator[bytes]:
    """The bytes of a tensor, some at a time; a `UserError` if the file became shorter."""
    source.seek(tensor.offset)
    left_bytes = tensor.length_bytes
    while left_bytes:
        chunk = source.read(min(left_bytes, CHUNK_BYTES))
        if not chunk:
            raise UserError(f"shard {tensor.shard} became shorter while it was read; {AGAIN}")
        left_bytes -= len(chunk)
        yield chunk


def is_packed(store: ExpertStore) -> bool:
    """Whether every expert lies in whole pages, so that none is copied after reading."""
    extents = (extent for key in store.keys for extent in store.extents(*key))
    return all(extent.offset % PAGE_BYTES == extent.length_bytes % PAGE_BYTES == 0 for extent in extents)
