"""What a checkpoint says of decoding: other ways are refused by name, other answers overridden."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.load import UserError
from evaluation.engine.generation_settings import read_generation_config


@pytest.fixture
def says(model_dir: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """The folder of a model whose generation_config.json holds these settings."""

    def write(**settings: Any) -> Path:
        folder = Path(shutil.copytree(model_dir("qwen2_moe"), tmp_path / "copy"))
        (folder / "generation_config.json").write_text(json.dumps(settings), "utf-8")
        return folder

    return write


@pytest.mark.parametrize("settings", [{"token_healing": True}, {"guidance_scale": 1.5}])
def test_another_way_to_decode_is_refused_by_name(settings: dict[str, Any], says: Callable[..., Path]) -> None:
    (name,) = settings
    with pytest.raises(UserError, match=rf"generation_config.json: {name}=.* is not supported; remove it there"):
        read_generation_config(says(**settings))


def test_a_scale_that_does_nothing_is_no_other_way(says: Callable[..., Path]) -> None:
    assert read_generation_config(says(guidance_scale=1)).guidance_scale == 1


def test_other_answers_are_overridden_and_said(says: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = read_generation_config(says(return_dict_in_generate=True, do_sample=True, num_return_sequences=3))
    assert not found.return_dict_in_generate
    assert "num_return_sequences=3 is not used" in caplog.text
