"""The one error of the server, in OpenAI's form."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """An error in OpenAI's form: status, type, param and code, and headers if any."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def as_dict(self) -> dict[str, Any]:
        """The body of the response."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def wrong(where: str, what: str, code: str = "invalid_value") -> ApiError:
    """A part of a request that is not what it should be, such as messages.0.content."""
    where = where[:200]
    return ApiError(400, f"{where}: {what}", param=where, code=code)
