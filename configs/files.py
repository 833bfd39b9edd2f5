"""Files and folders, written aside and renamed: a full disk or a kill leaves the old one or none, never half of one."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from configs.load import UserError


def prepare(path: str | Path) -> Path:
    """Make the folder of a result before the work that leads to it; a `UserError` if such a file cannot be written."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"output {path} is a folder; name a file in it, for example {path / 'result.json'}")
    if _is_special(path):
        if not os.access(path, os.W_OK):
            raise UserError(f"output {path} cannot be written into; name a file elsewhere")
    else:
        prepare_folder(Path(os.path.realpath(path)).parent)
    return path


def prepare_folder(path: str | Path, *, make: bool = True) -> Path:
    """Make a folder that results are to be written into, or only see whether that can be done; a `UserError` if it cannot."""
    path = Path(path)
    try:
        if make:
            path.mkdir(parents=True, exist_ok=True)
        there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        with tempfile.TemporaryFile(dir=there):
            return path
    except OSError as error:
        raise UserError(f"folder {path} cannot be made or written into: {error}; name an output elsewhere") from error


def _is_special(path: Path) -> bool:
    """Whether something is there that is no file that could be replaced: a device, a pipe."""
    return path.exists() and not path.is_file()


@contextmanager
def writing_aside(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it to `path` when the block ends well, remove it when it does not.

    Of a link the file that it leads to is replaced; into a device or a pipe what was written is copied.
    """
    path = Path(os.path.realpath(path))
    special = _is_special(path)
    aside = (Path(tempfile.gettempdir()) if special else path.parent) / f".{path.name}.{os.getpid()}.partial"
    try:
        yield aside
        if special:
            with aside.open("rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
        else:
            os.replace(aside, path)
    except OSError as error:
        if error.errno is None:  # numpy, when it could write only a part
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        error.filename = str(path)
        raise
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def folder_aside(path: str | Path, *, replace: bool = False, durable: bool = False) -> Iterator[Path]:
    """Give a new folder beside `path`; rename it to `path` when the block ends well, remove it when it does not.

    Only one process may write a folder at a time: what another one left there when it was killed is removed first.

    Args:
        replace: whether a folder that is there may be replaced; if not, it must be empty.
        durable: bring all to disk, so that after a power failure too the folder is whole or not there.
    """
    path = Path(os.path.realpath(path))
    aside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        for part in [*aside.rglob("*"), aside] if durable else []:
            _flush(part)
        if replace:
            shutil.rmtree(path, ignore_errors=True)
        aside.replace(path)
        if durable:
            _flush(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _flush(path: Path) -> None:
    """Bring a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write a small file, aside and renamed."""
    with writing_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON, aside and renamed. NaN is refused: it is not JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_yaml(path: str | Path, config: Any) -> None:
    """Write a config dataclass as YAML, aside and renamed; loading it again gives an equal config."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.structured(config)))
