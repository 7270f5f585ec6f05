"""The errors that a client is told, as OpenAI's API words them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engines.errors import (
    BackendError,
    BundleError,
    EngineError,
    FoveateError,
    OptionError,
    PictureError,
)
from runtime.backends.chat_server import ServerLostError

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass
class RefusalError(Exception):
    """A request that is not answered.

    Attributes:
        status: of HTTP.
        message: what is wrong, what was expected and what to do.
        code: one word for programs.
        field: of the request's body, if it is one field's fault.
        retry_after_s: when another attempt may be worth it.
    """

    status: int
    message: str
    code: str | None = None
    field: str | None = None
    retry_after_s: int | None = None

    def __str__(self) -> str:
        return self.message

    @property
    def document(self) -> dict[str, Any]:
        """The body of the response."""
        usual = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, usual),
                "param": self.field,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """What the response says besides."""
        headers = {"Connection": "close"} if self.status == 408 else {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


class ClientGoneError(Exception):
    """The client closed the connection: nobody is left to answer."""


def refusal_of(error: FoveateError) -> RefusalError:
    """Return what a client is told of an error of the floors below."""
    if isinstance(error, OptionError | PictureError):
        return RefusalError(400, str(error), "invalid_value")
    if isinstance(error, BackendError):
        lost = isinstance(error, ServerLostError)
        return RefusalError(502 if lost else 500, str(error), "backend_failed")
    if isinstance(error, EngineError | BundleError):
        return RefusalError(500, str(error), "engine_failed")
    return RefusalError(500, str(error), "failed")
