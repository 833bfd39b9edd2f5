"""Result files, written aside and renamed: a full disk or a kill leaves the old file or none, never half of one."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.load import UserError


def prepare(path: str | Path) -> Path:
    """Make the folder of a result, before the work that leads to it.

    Raises:
        UserError: `path` is a folder, or something that is no folder stands where its folder should be.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"output {path} is a folder; name a file in it, for example {path / 'result.json'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"cannot make the folder for output {path}: {error}; name a file elsewhere") from error
    return path


@contextmanager
def writing_aside(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it to `path` when the block ends well, remove it when it does not."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield aside
        os.replace(aside, path)
    except OSError as error:
        if error.errno is None:  # numpy, when it could write only a part
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        error.filename = str(path)
        raise
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON, aside and renamed. NaN is refused: it is not JSON."""
    with writing_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
