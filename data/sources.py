"""Sources of text: the shipped corpus, a local JSONL or text file, or a Hugging Face data set; row by row."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from configs.load import UserError
from data.batches import Chat, DataArguments
from data.corpus import read_corpus

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def read_text(path: str | Path) -> str:
    """The text of a file; a `UserError` if it is missing, empty or not UTF-8."""
    return "".join(_lines(Path(path))).replace("\r\n", "\n").replace("\r", "\n")


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


def text_of(row: Row, args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> str:
    """The document that a row holds, or a `UserError` that says where it is; chats go through the chat template."""
    if not row.is_json:
        return row.content
    try:
        return _text_of(json.loads(row.content), args, tokenizer)
    except json.JSONDecodeError as error:
        raise UserError(f"{row.where}: not JSON ({error.msg})") from error
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from error


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file that is not empty; only a newline ends one, as JSON strings may hold U+2028 and the like."""
    if not path.is_file():
        raise UserError(f"text file {path} does not exist")
    is_empty, position = True, 0
    with path.open("rb") as file:
        for line in file:
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} is not UTF-8 text (byte {position + error.start}: {error.reason}); save it as UTF-8"
                ) from error
            position += len(line)
            is_empty = is_empty and not text.strip()
            yield text
    if is_empty:
        raise UserError(f"{path} is empty; write some text into it")


def _paragraphs(path: Path) -> Iterator[str]:
    """The paragraphs of a file: lines between empty lines."""
    for is_empty, lines in itertools.groupby(_lines(path), lambda line: line == "\n"):
        if not is_empty:
            yield "".join(lines).strip("\n")


def _hugging_face(args: DataArguments) -> Iterator[Row]:
    import datasets

    try:
        rows = datasets.load_dataset(args.dataset_name, split=args.dataset_split)
    except (FileNotFoundError, ValueError, ConnectionError) as error:
        raise UserError(f"data set {args.dataset_name} ({args.dataset_split}) cannot be loaded: {error}") from error
    for number, row in enumerate(rows):
        yield Row(f"{args.dataset_name}, row {number}", json.dumps(row, default=str), is_json=True)


def _text_of(row: Any, args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> str:
    fields = row if isinstance(row, dict) else {}
    if isinstance(fields.get("text"), str):
        return fields["text"]
    messages = fields.get("messages") or [_from_sharegpt(turn) for turn in fields.get("conversations") or []]
    if not messages:
        raise UserError("needs a field text, messages (role, content) or conversations (from, value)")
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        return Chat(text, _said_by_assistant(messages, text, tokenizer)) if args.assistant_only_loss else text
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, TemplateError) as error:
        raise UserError(
            f"the chat cannot be written as text ({error}); give a tokenizer with a chat_template, or a field text"
        ) from error


def _said_by_assistant(
    messages: list[dict[str, str]], text: str, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[int, int]]:
    """The begin and end of each of the assistant's turns in the chat's text, without the words that ask for a turn."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise UserError("no turn of the assistant, which alone is learnt under assistant_only_loss; leave the row out")
    for turn in turns:
        before = str(tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True))
        after = str(tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False))
        if not (text.startswith(after) and after.startswith(before)):
            raise UserError(
                "the chat template writes earlier turns differently once a chat goes on, so that the assistant's cannot be "
                "found in the text; write assistant_only_loss=false"
            )
        yield len(before), len(after)


def _from_sharegpt(turn: Any) -> dict[str, str]:
    try:
        return {"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}
    except (KeyError, TypeError) as error:
        roles = ", ".join(SHAREGPT_ROLES)
        raise UserError(f"a turn of conversations needs from (one of {roles}) and value") from error
