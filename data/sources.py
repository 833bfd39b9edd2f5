"""Sources of text: the shipped corpus, a local JSONL or text file, or a Hugging Face data set; row by row."""

import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from configs.load import UserError
from data.batches import DataArguments
from data.chats import chat_column, chat_text
from data.corpus import read_corpus


def read_text(path: str | Path) -> str:
    """The text of a file, a pipe, or what is read from the terminal (`-`); a `UserError` if it is missing, empty or not UTF-8."""
    return "".join(_lines(Path(path))).replace("\r", "\n")


class Row(NamedTuple):
    """One row of a data set as it is stored: plain text, or an object in JSON."""

    where: str  # for messages: file and line, or data set and row
    content: str
    is_json: bool = False


def training_rows(args: DataArguments) -> Iterator[Row]:
    """The rows that `args` names, one at a time; a `UserError` if the file or data set cannot be read."""
    if args.train_file is not None:
        path = Path(args.train_file)
        if path.suffix == ".jsonl":
            for number, line in enumerate(_lines(path), start=1):
                if line.strip():
                    yield Row(f"{path}, line {number}", line, is_json=True)
        elif path.suffix == ".txt":
            yield from (Row(f"{path}, paragraph {n}", text) for n, text in enumerate(_paragraphs(path), start=1))
        else:
            raise UserError(f"train_file {path} must end in .jsonl or .txt")
    elif args.dataset_name == "embedded":
        yield from (Row(document.id, document.text) for document in read_corpus(args.dataset_split, args.domains))
    else:
        yield from _hugging_face(args)


class Document(NamedTuple):
    """What a row holds, and the column that it stood in; "" of plain text."""

    text: str
    column: str = ""


def document_of(row: Row, args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> Document:
    """The document that a row holds, or a `UserError` that says where it is; chats go through the chat template."""
    if not row.is_json:
        return Document(row.content)
    try:
        return _document_of(json.loads(row.content), args, tokenizer)
    except json.JSONDecodeError as error:
        raise UserError(f"{row.where}: not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise UserError(f"{row.where}: {error}") from error
        raise UserError(f"{row.where}: not JSON that can be read ({error})") from error


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file that is not empty, without a byte-order mark and as on Unix.

    Only a newline ends one, as JSON strings may hold U+2028 and the like.
    """
    if str(path) != "-" and (path.is_dir() or not path.exists()):
        raise UserError(f"text file {path} {'is a folder' if path.is_dir() else 'does not exist'}")
    is_empty, position = True, 0
    with nullcontext(sys.stdin.buffer) if str(path) == "-" else path.open("rb") as file:
        for line in file:
            try:
                text = line.decode("utf-8-sig" if position == 0 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} is not UTF-8 text (byte {position + error.start}: {error.reason}); save it as UTF-8"
                ) from error
            position += len(line)
            is_empty = is_empty and not text.strip()
            yield f"{text[:-2]}\n" if text.endswith("\r\n") else text
    if is_empty:
        raise UserError(f"{path} is empty; write some text into it")


def _paragraphs(path: Path) -> Iterator[str]:
    """The paragraphs of a file: lines between blank lines."""
    for is_blank, lines in itertools.groupby(_lines(path), lambda line: not line.strip()):
        if not is_blank:
            yield "".join(lines).strip("\n")


def _hugging_face(args: DataArguments) -> Iterator[Row]:
    import datasets

    if Path(str(args.dataset_name)).is_file():
        raise UserError(f"dataset_name={args.dataset_name} is a file; write train_file={args.dataset_name}")
    try:
        rows = datasets.load_dataset(args.dataset_name, args.dataset_config_name, split=args.dataset_split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        hint = "; write one as dataset_config_name" if "onfig name is missing" in str(error) else ""
        raise UserError(
            f"data set {args.dataset_name} ({args.dataset_split}) cannot be loaded: {error}{hint}"
        ) from error
    for number, row in enumerate(rows):
        yield Row(f"{args.dataset_name}, row {number}", json.dumps(row, default=str), is_json=True)


def _document_of(row: Any, args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> Document:
    fields = row if isinstance(row, dict) else {}
    if column := chat_column(fields):
        text = chat_text(fields, tokenizer, assistant_only=args.assistant_only_loss)
    elif isinstance(fields.get("text"), str):
        text, column = fields["text"], "text"
    else:
        raise UserError("needs a field text, messages (role, content) or conversations (from, value)")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"holds half a character at place {error.start}, a lone surrogate") from error
    return Document(text, column)
