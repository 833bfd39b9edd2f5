"""Tokens of a data set, made once, kept on disk and mapped into memory: no process holds the text or all of its tokens.

A folder in `$XDG_CACHE_HOME/remoe/tokens` (`~/.cache` if unset), named by a hash of the rows and of the tokenizer, so that
it can neither be stale nor belong to something else. It may be deleted at any time.
"""

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from configs.load import UserError
from data.batches import NO_TEXT, DataArguments, tokenize
from data.sources import Row, document_of, training_rows

IDS, LENGTHS, ABOUT = "ids.int32", "lengths.npy", "about.json"
FORMAT_VERSION = 3  # of how rows become tokens: tokens that were made otherwise are made anew
CHUNK = 1000  # rows that are tokenized at a time
NAMED = 10  # rows left out that are named one by one


class Documents(Sequence[np.ndarray]):
    """Token ids of every document, as `tokenize` makes them, in a file that is mapped into memory.

    `left_out` counts the rows that are no documents; `first_left_out` says where the first of them are and why; `columns`
    counts the others by the column that was read, "" of plain text; `largest_id` is that of all tokens; `sha256` is a digest
    of them and of where documents end.
    """

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        self.left_out: int = about["left_out"]
        self.first_left_out: list[str] = about["first_left_out"]
        self.largest_id: int = about["largest_id"]
        self.sha256: str = about["sha256"]
        self.columns: dict[str, int] = about["columns"]
        lengths = np.load(folder / LENGTHS)
        if (folder / IDS).stat().st_size != 4 * int(lengths.sum()):
            raise ValueError(f"{folder / IDS} is not {4 * int(lengths.sum())} bytes long")
        self._ends = np.cumsum(lengths)
        self._ids = np.memmap(folder / IDS, dtype=np.int32, mode="r") if len(lengths) else np.empty(0, dtype=np.int32)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        number = range(len(self))[index]
        if isinstance(number, range):
            return [self[i] for i in number]
        return self._ids[self._ends[number - 1] if number else 0 : self._ends[number]]


def training_documents(args: DataArguments, tokenizer: PreTrainedTokenizerBase, *, progress: bool = False) -> Documents:
    """The documents that `args` names, from the cache if they are there.

    A `UserError` tells of rows that are no documents (unless `skip_bad_rows`), of no text at all, or of a full disk.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "remoe" / "tokens"
    folder = cache / _fingerprint(args, tokenizer)
    try:
        documents = Documents(folder)
    except (OSError, ValueError, KeyError):
        shutil.rmtree(folder, ignore_errors=True)
        documents = _make(folder, args, tokenizer, progress=progress)
    if documents.left_out and not args.skip_bad_rows:
        raise UserError(
            f"{left_out_text(documents, between='; ')}. Repair them, or write skip_bad_rows=true to leave them out"
        )
    if not len(documents):
        raise UserError(NO_TEXT)
    return documents


def left_out_text(documents: Documents, *, between: str = "\n  ") -> str:
    """A sentence on how many rows are no documents, and which of them come first."""
    more = documents.left_out - len(documents.first_left_out)
    lines = [*documents.first_left_out, *[f"and {more} more"] * bool(more)]
    total = documents.left_out + len(documents)
    return between.join([f"{documents.left_out} of {total} rows cannot be used", *lines])


def _make(folder: Path, args: DataArguments, tokenizer: PreTrainedTokenizerBase, *, progress: bool) -> Documents:
    """Tokenize into a folder aside, which then takes its place; where none can be written, a temporary one does."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-", ignore_cleanup_errors=True)
    except OSError:
        aside = tempfile.TemporaryDirectory(prefix="remoe-tokens-", ignore_cleanup_errors=True)
    with aside as name:
        _write(Path(name), args, tokenizer, progress=progress)
        documents = Documents(Path(name))
        with suppress(OSError):  # another process was faster; what is mapped stays when its name is gone
            os.replace(name, folder)
    return documents


def _write(folder: Path, args: DataArguments, tokenizer: PreTrainedTokenizerBase, *, progress: bool) -> None:
    lengths: list[int] = []
    bad: list[str] = []
    columns = Counter[str]()
    largest_id, digest = 0, hashlib.sha256()
    rows = iter(tqdm(training_rows(args), desc="tokenizing", unit="row", disable=not progress))
    try:
        with (folder / IDS).open("wb") as ids:
            while part := list(itertools.islice(rows, CHUNK)):
                texts = _texts(part, args, tokenizer, bad=bad, columns=columns)
                for document in tokenize(texts, tokenizer) if texts else []:
                    lengths.append(len(document))
                    largest_id = max(largest_id, int(np.maximum(document, ~document).max()))
                    ids.write(document.tobytes())
                    digest.update(document.tobytes())
        np.save(folder / LENGTHS, np.array(lengths, dtype=np.int64))
        digest.update(np.array(lengths, dtype=np.int64).tobytes())
        about: dict[str, Any] = {"left_out": len(bad), "first_left_out": bad[:NAMED], "largest_id": largest_id}
        about |= {"sha256": digest.hexdigest(), "columns": columns}
        (folder / ABOUT).write_text(json.dumps(about, indent=2), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"tokens of the data cannot be written to {folder.parent} ({error}); free some space, or set XDG_CACHE_HOME to "
            "a folder on another disk"
        ) from error


def _texts(
    rows: Sequence[Row],
    args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    bad: list[str],
    columns: Counter[str],
) -> list[str]:
    """The documents of these rows; messages about rows that hold none are added to `bad`, and columns are counted."""
    texts = []
    for row in rows:
        try:
            text, column = document_of(row, args, tokenizer)
            texts.append(text)
            columns[column] += 1
        except UserError as error:
            bad.append(str(error))
    return [text for text in texts if text]


def _fingerprint(args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides the tokens, and of the data set's name, by which rows left out are told."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else f"{type(tokenizer).__name__} {tokenizer.get_vocab()}"
    settings = f"{FORMAT_VERSION} {tokenizer.eos_token_id} {tokenizer.chat_template} {args.assistant_only_loss}"
    rows = (f"{row.is_json} {row.content}" for row in training_rows(args))
    digest = hashlib.sha256()
    for part in itertools.chain((vocabulary, settings, str(args.train_file or args.dataset_name)), rows):
        digest.update(hashlib.sha256(part.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()
