"""The gate before the routes: every HTTP request is counted, must hold the key, and may not be too long."""

import hmac

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
        state = scope.setdefault("state", {})

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                state.setdefault("outcome", str(message["status"]))
            await send(message)

        try:
            if self._has_key(scope):
                await self._app(scope, _limited(scope, receive, self._max_request_bytes), noting)
            else:
                message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
                headers = {"WWW-Authenticate": "Bearer"}
                error = ApiError(message, status=401, code="invalid_api_key", headers=headers)
                await error.response()(scope, receive, noting)
        finally:
            endpoint = scope["path"] if scope["path"] in PATHS else "other"
            self._metrics.requests.labels(endpoint, state.get("outcome", "500")).inc()

    def _has_key(self, scope: Scope) -> bool:
        if self._api_key is None or not scope["path"].startswith("/v1"):
            return True
        given = Headers(scope=scope).get("authorization", "")
        return hmac.compare_digest(given.encode(), f"Bearer {self._api_key}".encode())


def set_outcome(scope: Scope, status: str) -> None:
    """Count this request under another status than the one its answer began with."""
    scope["state"]["outcome"] = status


def _limited(scope: Scope, receive: Receive, max_bytes: int) -> Receive:
    """A `receive` that raises an `ApiError` once the body is longer than allowed, or is announced to be."""
    announced = Headers(scope=scope).get("content-length", "")
    too_long = announced.isdecimal() and len(announced) < 20 and int(announced) > max_bytes
    came_bytes = 0

    async def limited() -> Message:
        nonlocal came_bytes
        message = {} if too_long else await receive()
        came_bytes += len(message.get("body", b""))
        if too_long or came_bytes > max_bytes:
            why = f"the request is longer than {max_bytes} bytes, which --max-request-bytes allows; shorten it"
            raise ApiError(why, status=413, code="request_too_large")
        return message

    return limited
