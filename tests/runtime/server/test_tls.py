"""https: a certificate that is its own authority, valid until 2120, made by OpenSSL for 127.0.0.1; and files that are none."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx
import pytest
from runtime_support import TinyBundles
from server_support import running
from typer.testing import CliRunner

from dmtd_export.cli.main import app
from dmtd_runtime.server.options import ServerOptions
from dmtd_runtime.server.tls import tls_context

pytestmark = pytest.mark.timeout(300)

CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBeDCCAR2gAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlkbXRkIHRl
c3QwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CWRtdGQgdGVzdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABLRp3GDrgxi5hJpp
LG0LNXAFKyhbRNmcV5uWYGxilNEDTr7zk1geYUumsiQrSUIsAxziScxEWJ+0l8Ip
pY+pLtOjXjBcMB0GA1UdDgQWBBQFmoxKA2PWTa2KWoqrCUIB17oj5TAPBgNVHRMB
Af8EBTADAQH/MA4GA1UdDwEB/wQEAwIChDAaBgNVHREEEzARhwR/AAABgglsb2Nh
bGhvc3QwCgYIKoZIzj0EAwIDSQAwRgIhAOMmYE2nQr/omIAnYDGDdhgYCq6SImyr
obY9vHIVK0K6AiEAj3efkqxbClAhIXl1AFj8HC0F9j1VIUoLwVMnY7P70kM=
-----END CERTIFICATE-----
"""
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgVgwWCIvXBolP/3dZ
00khW9W149wGywt6PCax9hOWhk+hRANCAAS0adxg64MYuYSaaSxtCzVwBSsoW0TZ
nFeblmBsYpTRA06+85NYHmFLprIkK0lCLAMc4knMRFiftJfCKaWPqS7T
-----END PRIVATE KEY-----
"""
WITH_PASSWORD = """\
-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAgzHCznZbJbUQICCAAw
DAYIKoZIhvcNAgkFADAdBglghkgBZQMEASoEEBjwbSHi7G/YOv5xdwummr4EgZAh
DAO6nSdvE2KL6AVMViaekMPDPQcutyLwHPzwCzcGk/g2m9Vwc/mSK+Nj/CsLttxN
QIgTAUdko3tAOyZzkrgshx53fURD3c0tIbTXvlci+7GMhxZrCC8CprAOOi1VOshq
WBjK0FOaXSzrb/QAxZ+8+ir0aNVx4O2gwydoD4N5RPMTm4bQMXyMnLuZAplhm/Q=
-----END ENCRYPTED PRIVATE KEY-----
"""
ANOTHER_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgFsATpQ1D+NLUkXUU
meLvFAIy7br3VkZdqLKgGqHKU3WhRANCAASr5W/utDsrdJt7jqp2ZlQu5NyPaPl9
xToXQb2cBa5Nmo+N9AklXxbdbwXNJAfKsXgGerOBxYbBDaTf/sM6iEa7
-----END PRIVATE KEY-----
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    texts = {
        "cert": CERTIFICATE,
        "key": KEY,
        "locked": WITH_PASSWORD,
        "other": ANOTHER_KEY,
        "empty": "",
        "text": "no key\n",
    }
    for name, text in {**texts, "both": CERTIFICATE + KEY, "cut": CERTIFICATE[:200], "cut-key": KEY[:100]}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    (tmp_path / "folder").mkdir()
    return tmp_path


def client(files: Path, *, certified: bool) -> httpx.Client:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(files / "cert")
    if certified:
        context.load_cert_chain(files / "cert", files / "key")
    return httpx.Client(verify=context, timeout=60)


def test_https_and_certificates_of_clients(tiny: TinyBundles, files: Path) -> None:
    options = ServerOptions(ssl_certfile=files / "cert", ssl_keyfile=files / "key", ssl_ca_certs=files / "cert")
    with running(tiny.get().directory, options) as server:
        assert server.url.startswith("https://")
        body = {"prompt": [5], "max_tokens": 3, "stream": True}
        with client(files, certified=True) as known:
            assert known.post(f"{server.url}/completions", json=body).text.endswith("data: [DONE]\n\n")
        with client(files, certified=False) as stranger, pytest.raises(httpx.TransportError):
            stranger.get(f"{server.root}/health")


@pytest.mark.parametrize(
    ("param", "certificate", "key", "authorities", "problem"),
    [
        ("ssl_certfile", "missing", "key", None, "missing cannot be read (No such file or directory)"),
        ("ssl_certfile", "folder", None, None, "folder cannot be read (Is a directory)"),
        ("ssl_certfile", "empty", "key", None, "empty holds no whole certificate"),
        ("ssl_certfile", "bytes", "key", None, "bytes holds no whole certificate"),
        ("ssl_certfile", "cut", "key", None, "cut holds no whole certificate"),
        ("ssl_certfile", "key", "cert", None, "key holds no whole certificate"),
        ("ssl_certfile", "cert", None, None, "cert holds no whole private key"),
        ("ssl_keyfile", "cert", "missing", None, "missing cannot be read"),
        ("ssl_keyfile", "cert", "text", None, "text holds no whole private key"),
        ("ssl_keyfile", "cert", "cut-key", None, "cut-key holds no whole private key"),
        ("ssl_keyfile", "cert", "other", None, "is not that of the certificate in"),
        ("ssl_keyfile", "cert", "locked", None, "locked holds a key with a password; write it without one"),
        ("ssl_ca_certs", "cert", "key", "missing", "missing cannot be read"),
        ("ssl_ca_certs", "cert", "key", "text", "text holds no whole certificate"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_before_anything_starts(
    files: Path, param: str, certificate: str, key: str | None, authorities: str | None, problem: str
) -> None:
    given = {"--ssl-certfile": certificate, "--ssl-keyfile": key, "--ssl-ca-certs": authorities}
    words = [word for flag, name in given.items() if name for word in (flag, str(files / name))]
    for start in (["--dry-run"], []):
        done = CliRunner().invoke(app, ["serve", "no-bundle", *start, *words])
        assert done.exit_code == 2 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith(f"error: --{param.replace('_', '-')}: ") and problem in done.stderr


def test_one_file_may_hold_both(files: Path) -> None:
    context = tls_context(ServerOptions(ssl_certfile=files / "both"))
    assert context is not None and context.verify_mode == ssl.CERT_NONE
    assert tls_context(ServerOptions()) is None
