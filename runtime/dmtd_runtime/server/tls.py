"""https: certificate and key of the server, and the certificates that clients must have; checked before anything listens."""

from __future__ import annotations

import ssl
from pathlib import Path

from dmtd_errors.words import reason
from dmtd_runtime.errors import RequestError
from dmtd_runtime.server.options import ServerOptions


class _NeedsPasswordError(Exception):
    """OpenSSL would ask for it at the terminal."""


def tls_context(options: ServerOptions) -> ssl.SSLContext | None:
    """What connections are encrypted with; None without a certificate. With ``ssl_ca_certs`` clients must have one too.

    Raises:
        RequestError: a file cannot be read, is not what it should be, or the key is another certificate's.
    """
    certificate, key, authorities = options.ssl_certfile, options.ssl_keyfile, options.ssl_ca_certs
    if certificate is None:
        return None
    for param, file in (("ssl_certfile", certificate), ("ssl_keyfile", key), ("ssl_ca_certs", authorities)):
        if file is not None:
            _check_readable(param, file)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load_authorities(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), "ssl_certfile", certificate)
    _load_pair(context, certificate, key)
    if authorities is not None:
        _load_authorities(context, "ssl_ca_certs", authorities)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _check_readable(param: str, file: Path) -> None:
    try:
        with file.open("rb") as opened:
            opened.read(1)
    except OSError as error:
        raise RequestError(f"{file} cannot be read ({reason(error)})", param=param) from None


def _load_authorities(context: ssl.SSLContext, param: str, file: Path) -> None:
    try:
        context.load_verify_locations(file)
    except ssl.SSLError as error:
        raise RequestError(
            f"{file} holds no whole certificate in PEM form ({_reason(error)}); "
            "expected -----BEGIN CERTIFICATE----- and what follows",
            param=param,
        ) from None


def _load_pair(context: ssl.SSLContext, certificate: Path, key: Path | None) -> None:
    def ask() -> str:
        raise _NeedsPasswordError

    param, file = ("ssl_keyfile", key) if key is not None else ("ssl_certfile", certificate)
    try:
        context.load_cert_chain(certificate, key, password=ask)
    except _NeedsPasswordError:
        raise RequestError(
            f"{file} holds a key with a password; write it without one: openssl pkey -in {file} -out NEW.pem",
            param=param,
        ) from None
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise RequestError(
                f"the key in {file} is not that of the certificate in {certificate}; give both of one pair", param=param
            ) from None
        wanted = "expected one in PEM form" if key is not None else "give it with --ssl-keyfile"
        raise RequestError(f"{file} holds no whole private key ({_reason(error)}); {wanted}", param=param) from None


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or "not in PEM form").replace("_", " ").lower()
