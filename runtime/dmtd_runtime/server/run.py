"""The process: uvicorn with our signals and connections, and the bundle opened while liveness already answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from dmtd_errors.words import reason
from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.errors import DmtdError, RequestError
from dmtd_runtime.server.app import Home, make_app
from dmtd_runtime.server.connection import Connection
from dmtd_runtime.server.lifecycle import Lifecycle
from dmtd_runtime.server.options import Limits, ServerOptions
from dmtd_runtime.server.served import open_served
from dmtd_runtime.server.tls import tls_context
from dmtd_runtime.serving.options import ServingOptions

logger = logging.getLogger("dmtd.server")

EXIT_ENGINE_DIED = 1
EXIT_NOW = 128 + signal.SIGTERM
_WATCH_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All that a server is started with."""

    bundle: Path
    options: ServerOptions = ServerOptions()
    limits: Limits = Limits()
    backend: BackendOptions = BackendOptions()
    serving: ServingOptions = ServingOptions()


def serve(settings: Settings, *, announce: Callable[[str, float], None] = lambda url, seconds: None) -> int:
    """Serve until a signal or the engine's end; the exit code.

    ``announce`` is called with the URL, and the seconds that opening the bundle took, once requests are answered.

    Raises:
        DmtdError: the bundle, an option or the address is not usable.
    """
    return Server(settings, announce).run_to_end()


class Server(uvicorn.Server):
    """uvicorn's, which stops listening at the first signal; this one drains first."""

    def __init__(self, settings: Settings, announce: Callable[[str, float], None]) -> None:
        options, limits = settings.options, settings.limits
        self.settings, self.announce = settings, announce
        self.failure: DmtdError | None = None
        self.home = Home(Lifecycle(shutdown_timeout_s=options.shutdown_timeout_s, ended=self._end))
        self.loop: asyncio.AbstractEventLoop | None = None
        self._opening: asyncio.Task[None] | None = None
        context = tls_context(options)
        super().__init__(
            uvicorn.Config(
                make_app(self.home, options=options, limits=limits),
                http=type("Connection", (Connection,), {"limits": limits}),
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=limits.keep_alive_s,  # type: ignore[arg-type]  # it takes parts of a second too
                h11_max_incomplete_event_size=limits.max_header_bytes,
                timeout_graceful_shutdown=1,
                ssl_context_factory=None if context is None else lambda *_: context,
            )
        )

    def run_to_end(self) -> int:
        """Listen, serve, end; the exit code. In the main thread signals end it, elsewhere ``home.lifecycle.drain``."""
        options = self.settings.options
        options.refuse_open_bind()
        sock = _bind(options.host, options.port)
        try:
            asyncio.run(self.serve(sockets=[sock]))
        finally:
            sock.close()
        if self.failure is not None:
            raise self.failure
        return EXIT_ENGINE_DIED if self.home.lifecycle.state == "dead" else 0

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals, in the event loop; and the bundle, which is opened in a thread."""
        loop = self.loop = asyncio.get_running_loop()
        for each in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError, RuntimeError):  # not in the main thread: who runs us stops us
                loop.add_signal_handler(each, self._signalled)
        self._opening = loop.create_task(self._open())
        yield
        self._opening.cancel()

    def _signalled(self) -> None:
        if self.home.lifecycle.state in ("loading", "ready"):
            self.home.lifecycle.drain()
        else:
            os._exit(EXIT_NOW)

    def _end(self) -> None:
        self.should_exit = True

    async def _open(self) -> None:
        begin = time.perf_counter()
        settings, lifecycle = self.settings, self.home.lifecycle
        try:
            served = await asyncio.to_thread(
                open_served,
                settings.bundle,
                options=settings.options,
                limits=settings.limits,
                backend=settings.backend,
                serving=settings.serving,
                lifecycle=lifecycle,
            )
        except DmtdError as error:
            self.failure = error
            self._end()
            return
        except Exception:
            logger.exception("the bundle could not be opened")
            lifecycle.engine_died()
            return
        self.home.opened = served
        lifecycle.loaded()
        seconds = time.perf_counter() - begin
        while not self.started:
            await asyncio.sleep(0.01)
        self.announce(self._url(), seconds)
        while all(llm.failure is None for llm in (served.llm, served.plain) if llm is not None):
            await asyncio.sleep(_WATCH_S)
        lifecycle.engine_died()

    def _url(self) -> str:
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        scheme = "https" if self.settings.options.ssl_certfile else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{self.settings.options.root_path}/v1"

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, and free the engine."""
        await super().shutdown(sockets)
        if (served := self.home.opened) is not None:
            for llm in (served.llm, served.plain):
                if llm is not None:
                    await llm.close()


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named asyncio sets TCP_NODELAY: without it an answer's body waits 40 ms for an acknowledgement.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host.strip("[]"), port))
    except OSError as error:
        sock.close()
        raise RequestError(
            f"{host}:{port} cannot be listened on ({reason(error)}); choose another", param="port"
        ) from None
    return sock
