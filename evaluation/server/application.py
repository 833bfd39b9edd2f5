"""`remoe serve`: a checkpoint whose experts stay on disk behind OpenAI's HTTP API, one request at a time."""

import argparse
import asyncio
import copy
import ipaddress
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import transformers
import uvicorn
from fastapi import FastAPI
from transformers import PretrainedConfig, PreTrainedModel

from configs.command import run
from configs.load import UserError
from configs.sizes import parse_size, readable
from evaluation.engine.engine import Engine
from evaluation.engine.loading import load
from evaluation.engine.memory.process import total_memory_bytes
from evaluation.engine.options import CONTEXT_TOKENS
from evaluation.engine.sessions.controller import MemoryController
from evaluation.engine.sessions.conversations import BLOCK_TOKENS, Conversations, check_keeps_everything
from evaluation.server.app import Service, create_app
from evaluation.server.generation import Generator
from evaluation.server.intake import Intake
from evaluation.server.metrics import Metrics
from evaluation.server.worker import Worker
from launch.engine_flags import add_engine_flags, engine_options, router_weights
from training.model.lazy_weights import read_config
from training.model.loading import load_tokenizer, local_folder

EXAMPLE = """example:
  remoe serve --model data/embedded/model --expert-cache 3MiB --port 8000
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
      -d '{"prompt": "The sea was", "max_tokens": 40, "temperature": 0}'

served: POST /v1/completions and /v1/chat/completions (both also with "stream": true), GET /v1/models, /health, /metrics
"""
GRACE_SECONDS = 20
"""How long a stopping server lets requests finish before it breaks them off."""

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, take the port, load, serve until SIGINT or SIGTERM."""
    arguments = parser().parse_args(argv)
    with listener(arguments.host, arguments.port) as sock, application(arguments) as loaded:
        engine = loaded.engine
        _warn_if_open(sock, arguments)
        print(
            f"serving {_name(arguments)} at {_url(sock)}/v1 with {engine.cache.total_slots} of "
            f"{engine.demand.all_experts} experts in {readable(engine.pool_bytes)}; Ctrl-C stops",
            flush=True,
        )
        with _signals_only_stop_the_server():
            HttpServer(loaded).run(sockets=[sock])


@dataclass(frozen=True)
class Application:
    """The ASGI application and what is behind it."""

    app: FastAPI
    engine: Engine
    worker: Worker


@contextmanager
def application(arguments: argparse.Namespace) -> Iterator[Application]:
    """Everything but the HTTP server.

    Raises:
        UserError: values that make no sense, or whatever `load` refuses.
    """
    _check(arguments)
    api_key = _api_key(arguments)
    model_dir = local_folder(arguments.model)
    transformers.utils.logging.disable_progress_bar()
    with _loaded(model_dir, arguments) as (model, engine, keeps):
        tokenizer = load_tokenizer(model_dir)
        metrics = Metrics(engine)
        # a copy each: one thread writes texts, another reads them
        chat, controller = _conversations(model, engine, arguments) if keeps else (None, None)
        generator = Generator(
            model, engine, copy.deepcopy(tokenizer), metrics=metrics, chat=chat, controller=controller
        )
        intake = Intake(
            tokenizer,
            served_name=_name(arguments),
            context_tokens=_context_tokens(model.config, arguments.max_model_len),
            vocabulary=model.config.get_text_config().vocab_size,
        )
        with Worker(generator, max_queue=arguments.max_queue) as worker:
            metrics.show(worker)
            service = Service(intake, worker, metrics, int(time.time()), engine.changed_shards)
            app = create_app(service, api_key=api_key, max_request_bytes=arguments.max_request_bytes)
            yield Application(app, engine, worker)


@contextmanager
def listener(host: str, port: int) -> Iterator[socket.socket]:
    """A bound socket, taken before the model is loaded; port 0 is any free one.

    Raises:
        UserError: the address cannot be had.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"--port is {port}; it must be between 0 and {2**16 - 1}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot listen at {host} port {port}: {error}") from error
    with sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
        except OSError as error:
            raise UserError(
                f"cannot listen at {host} port {port}: {error.strerror}; choose another with --host and --port"
            ) from error
        yield sock


class HttpServer(uvicorn.Server):
    """uvicorn's server. When it stops, requests have `GRACE_SECONDS` to finish; then each is told that it is over."""

    def __init__(self, loaded: Application) -> None:
        super().__init__(
            uvicorn.Config(
                loaded.app,
                lifespan="off",
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=GRACE_SECONDS + 10,  # for clients that do not even read the end
            )
        )
        self._worker = loaded.worker

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(GRACE_SECONDS, self._worker.stop)
        await super().shutdown(sockets)
        timer.cancel()


@contextmanager
def _loaded(model_dir: str, arguments: argparse.Namespace) -> Iterator[tuple[PreTrainedModel, Engine, bool]]:
    """Model, engine, and whether keys and values are kept between requests; prompts are then computed in blocks."""
    config = read_config(model_dir)
    keeps = _keeps_prefixes(config, arguments)
    context_tokens = min(CONTEXT_TOKENS, _context_tokens(config, arguments.max_model_len))
    options = engine_options(
        arguments,
        context_tokens=arguments.max_model_len or context_tokens,
        prompt_tokens=arguments.block_tokens if keeps else None,
    )
    with load(model_dir, options, router_delta=router_weights(arguments, model_dir)) as (model, engine):
        yield model, engine, keeps


def _keeps_prefixes(config: PretrainedConfig, arguments: argparse.Namespace) -> bool:
    """What the flags say; where they leave it open, yes under a memory budget, if the model allows it.

    Raises:
        UserError: a size was given for a model whose context cannot be kept.
    """
    if arguments.prefix_cache == "0" or (arguments.prefix_cache is None and arguments.memory_budget is None):
        return False
    try:
        check_keeps_everything(config)
    except UserError as reason:
        if arguments.prefix_cache is not None:
            raise
        logger.warning("no prefix cache: %s", reason)
        return False
    return True


def _conversations(
    model: PreTrainedModel, engine: Engine, arguments: argparse.Namespace
) -> tuple[Conversations, MemoryController | None]:
    """What keeps keys and values, and what decides how many, where no size is given."""
    if arguments.prefix_cache is not None:
        capacity_bytes = parse_size(arguments.prefix_cache, whole_bytes=total_memory_bytes())
    else:
        assert engine.division is not None, "without a memory budget a size is given"
        capacity_bytes = engine.division.shared_bytes // 2
    chat = Conversations(model, engine.keep_prefixes(capacity_bytes), block_tokens=arguments.block_tokens)
    return chat, MemoryController(engine, chat) if arguments.prefix_cache is None else None


@contextmanager
def _signals_only_stop_the_server() -> Iterator[None]:
    """uvicorn stops on SIGINT and SIGTERM, then raises them again; the model and its files are still to be closed."""
    handled = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: None) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _warn_if_open(sock: socket.socket, arguments: argparse.Namespace) -> None:
    host = sock.getsockname()[0]
    if arguments.api_key_env is None and not ipaddress.ip_address(host).is_loopback:
        logger.warning("whoever reaches %s may use this server; --api-key-env asks for a key", _url(sock))


def _context_tokens(config: PretrainedConfig, asked: int | None) -> int:
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if asked is None and most is None:
        raise UserError("the model's config.json names no max_position_embeddings; give --max-model-len")
    if asked is not None and most is not None and asked > most:
        raise UserError(f"--max-model-len {asked} is more than the {most} positions this model has; lower it")
    return int(asked or most or 0)


def _check(arguments: argparse.Namespace) -> None:
    smallest = {"max_queue": 0, "max_request_bytes": 1, "max_model_len": 2, "block_tokens": 1}
    for name, least in smallest.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")


def _api_key(arguments: argparse.Namespace) -> str | None:
    if arguments.api_key_env is None:
        return None
    key = os.environ.get(arguments.api_key_env)
    if not key:
        raise UserError(f"--api-key-env names {arguments.api_key_env}, which is not set; put the key into it")
    return key


def _name(arguments: argparse.Namespace) -> str:
    name: str = arguments.served_model_name or arguments.model
    return name


def _url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def parser() -> argparse.ArgumentParser:
    """The command line; every flag is a key of what `application` takes."""
    made = argparse.ArgumentParser(
        prog="remoe serve",
        description="Serve a mixture-of-experts checkpoint whose experts stay on disk over OpenAI's HTTP API: the "
        "tokens of plain transformers, within the expert memory you give it.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_engine_flags(made.add_argument_group("engine"))
    _add_server_flags(made.add_argument_group("server"))
    return made


def _add_server_flags(group: Any) -> None:
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine only)"
    )
    group.add_argument("--port", type=int, default=8000, help="port (default 8000; 0: any free one)")
    group.add_argument("--served-model-name", metavar="NAME", help="the model's name for clients (default: --model)")
    group.add_argument(
        "--max-model-len", type=int, metavar="N", help="longest prompt and answer, in tokens (default: the model's)"
    )
    group.add_argument(
        "--prefix-cache", metavar="SIZE", help="keep keys and values of so many bytes for later requests that begin the "
        "same; 0: none (default: with --memory-budget what saves most time, moved while requests run; else none)"
    )  # fmt: skip
    group.add_argument(
        "--block-tokens", type=int, default=BLOCK_TOKENS, metavar="N",
        help=f"of what is kept together; with a prefix cache prompts are computed so many at a time (default {BLOCK_TOKENS})",
    )  # fmt: skip
    group.add_argument(
        "--max-queue", type=int, default=16, metavar="N", help="requests that may wait; more get 429 (default 16)"
    )
    group.add_argument(
        "--max-request-bytes", type=int, default=2**21, metavar="N", help="longest request body (default 2097152)"
    )
    group.add_argument("--api-key-env", metavar="NAME", help="environment variable with the key that clients must send")


if __name__ == "__main__":
    sys.exit(run(main))
