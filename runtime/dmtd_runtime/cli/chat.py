"""``dmtd chat``: a conversation in the terminal. Reading lines and commands; the talking is ``LLM.stream_chat``'s.

Works from a pipe as well: one message a line, no prompts are shown then.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.cli.common import (
    BundleArgument,
    BundleOption,
    note,
    pick,
    printable,
)
from dmtd_runtime.cli.opening import open_llm
from dmtd_runtime.cli.options.backend import AnswerBackend
from dmtd_runtime.cli.options.sampling import ChatSampling, GivenSampling
from dmtd_runtime.cli.options.serving import Turns
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
  /params NAME=VALUE ... change them: /params temperature=0.7 top_p=0.9 stop=["."]
  /save FILE             write the conversation as JSON
  /reset                 forget the conversation
  /exit                  leave (so does Ctrl-D)
  """                    starts and ends a message of several lines
  Ctrl-C                 stops an answer'''


@dataclass(slots=True, kw_only=True)
class Conversation:
    """What was said, and how to answer."""

    params: SamplingParams
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
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Every layer for every token: the baseline.")] = False,
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
        params = sampling.over(llm.default_params)
        _talk(llm, Conversation(params=params, system=system))


def _talk(llm: LLM, conversation: Conversation) -> None:
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() its line editing and history)
        cycle = llm.manifest.cycle
        split = f"E{cycle.encoding_layers} T{cycle.thinking_layers} D{cycle.decoding_layers}"
        note(f"{split}, cycle of {cycle.cycle_length}. /help for commands.")
    while True:
        try:
            message = _read_message(interactive)
            if message.startswith("/"):
                _command(message, conversation)
            elif message:
                _answer(llm, conversation, message)
        except (EOFError, _LeaveError):
            if interactive:
                note("")
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            note("\n(Ctrl-D or /exit leaves)")
        except (AbortedError, BackendError):
            raise  # the engine is gone
        except DmtdError as error:
            note(f"error: {error}")


def _read_message(interactive: bool) -> str:
    """One message: a line, or several between triple quotes."""
    line = _read_line("> " if interactive else "").strip()
    if not line.startswith(QUOTES):
        return line
    text = line.removeprefix(QUOTES)
    while QUOTES not in text:
        text += "\n" + _read_line(". " if interactive else "")
    return text[: text.index(QUOTES)].strip()


def _read_line(prompt: str) -> str:
    if prompt:
        return input(prompt)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def _answer(llm: LLM, conversation: Conversation, message: str) -> None:
    """Stream the answer; Ctrl-C keeps what has been said."""
    asked = {"role": "user", "content": message}
    # Made before the message counts as said: one that is refused (too long, say) leaves the conversation as it was.
    messages = [*conversation.messages, asked]
    assert llm.tokenizer is not None, "chat begins only with a tokenizer"
    length = len(llm.tokenizer.encode(llm.render_chat(messages), add_special_tokens=False))
    if conversation.turns and length >= llm.max_model_len:
        raise RequestError(
            f"the conversation is full: {length} tokens with this message, the model takes {llm.max_model_len}; "
            "/reset starts over, /save FILE keeps it"
        )
    stream = llm.stream_chat(messages, conversation.params)
    text, count, stopped, reason = "", 0, False, None
    first, first_count, last = 0.0, 0, 0.0
    try:
        for delta in stream:
            if not count:
                first, first_count = delta.at_s, len(delta.token_ids)
            last = delta.at_s
            count += len(delta.token_ids)
            reason = delta.finish_reason or reason
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
        end = "stopped" if stopped else {"length": "cut at the length limit"}.get(reason or "", "")
        typer.secho(
            f"[{count} tokens, {rate}first after {first * 1e3:.0f} ms{', ' + end if end else ''}]",
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
        note("\n".join(f"  {f.name}={getattr(conversation.params, f.name)!r}" for f in fields(conversation.params)))
    elif name == "/save":
        _save(conversation, argument)
    else:
        note(f"error: {name}: no such command; /help lists them")


def change_params(params: SamplingParams, text: str) -> SamplingParams:
    """Sampling options changed by ``NAME=VALUE`` words; a value is JSON, ``none`` unsets.

    Raises:
        RequestError: an unknown name, or a value that does not fit.
    """
    known = {f.name for f in fields(params)} - {"n"}
    changes: dict[str, object] = {}
    for word in text.split():
        name, equals, value = word.partition("=")
        name = name.replace("-", "_")
        if not equals or name not in known:
            raise RequestError(f"/params: got {word!r}, expected NAME=VALUE with one of {', '.join(sorted(known))}")
        try:
            changes[name] = None if value.lower() == "none" else json.loads(value)
        except ValueError:
            changes[name] = value
    return replace(params, **changes)  # type: ignore[arg-type]


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
        raise RequestError(f"/save: {path} cannot be written ({error.strerror}); name another file") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    note(f"(saved to {path})")
