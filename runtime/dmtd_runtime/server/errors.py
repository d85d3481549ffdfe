"""What goes wrong, as clients of OpenAI's API read it: ``ApiError``, and what it is made of.

``{"error": {message, type, param, code}}`` with a status that says whether to try again: OpenAI's client repeats 408, 409, 429
and everything from 500 on, unless ``x-should-retry: false`` says that it would fail the same way. Nothing internal is told.
"""

from __future__ import annotations

from typing import Any

from dmtd_runtime.errors import AbortedError, DmtdError, QueueFullError, RequestError

RETRY_AFTER = {"Retry-After": "1"}
NO_RETRY = {"x-should-retry": "false"}
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer that is no success.

    Args:
        status: of HTTP.
        message: for a person: what was got, what was expected, how to go on.
        code: a word for programs.
        param: the field at fault.
        headers: beside the answer's own.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON of the answer, or of the event that ends a stream."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(param: str | None, problem: str, *, code: str | None = None) -> ApiError:
    """400: a field that cannot be served as it stands."""
    return ApiError(400, problem if param is None else f"{param}: {problem}", param=param, code=code)


def draining() -> ApiError:
    """503: another replica may take it, or this one once it is up again."""
    return ApiError(503, "the server is shutting down; try again later", code="shutting_down", headers=RETRY_AFTER)


def loading() -> ApiError:
    """503: the bundle is being opened."""
    return ApiError(503, "the model is being loaded; try again later", code="loading", headers={"Retry-After": "2"})


def engine_failed() -> ApiError:
    """500: the worker has died, and this process will end."""
    return ApiError(500, "the engine failed; this server ends", code="engine_failed")


def out_of_time(seconds: float) -> ApiError:
    """504: the request ran as long as one may."""
    return ApiError(
        504,
        f"the request ran for {seconds:g} seconds, the longest that this server allows; ask for fewer tokens",
        code="request_timeout",
        headers=NO_RETRY,
    )


def context_overflow(num_tokens: int, max_model_len: int, *, param: str, asked: int | None = None) -> ApiError:
    """400: in the words that harnesses look for, with both numbers."""
    if asked is None:
        problem = f"the prompt has {num_tokens} tokens and exceeds the available context size of {max_model_len} tokens"
        return invalid(param, f"{problem}, answer included; shorten it", code="context_length_exceeded")
    return invalid(
        param,
        f"{num_tokens} tokens of prompt and {asked} of answer: this exceeds the available context size of {max_model_len} "
        "tokens; shorten the prompt or ask for fewer",
        code="context_length_exceeded",
    )


def of_engine(error: DmtdError) -> ApiError:
    """What an error of the runtime means for the one who asked."""
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=error.param)
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", headers=RETRY_AFTER)
    if isinstance(error, AbortedError):
        return draining()
    return engine_failed()
