"""The HTTP side: routes, and what happens when a client leaves or a request fails. The model is the worker's."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, TypeVar

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from evaluation.engine.engine import Engine
from evaluation.server.errors import ApiError, ErrorBody, invalid_request
from evaluation.server.gate import CLIENT_GONE, Gate, set_outcome
from evaluation.server.intake import Intake
from evaluation.server.metrics import Metrics
from evaluation.server.protocol import ChatCompletionRequest, CompletionRequest, Sampled
from evaluation.server.responses import SSE_END, ChatCompletions, Completions, sse
from evaluation.server.work import Delta, Done, Event, Job, Work
from evaluation.server.worker import Worker

T = TypeVar("T")
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}


@dataclass(frozen=True)
class Backend:
    """What is behind the routes."""

    intake: Intake
    worker: Worker
    engine: Engine
    metrics: Metrics
    api_key: str | None
    max_request_bytes: int
    allowed_origins: Sequence[str] = ()
    created: int = field(default_factory=lambda: int(time.time()))  # Unix time
    one_at_a_time: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(1))  # for the tokenizer


def create_app(backend: Backend) -> FastAPI:
    """The ASGI application; the worker must be running while it is used."""
    app = FastAPI(title="remoe serve", docs_url=None, redoc_url=None, redirect_slashes=False, responses=ERRORS)
    most = backend.max_request_bytes
    app.add_middleware(Gate, metrics=backend.metrics, api_key=backend.api_key, max_request_bytes=most)
    if backend.allowed_origins:  # outside of the gate: a browser asks without a key first
        origins = backend.allowed_origins
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    _add_error_handlers(app)
    _add_status_routes(app, backend)
    _add_generation_routes(app, backend)
    return app


def _add_status_routes(app: FastAPI, backend: Backend) -> None:
    intake = backend.intake
    about = {"id": intake.served_name, "object": "model", "created": backend.created, "owned_by": "remoe"}
    about["max_model_len"] = intake.context_tokens

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [about]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """It alone, by its name."""
        intake.check_name(name)
        return about

    @app.get("/health")
    async def health() -> dict[str, str]:
        """200 as long as requests can be served."""
        if not backend.worker.is_alive:
            raise ApiError("the model's thread has ended; restart the server", status=503)
        if changed := backend.engine.changed_shards():
            raise ApiError(f"{changed[0]} was changed while in use; restart the server", status=503)
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(generate_latest(backend.metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _add_generation_routes(app: FastAPI, backend: Backend) -> None:
    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts."""
        work = await run_sync(backend.intake.completion, body, limiter=backend.one_at_a_time)
        return await _answer(backend, request, body=body, work=work, form=Completions)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer in a conversation."""
        work = await run_sync(backend.intake.chat, body, limiter=backend.one_at_a_time)
        return await _answer(backend, request, body=body, work=work, form=ChatCompletions)


async def _answer(
    backend: Backend, request: Request, *, body: Sampled, work: Work, form: type[Completions]
) -> Response:
    """Queue the work and answer; errors before the first token are plain HTTP errors even if a stream was asked for."""
    words = form(backend.intake.served_name, wants_logprobs=work.top_logprobs is not None)
    mailbox = Mailbox()
    job = Job(work, mailbox.send)
    backend.worker.submit(job)
    events = mailbox.events()
    try:
        if not body.stream:
            return JSONResponse(words.whole(await _unless_gone(request, _all(events))))
        first = await _unless_gone(request, anext(events))
        return _EventStream(job, first, events, form=words, wants_usage=body.wants_usage)
    except ClientGone:
        job.cancel()
        set_outcome(request.scope, CLIENT_GONE)
        return Response(status_code=int(CLIENT_GONE))
    except BaseException:  # the server is stopping, for example
        job.cancel()
        raise


class ClientGone(Exception):
    """The client closed its connection before it had its answer."""


class Mailbox:
    """A queue of events, from the worker's thread to the coroutine that makes and reads it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def send(self, event: Event) -> None:
        """Put an event in; called from another thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self) -> AsyncIterator[Delta | Done]:
        """The events as they come, up to the last; an `ApiError` is raised."""
        event: Event | None = None
        while not isinstance(event, Done):
            event = await self._events.get()
            if isinstance(event, ApiError):
                raise event
            yield event


async def _all(events: AsyncIterator[T]) -> list[T]:
    return [event async for event in events]


async def _unless_gone(request: Request, waiting: Awaitable[T]) -> T:
    """The result of `waiting`, or `ClientGone` if the client leaves first; the request's body must have been read."""
    answer, gone = asyncio.ensure_future(waiting), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientGone
        return answer.result()
    finally:
        answer.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _EventStream(StreamingResponse):
    """Server-sent events. However it ends, the job ends with it, and the request is counted by how it ended."""

    media_type = "text/event-stream"

    def __init__(
        self, job: Job, first: Delta | Done, rest: AsyncIterator[Delta | Done], *, form: Completions, wants_usage: bool
    ) -> None:
        super().__init__(self._lines(first, rest), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._job, self._form, self._wants_usage = job, form, wants_usage
        self._outcome = CLIENT_GONE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()
            set_outcome(scope, self._outcome)

    async def _lines(self, event: Delta | Done, rest: AsyncIterator[Delta | Done]) -> AsyncIterator[str]:
        work = self._job.work
        for chunk in self._form.first_chunks(len(work.prompts) * work.n):
            yield sse(chunk)
        try:
            while isinstance(event, Delta):
                yield sse(self._form.chunk(event, wants_usage=self._wants_usage))
                event = await anext(rest)
        except ApiError as error:
            self._outcome = str(error.status)
            yield sse(error.body())
            return
        if self._wants_usage:
            yield sse(self._form.usage_chunk(event))
        self._outcome = "200"
        yield SSE_END


def _add_error_handlers(app: FastAPI) -> None:
    """Every error has OpenAI's body."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return invalid_request(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if isinstance(error, ApiError):
            return error.response()
        what = HTTPStatus(error.status_code).phrase if error.status_code in (404, 405) else error.detail
        message = f"{request.method} {request.url.path}: {what}"
        return ApiError(message, status=error.status_code, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, __: Exception) -> Response:
        return ApiError("internal error; the server's log says more", status=500).response()
