"""Named groups of the user's own text, in pieces: files, data sets and chats, in the place of the corpus's domains."""

from collections.abc import Mapping
from dataclasses import fields
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from configs.load import UserError
from data.batches import DataArguments, tokenize
from data.sources import document_of, training_rows

MOST_ROWS = 2000
"""Rows that are looked at: of a large data set only the first ones."""
KEYS = ("dataset_name", "dataset_config_name", "dataset_split", "train_file", "domains")
Pieces = dict[str, list[npt.NDArray[np.integer]]]
"""Group -> pieces of text as token ids."""


def source_of(name: str, given: Any) -> DataArguments:
    """Where the text of a group is: the name of a .txt or .jsonl file or of a data set, or keys as training has them.

    Raises:
        UserError: a key that is not known.
    """
    if isinstance(given, str):
        is_file = given.endswith((".txt", ".jsonl"))
        return DataArguments(train_file=given) if is_file else DataArguments(dataset_name=given, dataset_split="test")
    if not isinstance(given, Mapping) or not set(given) <= set(KEYS):
        raise UserError(
            f"group {name} is {given!r}; write a .txt or .jsonl file, the name of a data set, or {{dataset_name: NAME, "
            f"dataset_split: SPLIT}} with keys among {', '.join(KEYS)}"
        )
    assert set(KEYS) <= {field.name for field in fields(DataArguments)}, "as in training"
    return DataArguments(**{str(key): value for key, value in given.items()})


def own_pieces(tokenizer: PreTrainedTokenizerBase, groups: Mapping[str, Any], *, tokens: int, per_group: int) -> Pieces:
    """At most `per_group` pieces of at most `tokens` tokens of each group, evenly over its first rows; chats are rendered
    with the tokenizer's chat template.

    Raises:
        UserError: a file or data set that cannot be read, or a row without text.
    """
    found: Pieces = {}
    for name, given in groups.items():
        source = source_of(name, given)
        texts = [document_of(row, source, tokenizer).text for row in islice(training_rows(source), MOST_ROWS)]
        documents = tokenize(texts, tokenizer)
        starts = [(number, 0) for number in range(len(documents))]
        starts += [
            (number, at)
            for number, ids in enumerate(documents)
            for at in range(4 * tokens, len(ids) - tokens, 4 * tokens)
        ]
        starts.sort()
        count = min(per_group, len(starts))
        chosen = [starts[place * len(starts) // count] for place in range(count)]
        found[name] = [documents[number][at : at + tokens] for number, at in chosen]
    return found
