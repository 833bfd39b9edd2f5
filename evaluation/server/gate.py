"""The gate before the routes: every HTTP request is counted, must hold the key, and may not be too long."""

import hmac
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evaluation.server.errors import ApiError
from evaluation.server.metrics import Metrics

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")
CLIENT_GONE = "499"
"""Counted when the client left before its answer was complete; nginx' number for that."""


class Gate:
    """ASGI middleware.

    Args:
        api_key: the key that `/v1` wants as `Authorization: Bearer ...`; None: no key is needed.
        max_request_bytes: the longest body.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, api_key: str | None, max_request_bytes: int) -> None:
        self._app, self._metrics = app, metrics
        self._api_key, self._max_request_bytes = api_key, max_request_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        counted = _Counted(scope, send)
        try:
            if self._has_key(scope):
                await self._app(scope, _limited(scope, receive, self._max_request_bytes), counted)
            else:
                await _no_key().response()(scope, receive, counted)
        finally:
            self._metrics.requests.labels(counted.endpoint, counted.status).inc()

    def _has_key(self, scope: Scope) -> bool:
        if self._api_key is None or not scope["path"].startswith("/v1"):
            return True
        given = Headers(scope=scope).get("authorization", "")
        return hmac.compare_digest(given.encode(), f"Bearer {self._api_key}".encode())


def set_outcome(scope: Scope, status: str) -> None:
    """Count this request under another status than the one its answer began with."""
    scope.setdefault("state", {})["outcome"] = status


class _Counted:
    """A `send` that notes the status of the answer."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        self._status = "500"  # of an answer that never began

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = str(message["status"])
        await self._send(message)

    @property
    def endpoint(self) -> str:
        return self._scope["path"] if self._scope["path"] in PATHS else "other"

    @property
    def status(self) -> str:
        return self._scope.get("state", {}).get("outcome", self._status)


def _limited(scope: Scope, receive: Receive, max_bytes: int) -> Receive:
    """A `receive` that raises an `ApiError` once the body is longer than allowed, or is announced to be."""
    announced = Headers(scope=scope).get("content-length", "")
    seen_bytes = int(announced) if announced.isdecimal() and len(announced) < 20 else 0
    came_bytes = 0

    async def limited() -> Any:
        nonlocal came_bytes
        if seen_bytes > max_bytes:
            raise _too_long(max_bytes)
        message = await receive()
        came_bytes += len(message.get("body", b""))
        if came_bytes > max_bytes:
            raise _too_long(max_bytes)
        return message

    return limited


def _too_long(max_bytes: int) -> ApiError:
    return ApiError(
        f"the request is longer than {max_bytes} bytes, which --max-request-bytes allows; shorten it",
        status=413,
        code="request_too_large",
    )


def _no_key() -> ApiError:
    return ApiError(
        "the API key is missing or wrong; send it as Authorization: Bearer KEY",
        status=401,
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
