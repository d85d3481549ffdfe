"""``dmtd chat``: a conversation in the terminal. Reading lines and commands; the talking is ``LLM.stream_chat``'s.

Works from a pipe as well: one message a line, no prompts are shown then, and the exit code is 1 if one was refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dmtd_errors.words import counted, reason
from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.cli.common import (
    EXIT_ERROR,
    BundleArgument,
    BundleOption,
    note,
    pick,
    printable,
)
from dmtd_runtime.cli.opening import open_llm
from dmtd_runtime.cli.options.backend import AnswerBackend
from dmtd_runtime.cli.options.sampling import ChatSampling, GivenSampling, bias_by_id
from dmtd_runtime.cli.options.serving import Turns
from dmtd_runtime.cli.options.template import TEMPLATE, GivenTemplate
from dmtd_runtime.errors import AbortedError, BackendError, DmtdError, RequestError
from dmtd_runtime.serving.options import ServingOptions

if TYPE_CHECKING:
    from dmtd_runtime.llm import LLM
    from dmtd_runtime.sampling.params import SamplingParams

QUOTES = '"""'
HELP = '''\
  /help                  these lines
  /system TEXT           set the system message and start over; without TEXT, show it
  /params                show the sampling options
  /params NAME=VALUE ... change them: /params temperature=0.7 top_p=0.9 stop=[".", "The end"]
  /save FILE             write the conversation as JSON
  /reset                 forget the conversation
  /exit                  leave (so does Ctrl-D)
  """                    starts and ends a message of several lines
  Ctrl-C                 stops an answer'''


@dataclass(slots=True, kw_only=True)
class Conversation:
    """What was said, and how to answer."""

    params: SamplingParams
    template: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, str]]:
        """All messages, the system's first."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns


class _LeaveError(Exception):
    """The user asked to leave."""


def chat(
    bundle: BundleArgument = None,
    model: BundleOption = None,
    system: Annotated[str | None, typer.Option(help="System message. By default the template's own.")] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Baseline: run every layer for every token. By default DMTD's cycles.")
    ] = False,
    template: TEMPLATE = GivenTemplate(),
    sampling: ChatSampling = GivenSampling(),
    backend: AnswerBackend = BackendOptions(),
    serving: Turns = ServingOptions(),
) -> None:
    """Talk to a bundle. /help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.

    Messages may come from a pipe, one a line.
    """
    directory = pick(bundle, model, "BUNDLE")
    with open_llm(directory, backend, serving, plain=plain) as llm:
        if llm.tokenizer is None or not llm.has_chat_template:
            missing = "tokenizer" if llm.tokenizer is None else "chat template"
            raise RequestError(f"this bundle has no {missing}, which chatting needs; use dmtd generate instead")
        params = sampling.over(llm.default_params, plain=plain)
        if not _talk(llm, Conversation(params=params, template=template.arguments(), system=system)):
            raise typer.Exit(EXIT_ERROR)


def _talk(llm: LLM, conversation: Conversation) -> bool:
    """Messages and commands until the end; False if a pipe held one that was refused."""
    interactive, good = sys.stdin.isatty(), True
    lines = _Lines(interactive)
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() its line editing and history)
        cycle = llm.manifest.cycle
        split = f"E{cycle.encoding_layers} T{cycle.thinking_layers} D{cycle.decoding_layers}"
        note(f"{split}, cycle of {cycle.cycle_length}. /help for commands.")
    while True:
        try:
            message = _read_message(lines)
            if message.startswith("/"):
                _command(message, conversation)
            elif message:
                _answer(llm, conversation, message)
        except (EOFError, _LeaveError):
            if interactive:
                note("")
            return good or interactive
        except KeyboardInterrupt:
            if not interactive:
                raise
            note("\n(Ctrl-D or /exit leaves)")
        except (AbortedError, BackendError):
            raise  # the engine is gone
        except _InputError as error:
            if not interactive:  # where the next message begins is not known
                raise RequestError(str(error)) from None
            note(f"error: {error}")
        except DmtdError as error:
            note(f"error: {error}")
            good = False


class _InputError(Exception):
    """Lines that make no message."""


class _Lines:
    """What is typed, or comes from a pipe, line by line."""

    def __init__(self, interactive: bool) -> None:
        self._interactive = interactive
        self.count = 0

    def read(self, prompt: str) -> str:
        """The next line without its break; EOFError at the end."""
        self.count += 1
        try:
            if self._interactive:
                return input(prompt)
            line = sys.stdin.buffer.readline().decode("utf-8")
        except UnicodeDecodeError as error:
            where = "the line" if self._interactive else f"line {self.count} of stdin"
            raise _InputError(f"{where} is not UTF-8 at byte {error.start}; convert it, e.g. with iconv") from None
        if not line:
            raise EOFError
        return line.removesuffix("\n").removesuffix("\r")


def _read_message(lines: _Lines) -> str:
    """One message: a line, or several between triple quotes."""
    line = lines.read("> ").strip()
    if not line.startswith(QUOTES):
        return line
    text, first = line.removeprefix(QUOTES), lines.count
    while QUOTES not in text:
        try:
            text += "\n" + lines.read(". ")
        except EOFError:
            raise _InputError(
                f"the message that begins in line {first} was not said: its {QUOTES} is not closed; end it with {QUOTES}"
            ) from None
    text, _, behind = text.partition(QUOTES)
    if behind.strip():
        raise _InputError(f"got {behind.strip()[:60]!r} behind the closing {QUOTES}, expected the end of the line")
    return text.strip()


def _answer(llm: LLM, conversation: Conversation, message: str) -> None:
    """Stream the answer; Ctrl-C keeps what has been said."""
    asked = {"role": "user", "content": message}
    # Made before the message counts as said: one that is refused (too long, say) leaves the conversation as it was.
    messages = [*conversation.messages, asked]
    assert llm.tokenizer is not None, "chat begins only with a tokenizer"
    length = len(llm.tokenizer.encode(llm.render_chat(messages, **conversation.template), add_special_tokens=False))
    if conversation.turns and length >= llm.max_model_len:
        raise RequestError(
            f"the conversation is full: {length} tokens with this message, the model takes {llm.max_model_len}; "
            "/reset starts over, /save FILE keeps it"
        )
    stream = llm.stream_chat(messages, conversation.params, **conversation.template)
    text, count, stopped, finish = "", 0, False, None
    first, first_count, last = 0.0, 0, 0.0
    try:
        for delta in stream:
            if not count:
                first, first_count = delta.at_s, len(delta.token_ids)
            last = delta.at_s
            count += len(delta.token_ids)
            finish = delta.finish_reason or finish
            text += delta.text
            typer.echo(printable(delta.text), nl=False)
            sys.stdout.flush()
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        stopped = True
    finally:
        stream.close()  # cancels the request if it still runs
    seconds = last - first
    typer.echo()
    conversation.turns += [asked, {"role": "assistant", "content": text}]
    if sys.stderr.isatty():
        rate = f"{(count - first_count) / seconds:.1f} tok/s, " if seconds > 0 else ""
        end = "stopped" if stopped else {"length": "cut at the length limit"}.get(finish or "", "")
        typer.secho(
            f"[{counted(count, 'token')}, {rate}first after {first * 1e3:.0f} ms{', ' + end if end else ''}]",
            err=True,
            dim=True,
        )


def _command(line: str, conversation: Conversation) -> None:
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name in ("/exit", "/quit"):
        raise _LeaveError
    if name == "/help":
        note(HELP)
    elif name == "/reset":
        conversation.turns.clear()
        note("(forgotten)")
    elif name == "/system":
        if argument:
            conversation.system = argument
            conversation.turns.clear()
        note(f"(system: {conversation.system or 'none'})")
    elif name == "/params":
        if argument:
            conversation.params = change_params(conversation.params, argument)
        note("\n".join(f"  {word}" for word in params_words(conversation.params)))
    elif name == "/save":
        _save(conversation, argument)
    else:
        raise RequestError(f"{name}: no such command; /help lists them")


def params_words(params: SamplingParams) -> list[str]:
    """``NAME=VALUE`` of every option, as ``change_params`` reads it."""
    return [f"{name}={json.dumps(getattr(params, name), ensure_ascii=False)}" for name in _changeable(params)]


def change_params(params: SamplingParams, text: str) -> SamplingParams:
    """Sampling options changed by ``NAME=VALUE`` words; a value is JSON, or one word, and ``none`` unsets.

    Raises:
        RequestError: an unknown name, or a value that does not fit.
    """
    known, changes, at = _changeable(params), {}, 0
    while text[at:].strip():
        found = _NAME.match(text, at)
        name = found[1].replace("-", "_") if found else ""
        if found is None or name not in known:
            word = text[at:].split()[0]
            raise RequestError(f"/params: got {word!r}, expected NAME=VALUE with one of {', '.join(known)}")
        changes[name], at = _value(text, found.end())
    if changes.get("logit_bias") is not None:
        changes["logit_bias"] = bias_by_id(changes["logit_bias"])
    return replace(params, **changes)


_NAME = re.compile(r"\s*([\w-]+)=")
_WORD = re.compile(r"\S*")


def _changeable(params: SamplingParams) -> list[str]:
    return sorted(f.name for f in fields(params) if f.name != "n")


def _value(text: str, start: int) -> tuple[Any, int]:
    """The value that begins there, and where it ends."""
    word = _WORD.match(text, start)
    assert word is not None, "the pattern matches nothing too"
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
        if end == len(text) or text[end].isspace():
            return value, end
    except ValueError:
        pass
    if word[0][:1] in ("[", "{", '"'):
        raise RequestError(f'/params: got {text[start:][:60]!r}, expected JSON such as ["a b"] or {{"50": -100}}')
    return None if word[0].lower() == "none" else word[0], word.end()


def _is_conversation(path: Path) -> bool:
    try:
        return set(json.loads(path.read_text(encoding="utf-8"))) == {"messages"}
    except (OSError, ValueError, TypeError):
        return False


def _save(conversation: Conversation, name: str) -> None:
    """Write beside the file, then take its place: an old one is never half overwritten."""
    if not name:
        raise RequestError("/save: no file named; write /save FILE")
    path = Path(name).expanduser()
    if path.exists() and not _is_conversation(path):
        raise RequestError(f"/save: {path} exists and is no saved conversation; name another file")
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(
            json.dumps({"messages": conversation.messages}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )
        partial.replace(path)
    except OSError as error:
        raise RequestError(f"/save: {path} cannot be written ({reason(error)}); name another file") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    note(f"(saved to {path})")
