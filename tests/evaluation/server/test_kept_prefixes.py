"""Keys and values kept between requests, over HTTP: what is found, what is said, and when nothing is kept."""

import logging
from pathlib import Path

import pytest
from transformers import Gemma2Config

from configs.command import parse
from configs.load import UserError
from evaluation.engine.options import EngineOptions
from evaluation.server.application import ServerOptions, _keeps_prefixes
from launch.serve import Serve
from tests.evaluation.server.running import Plain, serve
from training.model.lazy_weights import read_config


def test_a_conversation_that_goes_on_computes_only_what_is_new(chat_model: Path) -> None:
    text = " ".join(f"word {i}" for i in range(30))
    with serve(chat_model, "--block-tokens", "32", memory=("--memory-budget", "64MiB")) as running:
        plain = Plain(chat_model)
        for turn, prompt in enumerate((text, f"{text} and so on", f"{text} and so on, to the end")):
            answer = running.client.completions.create(model=running.name, prompt=prompt, max_tokens=8, temperature=0)
            assert answer.choices[0].text == plain.texts(
                prompt, do_sample=False, max_new_tokens=8, prefill_chunk_size=32
            )[0]  # fmt: skip
            assert answer.usage is not None
            details, tokens = answer.usage.prompt_tokens_details, answer.usage.prompt_tokens
            assert details is not None
            assert details.cached_tokens == (0 if turn == 0 else _whole_blocks(plain, text, 32))
            assert details.cached_tokens < tokens
        assert running.metric("remoe_prompt_tokens_cached_total") == 2 * _whole_blocks(plain, text, 32)
        assert running.metric("remoe_prefix_cache_bytes") > 0


def _whole_blocks(plain: Plain, text: str, block_tokens: int) -> int:
    return len(plain.tokenizer(text)["input_ids"]) // block_tokens * block_tokens


def test_nothing_is_kept_where_that_is_not_asked_for(chat_model: Path) -> None:
    for flags, memory in (([], "--expert-cache"), (["--prefix-cache", "0"], "--memory-budget")):
        with serve(chat_model, *flags, memory=(memory, "64MiB")) as running:
            assert running.engine.kept is None
    with serve(chat_model, "--prefix-cache", "1MiB", memory=("--expert-cache", "20%")) as running:
        assert running.engine.kept is not None
        assert running.engine.kept.capacity_bytes == 2**20


@pytest.mark.parametrize(
    ("flags", "keeps"),
    [
        (["--memory-budget", "1GiB"], True),
        (["--memory-budget", "1GiB", "--prefix-cache", "0"], False),
        (["--expert-cache", "1GiB"], False),
        (["--expert-cache", "1GiB", "--prefix-cache", "1MiB"], True),
    ],
)
def test_what_is_kept_unless_told_otherwise(chat_model: Path, flags: list[str], keeps: bool) -> None:
    command = parse(Serve, ["--model", str(chat_model), *flags], prog="remoe serve")
    assert _keeps_prefixes(read_config(chat_model), command.engine, command.server) == keeps


def test_a_model_that_forgets_is_served_without_unless_a_size_is_given(caplog: pytest.LogCaptureFixture) -> None:
    config, budget = Gemma2Config(num_hidden_layers=2, sliding_window=4), EngineOptions(memory_budget="1GiB")
    with caplog.at_level(logging.WARNING):
        assert not _keeps_prefixes(config, budget, ServerOptions())
    assert "no prefix cache: a gemma2 model keeps DynamicSlidingWindowLayer" in caplog.text
    with pytest.raises(UserError, match="a gemma2 model keeps"):
        _keeps_prefixes(config, budget, ServerOptions(prefix_cache="1MiB"))
