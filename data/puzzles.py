"""Generated problems with checkable answers: arithmetic and small text puzzles, one `question = answer` a line.

A problem belongs to the split of its own question text, so no question of the test split is ever seen in training, not
even on another page. Letters are written with spaces, because a byte-pair token hides the letters inside it.
"""

import random
from collections.abc import Callable, Iterator
from itertools import count, islice

from data.corpus import SPLITS, Document

LINES_PER_PAGE = 30
PAGES = {"train": 4000, "validation": 400, "test": 400}


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


def _letters(draw: random.Random) -> str:
    return " ".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(draw.randrange(3, 6)))


def _copy(draw: random.Random) -> tuple[str, str]:
    letters = _letters(draw)
    return f"copy {letters}", letters


def _reverse(draw: random.Random) -> tuple[str, str]:
    letters = _letters(draw)
    return f"reverse {letters}", letters[::-1]


def _sort(draw: random.Random) -> tuple[str, str]:
    letters = _letters(draw)
    return f"sort {letters}", " ".join(sorted(letters.split()))


KINDS = (_add, _subtract, _largest, _next_in_series, _copy, _reverse, _sort)


def problems(draw: random.Random, split: str, split_of: Callable[[str], str]) -> Iterator[tuple[str, str]]:
    """Endless `(question, answer)` pairs whose question belongs to `split`."""
    while True:
        question, answer = draw.choice(KINDS)(draw)
        if split_of(question) == split:
            yield question, answer


def puzzle_pages(split_of: Callable[[str], str]) -> Iterator[Document]:
    """Pages of problems; a page's name is chosen so that `split_of` puts it into the split of its problems."""
    for split in SPLITS:
        names = (name for number in count() if split_of(name := f"puzzles/{split}/{number}") == split)
        for name in islice(names, PAGES[split]):
            source = islice(problems(random.Random(name), split, split_of), LINES_PER_PAGE)
            yield Document(name, "puzzles", "\n".join(f"{question} = {answer}" for question, answer in source))
