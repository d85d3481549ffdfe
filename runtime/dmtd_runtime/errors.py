"""The errors of the runtime. The whole tree, and the base, stand in ``dmtd_errors``."""

from dmtd_errors import DmtdError as DmtdError


class BundleError(DmtdError):
    """The bundle cannot be used as it stands."""


class RequestError(DmtdError, ValueError):
    """A prompt or an option that cannot be served; ``param`` names it."""


class BackendError(DmtdError):
    """A library, device or execution provider is missing or unfit."""


class AbortedError(DmtdError):
    """The request was cancelled, passed its deadline, or its LLM was closed."""


class QueueFullError(DmtdError):
    """As many sequences or prompt tokens wait as may; nothing of the request was started, and it may be tried again later."""


class MissingExtraError(DmtdError):
    """A library of an optional extra is not installed."""
