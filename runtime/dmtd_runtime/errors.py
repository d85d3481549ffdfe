"""Every error that the runtime raises on purpose.

    DmtdError                      one line for the user: what, got, expected, how to fix it
    ├── BundleError                a file of the bundle is missing, altered, too new or not a bundle
    ├── RequestError (ValueError)  a prompt or an option that cannot be served
    ├── BackendError               the library, device or provider asked for is not usable
    └── AbortedError               the request was cancelled, timed out, or its LLM was closed

The command line prints the message and exits 1; anything that is not a ``DmtdError`` is a bug and keeps its traceback.
"""


class DmtdError(Exception):
    """Base of all errors with a message meant for the user."""


class BundleError(DmtdError):
    """The bundle cannot be used as it stands."""


class RequestError(DmtdError, ValueError):
    """A prompt or an option that cannot be served."""


class BackendError(DmtdError):
    """A library, device or execution provider is missing or unfit."""


class AbortedError(DmtdError):
    """The request was cancelled, passed its deadline, or its LLM was closed."""
