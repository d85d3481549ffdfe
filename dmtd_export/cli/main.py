"""The `dmtd` command: its verbs, their loading, and ``--version``.

A verb's module is imported when the verb runs or its own help is asked for, so that ``dmtd --help`` is quick and a machine
with the runtime's dependencies alone has the verbs that need no more. The verbs stand in ``dmtd_runtime.cli`` (generate, chat,
serve, bench, inspect, doctor) and beside this module (the others). Exit codes: see ``dmtd_runtime.cli.common``.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from dmtd_export.cli.startup import unwind_on_ctrl_c
from dmtd_runtime.cli.common import EXIT_USAGE, friendly_errors, note
from dmtd_runtime.cli.complaints import reword
from dmtd_runtime.cli.options.groups import takes_groups
from dmtd_runtime.cli.places import place_of
from dmtd_runtime.cli.process import flushed, prepare_streams, unwind_on_signals
from dmtd_runtime.version import __version__

RENAMED = {"--flavour": "--backend", "--max-batch": "--max-num-seqs"}
RENAMED_VALUES = {"host": "simulator"}  # of --flavour
_HELP_NAMES = {"help_option_names": ["-h", "--help"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """Where a verb stands: ``module`` has a function called ``function``."""

    module: str
    function: str
    help: str
    extra: str = "cpu"  # of the distribution: what the verb needs besides the runtime's dependencies
    environment: str | None = None  # prefix of the variables that its options are read from
    stands_for: Mapping[str, str] = field(default_factory=dict)  # parameter of Python's -> the options it is made of


VERBS: dict[str, Verb] = {
    "finetune": Verb(
        module="dmtd_export.cli.finetune",
        function="finetune",
        help="Train a model for DMTD; its plain self is the teacher.",
        extra="train",
        stands_for={"adapter": "--initial"},
    ),
    "export": Verb(
        module="dmtd_export.cli.export",
        function="export",
        help="Make a bundle of ONNX graphs from a checkpoint, and verify it.",
        extra="export",
    ),
    "build": Verb(
        module="dmtd_export.cli.build",
        function="build",
        help="Build TensorRT engines from a bundle; TensorRT-RTX needs no GPU for it.",
        extra="export",
    ),
    "verify": Verb(
        module="dmtd_export.cli.verify",
        function="verify",
        help="Check a bundle: files, graphs against each other, whole cycles against the reference.",
        extra="export",
    ),
    "evaluate": Verb(
        module="dmtd_export.cli.evaluate",
        function="evaluate",
        help="Measure what a DMTD model keeps of its plain base: perplexity, agreement, tasks.",
        extra="evaluate",
    ),
    "inspect": Verb(
        module="dmtd_runtime.cli.inspect",
        function="inspect",
        help="Draw a bundle's split and cycle; list its graphs, bytes and speed bound.",
    ),
    "generate": Verb(
        module="dmtd_runtime.cli.generate",
        function="generate",
        help="Generate text for a prompt, streaming.",
        stands_for={"structured_outputs": "--json-schema, --regex, --choice"},
    ),
    "chat": Verb(module="dmtd_runtime.cli.chat", function="chat", help="Talk to a bundle in the terminal."),
    "serve": Verb(
        module="dmtd_runtime.cli.serve",
        function="serve",
        help="Serve a bundle to OpenAI's clients.",
        extra="serve",
        environment="DMTD",
    ),
    "bench": Verb(
        module="dmtd_runtime.cli.bench",
        function="bench",
        help="Measure plain and DMTD decoding, interleaved on the same weights.",
        stands_for={"max_num_seqs": "--batch"},
    ),
    "doctor": Verb(
        module="dmtd_runtime.cli.doctor", function="doctor", help="Say what is installed, and what is missing."
    ),
}


class _LazyCommand(typer.core.TyperCommand):
    """Stands for a verb in the list of commands; becomes the verb itself once it is called."""

    def __init__(self, name: str, verb: Verb) -> None:
        super().__init__(name=name, help=verb.help, short_help=verb.help)
        self._verb = verb
        self._flags: dict[str, str] = {}  # parameter -> the option that sets it, or where its value was written

    def make_context(self, info_name: Any, args: list[str], *more: Any, **kwargs: Any) -> Any:
        command, words = self.load(), list(args)  # the parser empties its list
        try:
            context = command.make_context(info_name, args, *more, **kwargs)
        except Exception as error:  # typer's own: of an option that it does not know, or of a value
            old = getattr(error, "option_name", None)
            if old not in RENAMED:
                reword(error)
                raise
        else:
            places = {str(each.name): place_of(context, each) for each in command.params}
            self._flags |= {name: place for name, place in places.items() if place}
            self._refuse_empty_names(command, context, words)
            return context
        note(f"error: {old}: is called {RENAMED[old]} now; write: {RENAMED[old]} {_new_value(words, str(old))}")
        raise typer.Exit(EXIT_USAGE)

    def _refuse_empty_names(self, command: Any, context: Any, words: list[str]) -> None:
        """An empty name, which an unset variable of a shell gives, would be the current directory as a path."""
        written = {**(context.default_map or {}), **command.make_parser(context).parse_args(args=words)[0]}
        for each in command.params:
            if written.get(each.name) == "" and isinstance(context.params.get(each.name), Path):
                place = self._flags.get(str(each.name)) or each.metavar
                note(f"error: {place}: got an empty name, expected that of a file or directory; give one")
                raise typer.Exit(EXIT_USAGE)

    def load(self) -> Any:
        """The verb as a command of typer."""
        with friendly_errors(extra=self._verb.extra):
            function = getattr(importlib.import_module(self._verb.module), self._verb.function)
        single = typer.Typer(
            add_completion=False,
            pretty_exceptions_enable=False,
            rich_markup_mode="rich",
            context_settings=_HELP_NAMES | {"auto_envvar_prefix": self._verb.environment},
        )
        single.command(name=self.name)(guarded(takes_groups(function), self._flags, self._verb.extra))
        command = typer.main.get_command(single)
        options = [each for each in command.params if each.param_type_name == "option"]
        self._flags |= self._verb.stands_for
        self._flags |= {str(each.name): max(each.opts, key=len) for each in options}
        return command


def _new_value(words: Sequence[str], option: str) -> str:
    """What was given for an option of old, in today's words."""
    for word, following in zip(words, [*words[1:], "..."], strict=True):
        if word == option or word.startswith(f"{option}="):
            value = word.partition("=")[2] or following
            return RENAMED_VALUES.get(value, value)
    return "..."


class _LazyGroup(typer.core.TyperGroup):
    """All verbs, none of them loaded."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, verb in VERBS.items():
            self.add_command(_LazyCommand(name, verb))


def guarded(function: Callable[..., Any], flags: Mapping[str, str], extra: str) -> Callable[..., Any]:
    """The verb with the conventions of errors around it; ``flags``: parameter -> option, as errors name it."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with friendly_errors(flags, extra=extra):
            unwind_on_ctrl_c()
            return function(*args, **kwargs)

    return run


app = typer.Typer(
    cls=_LazyGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings=_HELP_NAMES,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dmtd {__version__}")
        raise typer.Exit


@app.callback()
def _dmtd(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Export Direct Multi-Token Decoding language models to ONNX, check them, and run them without torch."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `dmtd` command; ends the process with its exit code."""
    prepare_streams()
    unwind_on_signals()
    with flushed():
        app(args=list(arguments) if arguments is not None else None, prog_name="dmtd")


if __name__ == "__main__":
    main()
