"""A served copy of the model that ships, with a chat template."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from evaluation.server.choice import Choice
from tests.evaluation.server.running import Plain, Served, serve

SHIPPED = Path(__file__).parents[3] / "data" / "embedded" / "model"
TEMPLATE = (
    "{% if messages[0]['role'] != 'user' and messages[0]['role'] != 'system' %}"
    "{{ raise_exception('a user speaks first') }}{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that ships, with a chat template; never write into it."""
    folder = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(SHIPPED, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def served(chat_model: Path) -> Iterator[Served]:
    """One server for all tests of a file that leave it as it was."""
    with serve(chat_model) as running:
        yield running


@pytest.fixture(scope="session")
def plain(chat_model: Path) -> Plain:
    return Plain(chat_model)


@pytest.fixture
def before_token(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], Any]], None]:
    """`before_token(k, act)`: call `act` in the model's thread when a choice gets its token number k, from 1."""

    def install(number: int, act: Callable[[], Any]) -> None:
        push = Choice.push

        def acting(choice: Choice, *args: Any) -> Any:
            if choice.tokens == number - 1:
                act()
            return push(choice, *args)

        monkeypatch.setattr(Choice, "push", acting)

    return install
