"""What a client is told when something goes wrong: an HTTP status and OpenAI's error object, all four keys of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_NO_RETRY = {"x-should-retry": "false"}


class ApiError(HTTPException):
    """``code`` is stable and for programs, ``message`` is for people, ``param`` names the field at fault.

    An ``HTTPException``, so that it passes through the reading of a body as it is.
    """

    def __init__(self, status: int, code: str, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code, self.message, self.param = code, message, param

    def body(self) -> dict[str, Any]:
        """The JSON of the response, or of an event in mid-stream."""
        kind = _TYPES.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """400: the request cannot be granted as it is."""
    return ApiError(400, code, message, param=param)


def unsupported(param: str, message: str) -> ApiError:
    """400: a field asks for what the engine cannot do. It is refused rather than ignored."""
    return ApiError(400, "unsupported_value", message, param=param)


def busy(code: str, message: str, seconds: int) -> ApiError:
    """429: come again in so many seconds."""
    return ApiError(429, code, message, headers={"Retry-After": str(seconds)})


def unavailable(code: str, message: str, seconds: int) -> ApiError:
    """503: the server cannot take work now."""
    return ApiError(503, code, message, headers={"Retry-After": str(seconds)})


def too_late(message: str) -> ApiError:
    """504: a deadline has passed. Asking again would only add to the load."""
    return ApiError(504, "deadline_exceeded", message, headers=_NO_RETRY)


def problems(found: Sequence[Any]) -> tuple[str, str | None]:
    """Every field that pydantic finds wrong, in words, and the first of them. Places begin with where it is, such as ``body``."""
    told = [_problem(each) for each in found]
    message = "; ".join(f"{where}: {text}" if where else text for where, text in dict.fromkeys(told))
    return message[:2000], told[0][0] or None


def _problem(found: Any) -> tuple[str, str]:
    if found["type"] == "json_invalid":
        return "", f"the body is not JSON: {found['ctx']['error']} at character {found['loc'][1]}"
    return _where(found["loc"]), found["msg"].removeprefix("Value error, ")


def _where(location: Any) -> str:
    """``messages[0].content`` for a field; of the forms that a field may have, pydantic names each, which says nothing to a client."""
    if location[0] == "header":
        return str(location[1])
    path = ""
    for part in location[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier():
            path += f".{part}" if path else part
    for form in ("str", "list", "bool", "int", "float"):
        path = path.removesuffix(f".{form}")
    return path
