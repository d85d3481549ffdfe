"""The options of the HTTP server, each with its default: ``ServerOptions`` and ``Limits``. The engine's own stand elsewhere.

Command line, environment and configuration file are read into these two (``cli/serve.py``); nothing else decides a default.
"""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from dmtd_errors.words import reason
from dmtd_runtime.errors import RequestError
from dmtd_runtime.sampling import params
from dmtd_runtime.text.tool_calls import ToolFormat

LogFormat = Literal["text", "json"]
MIN_KEY_CHARS = 8
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:]+\]|[a-z0-9._-]+)(:[0-9]+)?")
_ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~!$&'()*+,;=:@%-]+)+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one client may ask for. Sizes in bytes, times in seconds; None: no limit beside the model's."""

    max_body_bytes: int = 16 << 20
    max_header_bytes: int = 32 << 10
    max_connections: int = 1024
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    keep_alive_s: float = 75.0
    write_timeout_s: float = 60.0
    queue_timeout_s: float | None = 120.0
    request_timeout_s: float | None = 600.0
    max_prompts: int = 128
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    max_n: int = 16
    max_stop: int = 16
    max_stop_chars: int = 256
    max_logprobs: int = params.MAX_LOGPROBS
    max_logit_bias: int = 1024
    max_messages: int = 1024
    max_tools: int = 128
    max_schema_bytes: int = 64 << 10
    max_schema_depth: int = 32

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is None and "None" in str(each.type):
                continue
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 < value < math.inf:
                raise RequestError(f"got {value!r}, expected a number above 0", param=each.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Where the server listens, to whom, and what it says of itself.

    ``api_key``: keys given one by one; ``api_key_file``: one key a line, # begins a comment. ``insecure``: an address that
    others reach without any key. ``max_num_seqs``: sequences at a time; None: as many as ``AsyncLLM`` takes. ``allow_plain``:
    clients may ask for plain mode, which opens the bundle a second time. ``chat_template``: a file in place of the bundle's.
    ``shutdown_timeout_s``: for running requests after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: list[str] | None = None
    api_key: list[str] | None = None
    api_key_file: Path | None = None
    insecure: bool = False
    protect_metrics: bool = False
    allowed_origins: list[str] | None = None
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    ssl_ca_certs: Path | None = None
    root_path: str = ""
    max_num_seqs: int | None = None
    allow_plain: bool = False
    chat_template: Path | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    shutdown_timeout_s: float = 30.0
    log_format: LogFormat = "text"
    log_requests: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise RequestError(f"got {self.port}, expected 0 (any free one) to 65535", param="port")
        if not 0 <= self.shutdown_timeout_s < math.inf:
            raise RequestError(f"got {self.shutdown_timeout_s}, expected 0 or more seconds", param="shutdown_timeout_s")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise RequestError("needs a certificate; give --ssl-certfile too", param="ssl_keyfile")
        if self.ssl_ca_certs is not None and self.ssl_certfile is None:
            raise RequestError("needs a certificate; give --ssl-certfile too", param="ssl_ca_certs")
        if self.tool_call_parser not in (None, *get_args(ToolFormat)):
            expected = " or ".join(get_args(ToolFormat))
            raise RequestError(f"got {self.tool_call_parser!r}, expected {expected}", param="tool_call_parser")
        if self.reasoning_parser not in (None, "think"):
            raise RequestError(f"got {self.reasoning_parser!r}, expected think", param="reasoning_parser")
        if self.log_format not in ("text", "json"):
            raise RequestError(f"got {self.log_format!r}, expected text or json", param="log_format")
        for key in self.api_key or ():
            _check_key(key, "api_key")
        for origin in self.allowed_origins or ():
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                expected = "an origin as browsers send it, without a path: https://example.org or http://localhost:3000"
                raise RequestError(f"got {origin!r}, expected {expected}", param="allowed_origins")
        if self.root_path and not _ROOT_PATH.fullmatch(self.root_path):
            expected = "a path that begins with a slash and ends without one: /models/dmtd"
            raise RequestError(f"got {self.root_path!r}, expected {expected}", param="root_path")

    def keys(self) -> tuple[str, ...]:
        """All keys, from options and file.

        Raises:
            RequestError: the file cannot be read, holds none, or one that is too short.
        """
        keys = list(self.api_key or ())
        if self.api_key_file is not None:
            try:
                lines = self.api_key_file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise RequestError(
                    f"{self.api_key_file} cannot be read ({reason(error)})", param="api_key_file"
                ) from None
            found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
            if not found:
                raise RequestError(f"{self.api_key_file} holds no key; write one a line", param="api_key_file")
            for key in found:
                _check_key(key, "api_key_file")
            keys += found
        return tuple(dict.fromkeys(keys))

    def refuse_open_bind(self) -> None:
        """Raise where others could reach a server without keys, and nobody said that they may."""
        if not (self.insecure or _is_loopback(self.host) or self.keys()):
            raise RequestError(
                f"got {self.host}, which other machines reach, and no key; give --api-key-file, or --insecure if that is meant",
                param="host",
            )


def _check_key(key: str, param: str) -> None:
    if len(key) < MIN_KEY_CHARS or not key.isascii() or any(letter.isspace() for letter in key):
        raise RequestError(  # never the key itself: this goes to a log
            f"got a key of {len(key)} characters, expected {MIN_KEY_CHARS} or more of ASCII, without blanks",
            param=param,
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
