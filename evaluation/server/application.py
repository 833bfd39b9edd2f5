"""The server: a checkpoint whose experts stay on disk behind OpenAI's HTTP API, one request at a time."""

import asyncio
import copy
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import transformers
import uvicorn
from transformers import PretrainedConfig, PreTrainedModel

from configs.checks import at_least, words
from configs.load import UserError
from configs.sizes import parse_size, readable
from evaluation.engine.engine import Engine
from evaluation.engine.generation_settings import take_stop_strings
from evaluation.engine.loading import load
from evaluation.engine.memory.process import total_memory_bytes
from evaluation.engine.options import CONTEXT_TOKENS, EngineOptions
from evaluation.engine.sessions.controller import MemoryController
from evaluation.engine.sessions.conversations import BLOCK_TOKENS, Conversations, check_keeps_everything
from evaluation.server.app import Backend, create_app
from evaluation.server.generation import Generator
from evaluation.server.intake import Intake
from evaluation.server.metrics import Metrics
from evaluation.server.worker import Worker
from training.model.lazy_weights import read_config
from training.model.loading import RouterDelta, load_tokenizer

GRACE_SECONDS = 20
"""The time that a stopping server gives requests to finish before it breaks them off."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerOptions:
    """How requests are taken, and what is kept between them."""

    host: str = "127.0.0.1"  # the address to listen at; the default is for this machine only
    port: int = 8000  # 0: any free one
    served_model_name: str | None = None  # the model's name for clients; left out: what --model says
    max_model_len: int | None = None  # the longest prompt and answer, in tokens; left out: the model's
    # bytes of keys and values to keep for later requests that begin the same; 0: none; left out: under a memory budget as
    # many as save most time, moved while requests run, otherwise none
    prefix_cache: str | None = None
    # tokens that are kept together; with a prefix cache prompts are computed that many tokens at a time
    block_tokens: int = BLOCK_TOKENS
    max_queue: int = 16  # requests that may wait; more are answered with 429
    max_request_bytes: int = 2**21  # the longest request body
    api_key_env: str | None = None  # environment variable with the key that clients must send
    allowed_origins: str | None = None  # web pages that browsers may call from (CORS), with commas between; *: any
    timeout_keep_alive: int = 75  # seconds after which a connection that asks nothing is closed

    def __post_init__(self) -> None:
        at_least(self, max_queue=0, max_request_bytes=1, max_model_len=2, block_tokens=1, timeout_keep_alive=1)


def serve(sock: socket.socket, loaded: Backend, options: ServerOptions) -> None:
    """Serve at a bound socket until SIGINT or SIGTERM."""
    engine = loaded.engine
    _warn_if_open(sock, options)
    experts = f"{engine.cache.total_slots} of {engine.demand.all_experts} experts in {readable(engine.pool_bytes)}"
    sock.listen()  # who connects as soon as the line below is read must not be refused
    print(f"serving {loaded.intake.served_name} at {_url(sock)}/v1 with {experts}; Ctrl-C stops", flush=True)
    with _signals_only_stop_the_server():
        HttpServer(loaded, timeout_keep_alive=options.timeout_keep_alive).run(sockets=[sock])


@contextmanager
def application(
    model_dir: str,
    engine_options: EngineOptions,
    options: ServerOptions,
    *,
    name: str,
    router_delta: RouterDelta = None,
) -> Iterator[Backend]:
    """Load the model, which clients call `name`, and put everything together but the HTTP server.

    A `UserError` names values that make no sense for this model, or what `load` refuses.
    """
    api_key, config = _api_key(options.api_key_env), read_config(model_dir)
    keeps = _keeps_prefixes(config, engine_options, options)
    context_tokens = _context_tokens(config, options.max_model_len)
    room = options.max_model_len or min(CONTEXT_TOKENS, context_tokens)
    blocks = options.block_tokens if keeps else None
    engine_options = replace(engine_options, context_tokens=room, prompt_tokens=blocks)
    transformers.utils.logging.disable_progress_bar()
    with load(model_dir, engine_options, router_delta=router_delta) as (model, engine):
        tokenizer = load_tokenizer(model_dir)
        vocabulary = model.config.get_text_config().vocab_size
        names: dict[str, Any] = {"served_name": name, "stop_strings": take_stop_strings(model)}
        intake = Intake(tokenizer, context_tokens=context_tokens, vocabulary=vocabulary, **names)
        metrics = Metrics(engine)
        kept = _conversations(model, engine, options) if keeps else ()
        # a copy of the tokenizer each: one thread writes texts, another reads them
        generator = Generator(model, engine, copy.deepcopy(tokenizer), metrics, *kept)
        with Worker(generator.run, recover=engine.reset_cache, max_queue=options.max_queue) as worker:
            metrics.registry.register(worker)
            origins = words(options.allowed_origins or "")
            yield Backend(intake, worker, engine, metrics, api_key, options.max_request_bytes, origins)


@contextmanager
def listener(host: str, port: int) -> Iterator[socket.socket]:
    """A bound socket, or a `UserError` if the address cannot be had; port 0 is any free one."""
    if not 0 <= port < 2**16:
        raise UserError(f"--port is {port}; it must be between 0 and {2**16 - 1}")
    with ExitStack() as stack:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            sock = stack.enter_context(socket.socket(family, kind, protocol))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except (OSError, UnicodeError) as error:
            why = f"cannot listen at {host} port {port}: {getattr(error, 'strerror', error)}"
            raise UserError(f"{why}; choose another with --host and --port") from error
        yield sock


class HttpServer(uvicorn.Server):
    """uvicorn's server. When it stops, requests have `GRACE_SECONDS` to finish; then each is told that it is over."""

    def __init__(self, loaded: Backend, *, timeout_keep_alive: int = 5) -> None:
        config = uvicorn.Config(create_app(loaded), lifespan="off", ws="none", server_header=False)
        config.timeout_keep_alive = timeout_keep_alive
        config.timeout_graceful_shutdown = GRACE_SECONDS + 10  # for clients that do not even read the end
        super().__init__(config)
        self._worker = loaded.worker

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(GRACE_SECONDS, self._worker.stop)
        await super().shutdown(sockets)
        timer.cancel()


def _keeps_prefixes(config: PretrainedConfig, engine_options: EngineOptions, options: ServerOptions) -> bool:
    """Whether keys and values are kept between requests: as the options say, or else under a memory budget if the model
    allows it; a `UserError` if a size was given for a model whose context cannot be kept."""
    if options.prefix_cache == "0" or (options.prefix_cache is None and engine_options.memory_budget is None):
        return False
    try:
        check_keeps_everything(config)
    except UserError as reason:
        if options.prefix_cache is not None:
            raise
        logger.warning("no prefix cache: %s", reason)
        return False
    return True


def _conversations(
    model: PreTrainedModel, engine: Engine, options: ServerOptions
) -> tuple[Conversations, MemoryController | None]:
    """The conversations that keep keys and values, and a controller that decides how many if no size is given."""
    if options.prefix_cache is not None:
        capacity_bytes = parse_size(options.prefix_cache, whole_bytes=total_memory_bytes())
    else:
        assert engine.division is not None, "without a memory budget a size is given"
        capacity_bytes = engine.division.shared_bytes // 2
    chat = Conversations(model, engine.keep_prefixes(capacity_bytes), block_tokens=options.block_tokens)
    return chat, MemoryController(engine, chat) if options.prefix_cache is None else None


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


def _warn_if_open(sock: socket.socket, options: ServerOptions) -> None:
    host = sock.getsockname()[0]
    if options.api_key_env is None and not ipaddress.ip_address(host).is_loopback:
        logger.warning("whoever reaches %s may use this server; --api-key-env asks for a key", _url(sock))


def _context_tokens(config: PretrainedConfig, asked: int | None) -> int:
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if asked is None and most is None:
        raise UserError("the model's config.json names no max_position_embeddings; give --max-model-len")
    if asked is not None and most is not None and asked > most:
        raise UserError(f"--max-model-len {asked} is more than the {most} positions this model has; lower it")
    return int(asked or most or 0)


def _api_key(variable: str | None) -> str | None:
    key = None if variable is None else os.environ.get(variable)
    if variable is not None and not key:
        raise UserError(f"--api-key-env names {variable}, which is not set; put the key into it")
    return key


def _url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
