"""The application: its paths, and its errors in OpenAI's form. What may come in at all is decided before it (``front``)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final, get_type_hints

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp

from dmtd_runtime.errors import DmtdError
from dmtd_runtime.server import schema
from dmtd_runtime.server.auth import Keys
from dmtd_runtime.server.chat import chat
from dmtd_runtime.server.completions import complete
from dmtd_runtime.server.errors import ApiError, loading, of_engine
from dmtd_runtime.server.front import Front
from dmtd_runtime.server.lifecycle import Lifecycle
from dmtd_runtime.server.metrics import CONTENT_TYPE
from dmtd_runtime.server.options import Limits, ServerOptions
from dmtd_runtime.server.responses import respond
from dmtd_runtime.server.schema import ChatBody, CompletionBody, DetokenizeBody, ResponsesBody, TokenizeBody
from dmtd_runtime.server.served import Served
from dmtd_runtime.server.streaming import answer
from dmtd_runtime.server.tokenize import detokenize, tokenize, tokenizer_info
from dmtd_runtime.server.validation import of_unreadable, of_validation
from dmtd_runtime.version import __version__

_STATUSES: Final = (400, 401, 404, 408, 409, 413, 415, 429, 500, 503, 504)
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.ErrorAnswer, "description": "OpenAI's form of an error."} for status in _STATUSES
}


class Home:
    """Where the paths find what is served, once it is."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self.lifecycle = lifecycle
        self.opened: Served | None = None

    @property
    def served(self) -> Served:
        """The model.

        Raises:
            ApiError: 503 while it is being loaded.
        """
        if self.opened is None:
            raise loading()
        return self.opened


def make_app(home: Home, *, options: ServerOptions, limits: Limits) -> ASGIApp:
    """Everything that a server answers."""
    app = FastAPI(
        title="DMTD", version=__version__, docs_url=None, redoc_url=None, root_path=options.root_path, responses=_ERRORS
    )
    _add_generation(app, home)
    _add_information(app, home)
    _add_health(app, home)
    _add_errors(app)
    keys = Keys(options.keys(), protect_metrics=options.protect_metrics)
    front = Front(app, lifecycle=home.lifecycle, keys=keys, limits=limits, log_requests=options.log_requests)
    if not options.allowed_origins:
        return front
    return CORSMiddleware(
        front,
        allow_origins=options.allowed_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["x-request-id"],
    )


def _documented(model: type[Any], *, events: bool = False) -> dict[int | str, dict[str, Any]]:
    told: dict[str, Any] = {"model": model}
    if events:
        told["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    return {200: told}


def _add_generation(app: FastAPI, home: Home) -> None:
    @app.post("/v1/chat/completions", responses=_documented(schema.ChatAnswer, events=True))
    async def chat_completions(body: ChatBody, http: HttpRequest) -> Response:
        return await chat(home.served, body, http)

    @app.post("/v1/responses", responses=_documented(schema.ResponsesAnswer, events=True))
    async def responses(body: ResponsesBody, http: HttpRequest) -> Response:
        return await respond(home.served, body, http)

    @app.post("/v1/completions", responses=_documented(schema.CompletionAnswer, events=True))
    async def completions(body: CompletionBody, http: HttpRequest) -> Response:
        return await complete(home.served, body, http)


def _add_information(app: FastAPI, home: Home) -> None:
    @app.get("/v1/models", responses=_documented(schema.ModelsAnswer))
    async def models() -> Response:
        served = home.served
        return answer({"object": "list", "data": [_model(served, name) for name in served.names]})

    @app.get("/v1/models/{model:path}", responses=_documented(schema.ModelAnswer))
    async def model(model: str) -> Response:
        return answer(_model(home.served, home.served.check_model(model)))

    @app.post("/tokenize", responses=_documented(schema.TokenizeAnswer))
    async def tokens(body: TokenizeBody) -> Response:
        return answer(await tokenize(home.served, body))

    @app.post("/detokenize", responses=_documented(schema.DetokenizeAnswer))
    async def text(body: DetokenizeBody) -> Response:
        return answer(await detokenize(home.served, body))

    @app.get("/tokenizer_info", responses=_documented(schema.TokenizerInfoAnswer))
    async def info() -> Response:
        return answer(tokenizer_info(home.served))

    @app.get("/version")
    async def version() -> Response:
        return answer({"version": __version__})

    @app.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def metrics() -> Response:
        return Response(home.served.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


def _add_health(app: FastAPI, home: Home) -> None:
    async def live() -> Response:
        return answer({"live": True})

    async def ready() -> Response:
        state = home.lifecycle.state
        return answer({"ready": home.lifecycle.is_ready, "state": state}, 200 if home.lifecycle.is_ready else 503)

    for path in ("/health", "/v2/health/live"):
        app.get(path)(live)
    for path in ("/health/ready", "/v2/health/ready"):
        app.get(path)(ready)


def _model(served: Served, name: str) -> dict[str, Any]:
    length = served.llm.max_model_len
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "dmtd",
        "root": served.names[0],
        "parent": None,
        "max_model_len": length,
        "context_length": length,
    }


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def _(_: HttpRequest, error: ApiError) -> Response:
        return answer(error.body(), error.status, error.headers)

    @app.exception_handler(DmtdError)
    async def _(_: HttpRequest, error: DmtdError) -> Response:
        told = of_engine(error)
        return answer(told.body(), told.status, told.headers)

    @app.exception_handler(RequestValidationError)
    async def _(http: HttpRequest, error: RequestValidationError) -> Response:
        told = of_validation(_body_of(http.scope["endpoint"]), error.errors(), error.body)
        return answer(told.body(), told.status)

    @app.exception_handler(Exception)
    async def _(http: HttpRequest, _: Exception) -> Response:
        name = http.state.request_id
        told = ApiError(500, f"internal error; the server's log tells it as {name}", code="internal_error")
        return answer(told.body(), told.status)

    @app.exception_handler(HTTPException)
    async def _(_: HttpRequest, error: HTTPException) -> Response:
        told = of_unreadable(error) or ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
        return answer(told.body(), told.status, told.headers)


@functools.cache
def _body_of(endpoint: Callable[..., Any]) -> type[BaseModel]:
    """What a path takes; nothing else of a request is validated."""
    return get_type_hints(endpoint)["body"]  # type: ignore[no-any-return]
