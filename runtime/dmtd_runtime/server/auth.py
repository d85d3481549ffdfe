"""Who may ask: keys as bearer tokens."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from dmtd_runtime.server.errors import ApiError

FREE_PATHS = frozenset({"/health", "/health/ready", "/v2/health/live", "/v2/health/ready"})


class Keys:
    """The keys of a server; none: everybody may ask.

    Digests of one length are compared, each of them whatever came before it, so that the time taken says nothing of a key.
    """

    def __init__(self, keys: Sequence[str], *, protect_metrics: bool) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._free = FREE_PATHS if protect_metrics else FREE_PATHS | {"/metrics"}

    def check(self, path: str, authorization: bytes | None) -> None:
        """Raise ApiError 401 unless the path is free or the header holds a key."""
        if not self._digests or path in self._free:
            return
        scheme, _, token = (authorization or b"").partition(b" ")
        digest = hashlib.sha256(token.strip()).digest()
        equal = [hmac.compare_digest(digest, each) for each in self._digests]
        if scheme.lower() != b"bearer" or not any(equal):
            raise ApiError(
                401,
                "no valid key: send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
