"""Real text of a wanted length: pieces of the shipped corpus, in the tokens of the model that is measured."""

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from configs.load import UserError
from data.batches import tokenize
from data.corpus import DOMAINS, read_corpus

TOKEN_CHARACTERS = 20  # no tokenizer has more to a token on average


def document_beginnings(
    tokenizer: PreTrainedTokenizerBase, split: str, *, tokens: int, count: int, domains: Sequence[str] = DOMAINS
) -> list[list[int]]:
    """Beginnings, `tokens` ids long, of the first `count` documents that have as many, the domains in turn; a `UserError`
    if there are fewer."""
    per_domain = -(-count // len(domains))
    by_domain = [list(islice(_beginnings(tokenizer, split, domain, tokens), per_domain)) for domain in domains]
    in_turn = [rows[i] for i in range(per_domain) for rows in by_domain if i < len(rows)]
    if len(in_turn) < count:
        raise UserError(
            f"the {split} split has only {len(in_turn)} documents to offer with {tokens} tokens of this tokenizer, "
            f"{count} were asked for; ask for fewer or shorter prompts"
        )
    return in_turn[:count]


def _beginnings(tokenizer: PreTrainedTokenizerBase, split: str, domain: str, tokens: int) -> Iterator[list[int]]:
    for document in read_corpus(split, [domain]):
        ids = tokenizer(document.text[: TOKEN_CHARACTERS * tokens], verbose=False)["input_ids"]
        if len(ids) >= tokens:
            yield list(ids[:tokens])


def spread_pieces(
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    domains: Sequence[str],
    *,
    tokens: int,
    at_least: int,
    every: int,
    per_domain: int,
) -> list[npt.NDArray[np.integer]]:
    """Pieces of tokenized documents, `per_domain` of each domain, evenly over its part; a `UserError` if it has fewer.

    Args:
        tokens: the length of a piece; one that ends with its document may be shorter.
        at_least: tokens that a document must still have where a piece begins.
        every: a document's pieces begin at multiples of this.
    """
    chosen = []
    for domain in domains:
        documents = tokenize((document.text for document in read_corpus(split, [domain])), tokenizer)
        pieces = [ids[at : at + tokens] for ids in documents for at in range(0, len(ids) - at_least + 1, every)]
        if len(pieces) < per_domain:
            raise UserError(
                f"{split} has {len(pieces)} pieces of {tokens} tokens in {domain}, {per_domain} were asked for"
            )
        chosen += [pieces[number * len(pieces) // per_domain] for number in range(per_domain)]
    return chosen
