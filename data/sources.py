"""Where text comes from: the shipped corpus, a local JSONL or text file, or a Hugging Face data set."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from configs.load import UserError
from data.batches import Chat, DataArguments
from data.corpus import read_corpus

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def read_text(path: str | Path) -> str:
    """A UTF-8 text file that is not empty.

    Raises:
        UserError: the file is missing, empty or not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"text file {path} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8") from error
    if not text.strip():
        raise UserError(f"{path} is empty; write some text into it")
    return text


def training_texts(args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The documents that `args` names, as plain text; chats go through the tokenizer's chat template."""
    if args.train_file is not None:
        path = Path(args.train_file)
        if path.suffix == ".jsonl":
            yield from _jsonl(path, args, tokenizer)
        elif path.suffix == ".txt":
            yield from (text for text in read_text(path).split("\n\n") if text.strip())
        else:
            raise UserError(f"train_file {path} must end in .jsonl or .txt")
    elif args.dataset_name == "embedded":
        yield from (document.text for document in read_corpus(args.dataset_split, args.domains))
    else:
        yield from _hugging_face(args, tokenizer)


def _jsonl(path: Path, args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    # not splitlines(): JSON strings may hold U+2028 and other characters that Python takes for line ends
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error.msg})") from error
        yield _text_of(row, args, tokenizer, where=f"{path}, line {number}")


def _hugging_face(args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    import datasets

    try:
        rows = datasets.load_dataset(args.dataset_name, split=args.dataset_split)
    except (FileNotFoundError, ValueError, ConnectionError) as error:
        raise UserError(f"data set {args.dataset_name} ({args.dataset_split}) cannot be loaded: {error}") from error
    for number, row in enumerate(rows):
        yield _text_of(row, args, tokenizer, where=f"{args.dataset_name}, row {number}")


def _text_of(row: Any, args: DataArguments, tokenizer: PreTrainedTokenizerBase, *, where: str) -> str:
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return row["text"]
    if isinstance(row, dict) and row.get("messages"):
        messages = row["messages"]
    elif isinstance(row, dict) and row.get("conversations"):
        messages = [_from_sharegpt(turn, where=where) for turn in row["conversations"]]
    else:
        raise UserError(f"{where}: needs a field text, messages (role, content) or conversations (from, value)")
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        return Chat(text, _said_by_assistant(messages, text, tokenizer)) if args.assistant_only_loss else text
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (ValueError, TypeError, TemplateError) as error:
        raise UserError(
            f"{where}: the chat cannot be written as text ({error}); give a tokenizer with a chat_template, or a field "
            "text"
        ) from error


def _said_by_assistant(
    messages: list[dict[str, str]], text: str, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[int, int]]:
    """Where the assistant's turns are in the chat's text: from after what asks for one to where it ends.

    Raises:
        UserError: there is none, or the template writes a chat's beginning differently once it goes on.
    """
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


def _from_sharegpt(turn: Any, *, where: str) -> dict[str, str]:
    try:
        return {"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}
    except (KeyError, TypeError) as error:
        roles = ", ".join(SHAREGPT_ROLES)
        raise UserError(f"{where}: a turn of conversations needs from (one of {roles}) and value") from error
