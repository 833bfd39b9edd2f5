"""Chats: rows as people write them brought into one form, written as text by a chat template, and who said what.

The form is that of `tokenizer.apply_chat_template`: turns with role and content, tool calls with parsed arguments.
"""

import json
import re
from collections.abc import Iterator, Mapping
from os.path import commonprefix
from typing import Any

from transformers import PreTrainedTokenizerBase

from configs.load import UserError
from data.batches import Chat

SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "tool": "tool", "observation": "tool",
}  # fmt: skip
OPENED = re.compile(r"\s*<think>\s*(</think>\s*)?")
"""What a template may put behind its words that ask for a turn, and leave out of a turn that was answered."""
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
NO_TURN = "no turn of the assistant, which alone is learnt under assistant_only_loss; leave the row out"
Turn = dict[str, Any]


def chat_column(fields: Mapping[str, Any]) -> str | None:
    """The column that holds a chat; of two the first counts. None: the row holds none."""
    return next((column for column in ("messages", "conversations") if fields.get(column)), None)


def chat_text(fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, assistant_only: bool) -> str:
    """The text of a row with messages (role, content) or conversations (from, value); tools and system columns count.

    Returns:
        With `assistant_only` a `Chat`, which knows what the assistant says.

    Raises:
        UserError: what it holds cannot be written without loss, or the assistant cannot be found.
    """
    turns, tools = _turns(fields), _parsed(fields.get("tools"), "tools")
    write = _Writer(tokenizer, tools)
    text = write(turns)
    if not assistant_only:
        return text
    template = tokenizer.get_chat_template(tools=tools)
    return Chat(text, _marked(turns, write) if MARKS.search(template) else _said(turns, write, text))


def _turns(fields: Mapping[str, Any]) -> list[Turn]:
    """The turns in one form."""
    column = chat_column(fields)
    assert column is not None, "whoever calls this has looked"
    rows = _parsed(fields[column], column)
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{column} must be a list of turns that is not empty, found {json.dumps(rows)[:60]}")
    turns = [_turn(row, number, column) for number, row in enumerate(rows, start=1)]
    system = fields.get("system")
    if isinstance(system, str) and system and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    return turns


def _turn(row: Any, number: int, column: str) -> Turn:
    where = f"turn {number} of {column}"
    if not isinstance(row, dict):
        raise UserError(f"{where} is no object but {json.dumps(row)[:60]}")
    turn = {key: value for key, value in row.items() if value is not None}
    if column == "conversations" and "role" not in turn:
        if turn.get("from") not in SHAREGPT_ROLES or "value" not in turn:
            raise UserError(f"{where} needs from (one of {', '.join(SHAREGPT_ROLES)}) and value")
        turn = {"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}
    calls = turn.get("tool_calls")
    if not isinstance(turn.get("role"), str) or ("content" not in turn and not calls):
        raise UserError(f"{where} needs a role and a content")
    turn["content"] = _content(turn.get("content", ""), where)
    if calls:
        turn["tool_calls"] = [_call(call, where) for call in calls]
    return turn


def _content(content: Any, where: str) -> str:
    """Text as it is, or the texts of a list of parts, joined."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get("type", "text") != "text":
            raise UserError(f"{where} holds {json.dumps(part)[:60]}, which is no text; leave the row out")
    return "".join(part["text"] for part in parts)


def _call(call: Any, where: str) -> Any:
    """A tool call whose arguments are an object: people also write them as text in JSON, which a template would quote."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise UserError(f"{where} holds a tool call that is no object: {json.dumps(call)[:60]}")
    parsed = {**function, "arguments": _parsed(function.get("arguments", {}), f"{where}: arguments")}
    return {**call, "function": parsed} if "function" in call else parsed


def _parsed(value: Any, what: str) -> Any:
    """A value that may be JSON in a text, as data sets with one type for each column have it."""
    if not isinstance(value, str):
        return value or None
    try:
        return json.loads(value)
    except ValueError as error:
        raise UserError(f"{what} is text that is no JSON: {value[:60]!r}") from error


class _Writer:
    """Writes turns by a tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tools: Any) -> None:
        self.tokenizer, self.options = tokenizer, {"tools": tools, "tokenize": False}

    def __call__(self, turns: list[Turn], **more: Any) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(turns, **self.options, **more))
        except Exception as error:  # a template is a program of its own
            raise UserError(
                f"the chat cannot be written as text ({type(error).__name__}: {error}); give a tokenizer with a chat_template "
                "that takes it, or a field text"
            ) from error


def _marked(turns: list[Turn], write: _Writer) -> Iterator[tuple[int, int]]:
    """Begin and end of what the template itself marks by `{% generation %}`."""
    tokenizer = write.tokenizer
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    offsets = {"return_offsets_mapping": True}
    found: Any = tokenizer.apply_chat_template(turns, **{**write.options, **options}, tokenizer_kwargs=offsets)
    spans = [span for span, said in zip(found["offset_mapping"], found["assistant_masks"], strict=True) if said]
    if not spans:
        raise UserError(NO_TURN)
    yield from spans


def _said(turns: list[Turn], write: _Writer, text: str) -> Iterator[tuple[int, int]]:
    """Begin and end of each of the assistant's turns, without the words that ask for a turn."""
    numbers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not numbers:
        raise UserError(NO_TURN)
    for number in numbers:
        before = write(turns[:number], add_generation_prompt=True) if number else _asking(turns, write)
        after = write(turns[: number + 1])
        shared = commonprefix([before, after])  # noqa: RUF071 (characters are meant)
        if not text.startswith(after):
            raise UserError(
                f"the chat template writes turn {number + 1} differently once the chat goes on, so that what the assistant "
                "says cannot be found in the text; write assistant_only_loss=false, or give a template with "
                "{% generation %} marks"
            )
        if shared != before and not OPENED.fullmatch(before[len(shared) :]):
            raise UserError(
                f"what the chat template writes to ask for turn {number + 1} is not what it writes before an answer; write "
                "assistant_only_loss=false, or give a template with {% generation %} marks"
            )
        yield len(shared), len(after)


def _asking(turns: list[Turn], write: _Writer) -> str:
    """What stands before a first turn that is the assistant's; templates write nothing for no turns, or refuse."""
    someone = [{"role": "user", "content": "?"}]
    asking = write(someone, add_generation_prompt=True).removeprefix(write(someone))
    asking, first = re.sub(rf"{OPENED.pattern}\Z", "", asking), write(turns[:1])
    return first[: first.find(asking) + len(asking)] if asking in first else ""
