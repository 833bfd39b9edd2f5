"""Errors as OpenAI's API words them: a status and a body that names what is wrong, why, and with which parameter."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

LONGEST_ECHO = 200
"""Characters that are repeated at most to the client that sent them."""
SHAPES = {
    "prompt": "a text, a list of texts, a list of token ids, or a list of such lists; none empty, at most 128 prompts",
    "stop": "a text or a list of at most four, none of them empty",
    "messages": "a list of objects with a role (system, developer, user or assistant) and a content that is text",
}
"""The forms that a field may have, in one sentence; the checks of each form would say it in several."""
Headers = Mapping[str, str] | None


class ErrorDetail(BaseModel):
    """The error in OpenAI's words."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorDetail


class ApiError(HTTPException):
    """An answer other than success; an `HTTPException`, as FastAPI passes no others on while it reads a body.

    Args:
        param: the parameter that is wrong.
        code: a name for programs.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Headers = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.message, self.status, self.param, self.code = message, status, param, code

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        detail = ErrorDetail(message=speakable(self.message), type=kind, param=self.param, code=self.code)
        return ErrorBody(error=detail).model_dump()

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), status_code=self.status, headers=dict(self.headers or {}))


def invalid_request(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The error for a malformed body, made of the first of pydantic's `errors` about it."""
    first = errors[0]
    path = [speakable(str(part))[:LONGEST_ECHO] for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    if not path:
        if first["type"] == "value_error":
            return ApiError(str(first["ctx"]["error"]))
        return ApiError("the body must be a JSON object, sent with Content-Type: application/json")
    param = path[0]
    if first["type"] == "extra_forbidden":
        where = ".".join(path)
        return ApiError(f"{where} is not supported by this server; leave it out", param=param, code="unsupported")
    if first["type"] == "missing" and len(path) == 1:
        return ApiError(f"{param} is missing", param=param)
    if param in SHAPES:
        return ApiError(f"{param} must be {SHAPES[param]}", param=param)
    return ApiError(f"{'.'.join(path)}: {first['msg']}", param=param)


def speakable(text: str) -> str:
    """`text` with halves of characters replaced, which JSON may escape and UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode("utf-8")
