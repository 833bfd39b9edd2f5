"""The HTTP side: routes, and what happens when a client leaves or a request fails. The model is the worker's."""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from evaluation.server.errors import ApiError, ErrorBody, invalid_request
from evaluation.server.gate import CLIENT_GONE, Gate, set_outcome
from evaluation.server.intake import Intake
from evaluation.server.mailbox import ClientGone, Mailbox, unless_gone
from evaluation.server.metrics import Metrics
from evaluation.server.protocol import ChatCompletionRequest, CompletionRequest, Sampled
from evaluation.server.responses import SSE_END, ChatCompletions, Completions, sse
from evaluation.server.work import Delta, Done, Event, Failed, Job, Work
from evaluation.server.worker import Worker

ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}


@dataclass(frozen=True)
class Backend:
    """The parts of the server that the routes need."""

    intake: Intake
    worker: Worker
    metrics: Metrics
    created: int  # Unix time
    changed_shards: Callable[[], Sequence[Path]]  # the model's, that were written to since it was loaded


def create_app(backend: Backend, *, api_key: str | None, max_request_bytes: int) -> FastAPI:
    """The ASGI application; the worker must be running while it is used."""
    app = FastAPI(title="remoe serve", docs_url=None, redoc_url=None, redirect_slashes=False, responses=ERRORS)
    app.add_middleware(Gate, metrics=backend.metrics, api_key=api_key, max_request_bytes=max_request_bytes)
    _add_error_handlers(app)
    _add_status_routes(app, backend)
    _add_generation_routes(app, backend)
    return app


def _add_status_routes(app: FastAPI, backend: Backend) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        intake = backend.intake
        model = {"id": intake.served_name, "object": "model", "created": backend.created, "owned_by": "remoe"}
        return {"object": "list", "data": [{**model, "max_model_len": intake.context_tokens}]}

    @app.get("/health")
    async def health() -> dict[str, str]:
        """200 as long as requests can be served."""
        if not backend.worker.is_alive:
            raise ApiError("the model's thread has ended; restart the server", status=503)
        if changed := backend.changed_shards():
            raise ApiError(f"{changed[0]} was changed while in use; restart the server", status=503)
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(generate_latest(backend.metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _add_generation_routes(app: FastAPI, backend: Backend) -> None:
    one_at_a_time = CapacityLimiter(1)  # tokenizers are not meant for several threads

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts."""
        work = await run_sync(backend.intake.completion, body, limiter=one_at_a_time)
        form = Completions(backend.intake.served_name, wants_logprobs=work.top_logprobs is not None)
        return await _answer(backend.worker, request, body=body, work=work, form=form)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer in a conversation."""
        work = await run_sync(backend.intake.chat, body, limiter=one_at_a_time)
        form = ChatCompletions(backend.intake.served_name, wants_logprobs=work.top_logprobs is not None)
        return await _answer(backend.worker, request, body=body, work=work, form=form)


async def _answer(worker: Worker, request: Request, *, body: Sampled, work: Work, form: Completions) -> Response:
    """Queue the work and answer; errors before the first token are plain HTTP errors even if a stream was asked for."""
    mailbox = Mailbox()
    job = Job(work, mailbox.send)
    worker.submit(job)
    events = mailbox.events()
    try:
        if not body.stream:
            return JSONResponse(await unless_gone(request, _whole(events, form)))
        first = await unless_gone(request, _first(events))
        return _EventStream(job, _again(first, events), form=form, wants_usage=body.wants_usage)
    except ClientGone:
        job.cancel()
        set_outcome(request.scope, CLIENT_GONE)
        return Response(status_code=int(CLIENT_GONE))
    except BaseException:  # the server is stopping, for example
        job.cancel()
        raise


async def _whole(events: AsyncIterator[Event], form: Completions) -> dict[str, Any]:
    deltas: list[Delta] = []
    async for event in events:
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Done):
            return form.whole(deltas, event)
        deltas.append(event)
    raise AssertionError("events end with Done or Failed")


async def _first(events: AsyncIterator[Event]) -> Event:
    event = await anext(events)
    if isinstance(event, Failed):
        raise event.error
    return event


async def _again(first: Event, events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    """The events with the one that was taken already."""
    yield first
    async for event in events:
        yield event


class _EventStream(StreamingResponse):
    """Server-sent events. However it ends, the job ends with it, and the request is counted by how it ended."""

    media_type = "text/event-stream"

    def __init__(self, job: Job, events: AsyncIterator[Event], *, form: Completions, wants_usage: bool) -> None:
        super().__init__(self._lines(events), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._job, self._form, self._wants_usage = job, form, wants_usage
        self._outcome = CLIENT_GONE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()
            set_outcome(scope, self._outcome)

    async def _lines(self, events: AsyncIterator[Event]) -> AsyncIterator[str]:
        work = self._job.work
        for chunk in self._form.first_chunks(len(work.prompts) * work.n):
            yield sse(chunk)
        async for event in events:
            if isinstance(event, Failed):
                self._outcome = str(event.error.status)
                yield sse(event.error.body())
                return
            if isinstance(event, Delta):
                yield sse(self._form.chunk(event, wants_usage=self._wants_usage))
            elif self._wants_usage:
                yield sse(self._form.usage_chunk(event))
        self._outcome = "200"
        yield SSE_END


def _add_error_handlers(app: FastAPI) -> None:
    """Every error has OpenAI's body."""

    @app.exception_handler(ApiError)
    async def told(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return invalid_request(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        what = HTTPStatus(error.status_code).phrase if error.status_code in (404, 405) else error.detail
        return ApiError(
            f"{request.method} {request.url.path}: {what}", status=error.status_code, headers=error.headers
        ).response()

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, __: Exception) -> Response:
        return ApiError("internal error; the server's log says more", status=500).response()
