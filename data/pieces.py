"""Real prompts: the beginnings of documents of the shipped corpus, in the tokens of the model that is measured."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from configs.load import UserError
from data.corpus import DOMAINS, read_corpus


def document_beginnings(
    tokenizer: PreTrainedTokenizerBase, split: str, *, tokens: int, count: int, domains: Sequence[str] = DOMAINS
) -> list[list[int]]:
    """`count` token lists of `tokens` ids, the domains in turn, from documents that are at least so long.

    Raises:
        UserError: there are fewer such documents.
    """
    by_domain = {domain: _beginnings(tokenizer, split, domain, tokens, -(-count // len(domains))) for domain in domains}
    longest = max(map(len, by_domain.values()))
    in_turn = [rows[i] for i in range(longest) for rows in by_domain.values() if i < len(rows)]
    if len(in_turn) < count:
        raise UserError(
            f"the {split} split has only {len(in_turn)} documents to offer with {tokens} tokens of this tokenizer, "
            f"{count} were asked for; ask for fewer or shorter prompts"
        )
    return in_turn[:count]


def _beginnings(
    tokenizer: PreTrainedTokenizerBase, split: str, domain: str, tokens: int, count: int
) -> list[list[int]]:
    found: list[list[int]] = []
    for document in read_corpus(split, [domain]):
        if len(found) == count:
            break
        ids = tokenizer(document.text[: 20 * tokens], verbose=False)[
            "input_ids"
        ]  # no token is 20 characters on average
        if len(ids) >= tokens:
            found.append(list(ids[:tokens]))
    return found
