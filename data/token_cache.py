"""Tokens of documents, kept between runs: the arms of a pipeline, and its processes, tokenize the same text once.

A file in `$XDG_CACHE_HOME/remoe/tokens` (`~/.cache` if unset), named by a hash of the texts and of the tokenizer, so that
it can neither be stale nor belong to something else. It may be deleted at any time.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

from data.batches import Chat, tokenize


def cached_tokens(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """What `tokenize` gives, from the cache if it is there.

    Raises:
        UserError: see `tokenize`.
    """
    everything = list(texts)
    path = _folder() / f"{_fingerprint(everything, tokenizer)}.safetensors"
    try:
        stored = load_file(path)
        return np.split(stored["ids"], np.cumsum(stored["lengths"])[:-1])
    except (OSError, SafetensorError, KeyError):
        documents = tokenize(everything, tokenizer)
        _write(path, documents)
        return documents


def _write(path: Path, documents: Sequence[np.ndarray]) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lengths = np.array([len(document) for document in documents], dtype=np.int64)
        save_file({"ids": np.concatenate(documents), "lengths": lengths}, aside)
        os.replace(aside, path)
    except (OSError, SafetensorError):
        with suppress(OSError):  # a cache that cannot be written costs time, nothing else
            aside.unlink()


def _fingerprint(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    about = backend.to_str() if backend is not None else f"{type(tokenizer).__name__} {tokenizer.get_vocab()}"
    digest = hashlib.sha256(f"{about} {tokenizer.eos_token_id}".encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
        if isinstance(text, Chat):
            digest.update(repr(text.learned).encode())
    return digest.hexdigest()


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "remoe" / "tokens"
