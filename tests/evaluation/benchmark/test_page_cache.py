"""Files leave the page cache, and it is seen."""

from pathlib import Path

import pytest

from evaluation.benchmark import page_cache


def test_dropped_files_are_out_of_the_cache(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(3 << 20))
    assert page_cache.cached_bytes([file]) == 3 << 20
    page_cache.drop([file])
    if page_cache.cached_bytes([file]) == 3 << 20:
        pytest.skip("this file system keeps its files in memory")
    assert page_cache.cached_bytes([file]) == 0
    with file.open("rb", buffering=0) as again:
        again.read(4096)
    assert 0 < page_cache.cached_bytes([file]) <= 3 << 20


def test_an_empty_file_has_nothing_cached(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert page_cache.cached_bytes([tmp_path / "empty"]) == 0
