"""Makes the shipped lm-evaluation-harness tasks from the corpus's test split: `python -m data.build_tasks`.

The YAML files under `data/embedded/tasks` are written by hand; the items beside them are made here. Coefficients must
not be chosen on the test split; the same tasks on another one:

    python -m data.build_tasks --split validation --output runs/validation_tasks
    remoe evaluate ... quality.include_path=runs/validation_tasks routing.split=validation
"""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from configs.command import parse
from data.corpus import DOMAINS, Document, read_corpus

TASKS = Path("data/embedded/tasks")  # as the YAML files name it: relative to the checkout
ITEMS = 300
CONTEXT_CHARACTERS = 320
LINE_CHARACTERS = 90
PASSAGE_CHARACTERS = 600
SOLVED_EXAMPLES = 4  # lines of the same page before the question
TEXT_PUZZLE = re.compile(r"^(copy|reverse|sort) ")
Item = dict[str, Any]


def puzzles(documents: list[Document], draw: random.Random, *, text: bool) -> Iterator[Item]:
    """A question after a few solved ones of the same page; answered by generation and exact match."""
    for page in documents:
        lines = page.text.split("\n")
        places = [n for n in range(SOLVED_EXAMPLES, len(lines)) if bool(TEXT_PUZZLE.match(lines[n])) == text]
        for place in draw.sample(places, min(4, len(places))):
            question, answer = lines[place].split(" = ")
            solved = lines[place - SOLVED_EXAMPLES : place]
            yield {"document": page.id, "prompt": "\n".join([*solved, f"{question} ="]), "answer": answer}


def headwords(documents: list[Document], draw: random.Random) -> Iterator[Item]:
    """A definition, and which of four words it defines; the wrong words have the same part of speech."""
    entries = [(page.id, page.id.split("/")[1], *_parse(line)) for page in documents for line in page.text.split("\n")]
    draw.shuffle(entries)
    for page_id, part_of_speech, definition, word in entries:
        others = [
            w for p, kind, _, w in draw.sample(entries, 200) if kind == part_of_speech and p != page_id and w != word
        ]
        if word.lower() in definition.lower() or len(definition) < 20 or len(others) < 3:
            continue
        yield _choice(page_id, f"{definition} ->", word, others[:3], draw)


def next_lines(documents: list[Document], draw: random.Random) -> Iterator[Item]:
    """Some lines of a document, and which of four lines of the same document comes next."""
    places = []
    for document in documents:
        lines = [line for line in document.text.split("\n") if line.strip()]
        usable = [n for n, line in enumerate(lines) if len(line.strip()) >= 20]
        places += [(document.id, lines, usable, n) for n in usable if n >= 4 and len(usable) > 20]
    for document_id, lines, usable, place in draw.sample(places, min(3 * ITEMS, len(places))):
        context = ("\n".join(lines[max(0, place - 12) : place]))[-CONTEXT_CHARACTERS:]
        context = context[context.find("\n") + 1 :] if "\n" in context else context
        far = [n for n in usable if abs(n - place) > 12 and lines[n].strip() != lines[place].strip()]
        if len(far) >= 3:
            wrong = [_shorten(lines[n]) for n in draw.sample(far, 3)]
            yield _choice(document_id, context + "\n", _shorten(lines[place]), wrong, draw, separator="")


def passages(documents: list[Document], draw: random.Random) -> Iterator[Item]:
    """Whole lines of a document, about PASSAGE_CHARACTERS long, for perplexity."""
    pieces = []
    for document in documents:
        piece = ""
        for line in document.text.split("\n"):
            piece += line + "\n"
            if len(piece) >= PASSAGE_CHARACTERS:
                pieces.append((document.id, piece[: 2 * PASSAGE_CHARACTERS]))
                piece = ""
        if len(piece) >= PASSAGE_CHARACTERS // 2:
            pieces.append((document.id, piece))
    for document_id, piece in draw.sample(pieces, min(len(pieces), ITEMS)):
        yield {"document": document_id, "text": piece}


def _parse(line: str) -> tuple[str, str]:
    """`(definition, word)` of a dictionary entry in either of its two forms."""
    if " -> " in line:
        definition, word = line.rsplit(" -> ", 1)
        return definition, word
    word, definition = re.split(r" \((?:noun|verb|adjective|adverb)\): ", line, maxsplit=1)
    return definition, word


def _choice(
    document_id: str, prompt: str, right: str, wrong: list[str], draw: random.Random, *, separator: str = " "
) -> Item:
    answers = [right, *wrong]
    draw.shuffle(answers)
    choices = [separator + answer for answer in answers]
    return {"document": document_id, "prompt": prompt, "choices": choices, "label": answers.index(right)}


def _shorten(line: str) -> str:
    return line if len(line) <= LINE_CHARACTERS else line[:LINE_CHARACTERS].rsplit(" ", 1)[0]


def _write(path: Path, items: Iterator[Item], draw: random.Random) -> None:
    chosen = list(items)
    draw.shuffle(chosen)
    assert len(chosen) >= ITEMS, f"{path.name}: only {len(chosen)} items"
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in chosen[:ITEMS]), encoding="utf-8")


@dataclass(frozen=True)
class BuildTasks:
    """Make the items of the shipped tasks from one split of the corpus."""

    split: Literal["train", "validation", "test"] = "test"  # of the corpus
    output: Path = TASKS  # folder for items and YAML files


def build(command: BuildTasks) -> None:
    """Read the corpus, write items and YAML files."""
    documents = {domain: list(read_corpus(command.split, [domain])) for domain in DOMAINS}
    draw = random.Random(f"tasks of the {command.split} split")
    tasks = {
        "arithmetic": puzzles(documents["puzzles"], draw, text=False),
        "letters": puzzles(documents["puzzles"], draw, text=True),
        "headword": headwords(documents["glosses"], draw),
        "next_line_prose": next_lines(documents["prose"], draw),
        "next_line_code": next_lines(documents["code"], draw),
        **{f"perplexity_{domain}": passages(found, draw) for domain, found in documents.items()},
    }
    command.output.mkdir(parents=True, exist_ok=True)
    for name, items in tasks.items():
        _write(command.output / f"{name}.jsonl", items, draw)
        description = (TASKS / f"{name}.yaml").read_text(encoding="utf-8")
        (command.output / f"{name}.yaml").write_text(
            description.replace("data/embedded/tasks/", f"{command.output.as_posix()}/"), encoding="utf-8"
        )


if __name__ == "__main__":
    build(parse(BuildTasks, None, prog="python -m data.build_tasks"))
