"""What a client is told when it does not get what it asked for: OpenAI's error object."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxgen.errors import UserError
from jaxgen.serve.ask import NoSuchModel
from jaxgen.serve.body import Refused
from jaxgen.serve.reload import ReloadRunning
from jaxgen.serve.request import QueueFull

_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class EngineFailed(RuntimeError):
    """The engine cannot go on."""


class GrammarFailed(EngineFailed):
    """An answer could not be held to its grammar to the end."""


class Unavailable(RuntimeError):
    """The server takes no requests now."""


class Unreadable(UserError):
    """A body is not even read."""

    def __init__(self, status: int, message: str):
        """Says why, and with which status of HTTP."""
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A response with an error in it."""

    status: int
    message: str
    param: str | None = None
    """Of the request, what is to blame."""
    code: str | None = None
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        kind = _KINDS.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        said = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": said}


NO_KEY = Refusal(
    401,
    "no API key, or a wrong one; send Authorization: Bearer KEY",
    code="invalid_api_key",
    headers={"WWW-Authenticate": "Bearer"},
)
NO_ADMIN = Refusal(
    403,
    "this server has no admin key; start it with --admin-key-file FILE, or with JAXGEN_ADMIN_KEY",
    code="no_admin_key",
)


def refusal(error: Exception) -> Refusal:
    """Returns what to answer when `error` was raised."""
    text = str(error)
    match error:
        case NoSuchModel():
            return Refusal(404, text, error.param, "model_not_found")
        case Refused():
            return Refusal(400, text, error.param)
        case QueueFull():
            return Refusal(429, text, code="queue_full", headers={"Retry-After": "1"})
        case ReloadRunning():
            return Refusal(409, text, code="reload_running", headers={"Retry-After": "5"})
        case Unreadable():
            return Refusal(error.status, text)
        case UserError():
            return Refusal(400, text)
        case GrammarFailed():
            return Refusal(500, text)
        case Unavailable() | EngineFailed():
            return Refusal(503, text, headers={"Retry-After": "5", "Connection": "close"})
    return Refusal(500, "the server has a bug; its log says more")
