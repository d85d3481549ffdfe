"""What all verbs share: which bundle, how errors end, where lines go.

Results go to stdout, everything else to stderr. A ``DmtdError`` (or a full disk) is one line. Exit codes: 2 for wrong usage,
which is told by typer or by an error that names an option, 1 for any other error, 130 for Ctrl-C; a bug keeps its traceback.
Nothing here knows a model.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.util
import itertools
import logging
import signal
import sys
import traceback
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console

from dmtd_errors.words import reason
from dmtd_runtime.cli.process import drop_stdout
from dmtd_runtime.errors import DmtdError, MissingExtraError
from dmtd_runtime.machine.memory import left_in_words, ran_out

EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else 1

BundleArgument = Annotated[Path | None, typer.Argument(metavar="BUNDLE", help="Directory made by `dmtd export`.")]
BundleOption = Annotated[Path | None, typer.Option("--model", "-m", help="The bundle, instead of the argument.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]

T = TypeVar("T")
_NO_MEMORY = "not enough memory ({}), {}; free some, or choose a smaller model, batch or length"
_OWN_EXTRAS = {"onnxruntime": "cpu", "lm_eval": "lm-eval"}


def error_console() -> Console:
    """Where progress and logs go."""
    return Console(stderr=True, highlight=False)


def note(line: str) -> None:
    """One line for a person, on stderr."""
    typer.echo(line, err=True)


def pick(argument: T | None, option: T | None, name: str) -> T:
    """The value given as argument or option; exactly one of them."""
    if argument is not None and option is not None:
        raise typer.BadParameter(f"{name}: give it once, as the argument or with -m/--model")
    if argument is not None:
        return argument
    if option is None:
        raise typer.BadParameter(f"{name}: missing; give it as the first argument or with -m/--model")
    return option


def pip_name(library: str, extra: str) -> str:
    """What pip is asked for: the verb's extra, unless the library is of one that no verb needs as a whole."""
    return f'"dmtd[{_OWN_EXTRAS.get(library, extra)}]"'


def require(verb: str, modules: Sequence[str], extra: str) -> None:
    """Raise MissingExtraError with the pip line of the extra if one of ``modules`` cannot be imported."""
    # One that is not there is said at once: those before it may take seconds to import.
    looks: tuple[Callable[[str], object], ...] = (_find, importlib.import_module)
    for look, name in itertools.product(looks, modules):
        try:
            look(name)
        except Exception as error:  # noqa: BLE001 - a library that is broken, or too large for the memory, raises many kinds
            if _was_interrupted(error):
                raise KeyboardInterrupt from None
            if ran_out(error):
                raise MissingExtraError(
                    f"dmtd {verb} needs {name}, for which there is not enough memory ({reason(error)}), "
                    f"{left_in_words()}; free some"
                ) from None
            raise MissingExtraError(
                f"dmtd {verb} needs {name}, which cannot be imported ({error}); run: pip install {pip_name(name, extra)}"
            ) from None


def _find(name: str) -> None:
    if sys.modules.get(name) is None and importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C stands behind an error: C++ sides of libraries dress it up as a failed import."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


@contextlib.contextmanager
def friendly_errors(flags: Mapping[str, str] | None = None, *, extra: str = "cpu") -> Iterator[None]:
    """Turn what a verb raises on purpose into one line on stderr and an exit code.

    Args:
        flags: parameter -> the option that sets it. An error that names a parameter of Python's is told with the option.
        extra: what to install where a library is missing that the verb did not ask for before it began.
    """
    try:
        yield
        sys.stdout.flush()
    except DmtdError as error:
        flag = (flags or {}).get(error.param or "")
        if flag:
            raise _fail(f"{flag}: {error.problem}", EXIT_USAGE) from error
        raise _fail(str(error)) from error
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if not library or library.startswith("dmtd_") or library in sys.stdlib_module_names:
            raise
        raise _fail(f"{library} is not installed; run: pip install {pip_name(library, extra)}") from error
    except KeyboardInterrupt:
        _release_streams()
        note("interrupted")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        # Whoever read the output has gone: be quiet, and keep the interpreter from writing to it once more.
        drop_stdout()
        raise typer.Exit(EXIT_BROKEN_PIPE) from None
    except OSError as error:
        if error.errno == errno.EBADF and error.filename is None:
            drop_stdout()
            raise _fail(
                "stdout is closed, so the result has no place to go; redirect it to a file or /dev/null"
            ) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            if error.filename is None:
                drop_stdout()
            raise _fail(
                f"no space left on the device ({error.filename or 'output'}); free some and try again"
            ) from error
        if ran_out(error):
            raise _fail(_NO_MEMORY.format(reason(error), left_in_words())) from error
        raise
    except ImportError as error:
        if _was_interrupted(error):
            _release_streams()
            note("interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        if not ran_out(error):
            raise
        raise _fail(_NO_MEMORY.format(reason(error), left_in_words())) from error
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        raise _fail(_NO_MEMORY.format(reason(error), left_in_words())) from error


def _fail(message: str, code: int = EXIT_ERROR) -> typer.Exit:
    note("error: " + " ".join(message.split()))
    return typer.Exit(code)


def _release_streams() -> None:
    """End a line of output that was cut short."""
    with contextlib.suppress(OSError):
        if sys.stdout.isatty():
            sys.stdout.write("\n")
        sys.stdout.flush()


class _LineHandler(logging.Handler):
    """One line a record on stderr, and the traceback of a bug where the record carries one."""

    def emit(self, record: logging.LogRecord) -> None:
        note(f"{record.levelname.lower()}: {record.getMessage()}")
        if record.exc_info:
            note("".join(traceback.format_exception(*record.exc_info)).rstrip())


@contextlib.contextmanager
def logs_to_stderr(*, without: str | None = None) -> Iterator[None]:
    """Show the product's warnings as lines on stderr; ``without`` names a phrase that the verb tells itself."""
    handler = _LineHandler(logging.WARNING)
    if without:
        handler.addFilter(lambda record: without not in record.getMessage())
    logger = logging.getLogger("dmtd")
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def human_bytes(count: float) -> str:
    """Bytes for people, decimal units: 538 MB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            value = count / size
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{count:.0f} B"


def printable(text: str) -> str:
    """The text as it may go to a terminal: control characters, which could move its cursor, as escapes. Pipes get all."""
    if not sys.stdout.isatty():
        return text
    return "".join(
        letter if letter in "\n\t" or unicodedata.category(letter) != "Cc" else f"\\x{ord(letter):02x}"
        for letter in text
    )
