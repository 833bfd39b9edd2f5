"""Documents -> tokens -> packed rows; row i depends on nothing but (documents, seed, i), so resuming is an index.

Rows are cut from an endless stream of shuffled epochs. A document that crosses a row's end goes on in the next row as a
sequence of its own; attention, labels and every pair of neighbouring positions stop at a document's edge.
Letters: B batch, S sequence.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from configs.load import UserError

IGNORE_LABEL = -100  # what torch's and transformers' cross entropy leave out
PADDING = -1  # document id of a padded position
NO_TEXT = "the data set holds no text; check dataset_name, dataset_split, train_file and domains"


@dataclass
class DataArguments:
    """The text that the model reads, and how it is cut into rows."""

    dataset_name: str = "embedded"  # `embedded` (what ships), or a Hugging Face data set, by hub name or local folder
    dataset_config_name: str | None = None  # configuration of a Hugging Face data set that has several
    dataset_split: str = "train"  # split of `dataset_name`
    train_file: str | None = None  # instead of dataset_name: .txt, or .jsonl with text, messages or conversations
    # parts of `embedded` that are read
    domains: list[str] = field(default_factory=lambda: ["prose", "code", "glosses", "puzzles"])
    max_length: int = 512  # tokens in a packed row
    # leave out rows that hold neither text nor a chat, and say how many; otherwise they are refused
    skip_bad_rows: bool = False
    assistant_only_loss: bool = False  # of chats, predict only what the assistant says; the rest is read, not learnt

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(f"max_length={self.max_length} leaves no pair of neighbouring tokens; write at least 2")


class Batch(NamedTuple):
    """Packed rows of token ids.

    Shapes: all [B, S] int64. `labels_BS[b, t]` is the token after position t, or IGNORE_LABEL where there is none
    (a document's last position, padding, a masked prompt). `position_ids_BS` restarts at every document.
    `document_ids_BS` is PADDING where there is no token.
    """

    input_ids_BS: Tensor
    labels_BS: Tensor
    position_ids_BS: Tensor
    document_ids_BS: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*moved(self, device))


def moved(tensors: Iterable[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on a device; a CUDA device is not waited for."""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    return [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]


class Chat(str):
    """A text of which only some characters are to be learnt: `learned` holds where such spans begin and end."""

    learned: tuple[tuple[int, int], ...]

    def __new__(cls, text: str, learned: Iterable[tuple[int, int]]) -> "Chat":
        chat = super().__new__(cls, text)
        chat.learned = tuple(learned)
        return chat


def tokenize(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """Token ids of every text, with the end-of-text token before and after it.

    A token of a `Chat` that is not to be learnt is the complement ~id of its id, which is negative. A `UserError` says
    that the tokenizer has no end-of-text token or no offsets, or that there is no text.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {tokenizer.name_or_path} has no eos_token; set one in its tokenizer_config.json")
    everything = [text for text in texts if text]
    if not everything:
        raise UserError(NO_TEXT)
    chats = {number: text for number, text in enumerate(everything) if isinstance(text, Chat)}
    if chats and not tokenizer.is_fast:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path} does not tell which characters its tokens come from, which "
            "assistant_only_loss needs; give one with a tokenizer.json, or write assistant_only_loss=false"
        )
    options = {"add_special_tokens": False, "verbose": False, "return_offsets_mapping": bool(chats)}
    encoded, edge = tokenizer([str(text) for text in everything], **options), [tokenizer.eos_token_id]
    documents = [np.asarray(edge + ids + edge, dtype=np.int32) for ids in encoded["input_ids"]]
    for number, chat in chats.items():
        begins = np.array([begin for begin, _ in encoded["offset_mapping"][number]])
        learned = np.any([(begins >= begin) & (begins < end) for begin, end in chat.learned], axis=0)
        ids = documents[number][1:-1]
        ids[~learned] = ~ids[~learned]
    return documents


class PackedRows:
    """An endless, random-access sequence of rows of `max_length` tokens.

    Every epoch joins the documents in a new order, cuts the stream into rows and shuffles the rows, so that a batch does
    not hold neighbouring pieces of one long document. What does not fill a last row waits for the next epoch's order.
    Documents that together do not fill one row are a `UserError`.
    """

    def __init__(self, documents: Sequence[np.ndarray], *, max_length: int, seed: int) -> None:
        self.documents = documents
        self._lengths = np.array([len(document) for document in documents], dtype=np.int64)
        self.max_length = max_length
        self.seed = seed
        self.tokens_per_epoch = int(self._lengths.sum())
        self.rows_per_epoch = self.tokens_per_epoch // max_length
        if self.rows_per_epoch == 0:
            raise UserError(
                f"the data has {self.tokens_per_epoch} tokens, fewer than one row of max_length={max_length}; "
                "give more text or write a smaller max_length"
            )
        self._epoch = -1
        self._order = self._ends = self._rows = np.empty(0, dtype=np.int64)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows with these indices as one batch."""
        pieces = [self._row(row) for row in rows]
        return Batch(*(torch.from_numpy(np.stack(arrays)) for arrays in zip(*pieces, strict=True)))

    def _row(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        epoch, place = divmod(row, self.rows_per_epoch)
        self._shuffle(epoch)
        size = self.max_length
        ids, positions, documents = np.empty((3, size), dtype=np.int64)
        labels = np.full(size, IGNORE_LABEL, dtype=np.int64)
        start = int(self._rows[place]) * size
        filled = 0
        while filled < size:
            which = int(np.searchsorted(self._ends, start + filled, side="right"))
            document = self.documents[int(self._order[which])]
            offset = start + filled - (int(self._ends[which]) - len(document))
            part = document[offset : offset + size - filled]
            here = slice(filled, filled + len(part))
            ids[here] = np.where(part < 0, ~part, part)
            labels[filled : filled + len(part) - 1] = np.where(part[1:] < 0, IGNORE_LABEL, part[1:])
            positions[here] = np.arange(len(part))
            documents[here] = which
            filled += len(part)
        return ids, labels, positions, documents

    def _shuffle(self, epoch: int) -> None:
        """Document order, the token offset at which each document ends, and row order of an epoch."""
        if epoch != self._epoch:
            draw = np.random.default_rng([self.seed, epoch])
            self._order = draw.permutation(len(self.documents))
            self._ends = np.cumsum(self._lengths[self._order])
            self._rows = draw.permutation(self.rows_per_epoch)
            self._epoch = epoch
