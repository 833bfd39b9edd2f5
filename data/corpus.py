"""The shipped corpus: four domains of real text, split into train, validation and test by document.

Reading only; `data/build_embedded.py` is how the files were made. A document is a chapter or a scene (prose), a source
file (code), a run of neighbouring dictionary entries (glosses) or a page of problems (puzzles).
"""

import json
import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.load import UserError

EMBEDDED = Path(__file__).parent / "embedded"
DOMAINS = ("prose", "code", "glosses", "puzzles")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Document:
    """One text that is never cut between splits; `id` is unique in the corpus and says where the text is from."""

    id: str
    domain: str
    text: str


def read_corpus(split: str, domains: Sequence[str] = DOMAINS) -> Iterator[Document]:
    """The documents of one split in file order; a `UserError` if there is no such split or domain."""
    if split not in SPLITS:
        raise UserError(f"split {split!r} is not in the corpus; choose one of {', '.join(SPLITS)}")
    if unknown := sorted(set(domains) - set(DOMAINS)):
        raise UserError(f"domain {unknown[0]!r} is not in the corpus; choose from {', '.join(DOMAINS)}")
    with lzma.open(EMBEDDED / "corpus" / f"{split}.jsonl.xz", "rt", encoding="utf-8") as lines:
        for line in lines:
            if (document := Document(**json.loads(line))).domain in domains:
                yield document
