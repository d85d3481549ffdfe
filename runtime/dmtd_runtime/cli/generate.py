"""``dmtd generate``: one prompt, its text streamed to stdout, one closing line of figures on stderr."""

from __future__ import annotations

import json as json_text
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dmtd_errors.words import counted, reason
from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.cli.common import (
    BundleArgument,
    BundleOption,
    JsonOption,
    note,
    pick,
    printable,
)
from dmtd_runtime.cli.opening import open_llm
from dmtd_runtime.cli.options.backend import AnswerBackend
from dmtd_runtime.cli.options.sampling import GenerateSampling, GivenSampling, parse_ids
from dmtd_runtime.cli.options.serving import OnePrompt
from dmtd_runtime.cli.options.template import TEMPLATE, GivenTemplate
from dmtd_runtime.errors import RequestError
from dmtd_runtime.serving.options import ServingOptions
from dmtd_runtime.serving.outputs import Delta

if TYPE_CHECKING:
    from dmtd_runtime.llm import LLM
    from dmtd_runtime.sampling.params import SamplingParams


@dataclass(slots=True, kw_only=True)
class Answer:
    """What came of a prompt, and the times of it; ``full_passes`` and what follows are the decoding's."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_tokens: int = 0
    first_token_s: float | None = None
    total_s: float = 0.0
    decode_tok_per_s: float | None = None
    full_passes: int = 0
    late_steps: int = 0
    dropped_tokens: int = 0
    tokens_per_full_pass: float | None = None

    def closing_line(self) -> str:
        """Figures for a person."""
        parts = [counted(len(self.token_ids), "token")]
        if self.decode_tok_per_s is not None:
            parts.append(f"{self.decode_tok_per_s:.1f} tok/s")
        if self.first_token_s is not None:
            parts.append(f"first token {self.first_token_s * 1e3:.0f} ms ({self.prompt_tokens} of prompt)")
        if self.tokens_per_full_pass is not None:
            passes = counted(self.full_passes, "full pass", "full passes")
            parts.append(f"{passes}, {self.tokens_per_full_pass:.2f} tokens each")
        if self.dropped_tokens:
            parts.append(f"{self.dropped_tokens} of {counted(self.late_steps, 'late step')} dropped")
        return f"[{' | '.join(parts)} | ended by {self.finish_reason or 'interruption'}]"


def generate(
    bundle: BundleArgument = None,
    model: BundleOption = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            help="The prompt. With -, or without any, it is read from stdin, less its last line break.",
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="A file that holds the prompt, in UTF-8, less its last line break.")
    ] = None,
    token_ids: Annotated[str | None, typer.Option(help="The prompt as token ids, such as 1,2,3.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Take the prompt as it stands. By default it is put into the chat template.")
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="System message, for the chat template. By default the template's own.")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Baseline: run every layer for every token. By default DMTD's cycles.")
    ] = False,
    template: TEMPLATE = GivenTemplate(),
    sampling: GenerateSampling = GivenSampling(),
    timeout_s: Annotated[
        float | None, typer.Option("--timeout", help="Seconds after which the answer is cut. By default never.")
    ] = None,
    backend: AnswerBackend = BackendOptions(),
    serving: OnePrompt = ServingOptions(prefix_cache_bytes=0),
    json: JsonOption = False,
) -> None:
    """Generate text for a prompt; it appears as it is made.

    A bundle with a chat template answers the prompt as a user's message, unless --raw is given.

    A bundle without a tokenizer takes --token-ids and prints token ids.
    """
    directory = pick(bundle, model, "BUNDLE")
    asked = _read_prompt(prompt, prompt_file, parse_ids(token_ids, "token_ids"))
    with open_llm(directory, backend, serving, plain=plain) as llm:
        params = sampling.over(llm.default_params, plain=plain)
        ids = _prompt_ids(llm, asked, raw=raw, system=system, template=template)
        try:
            answer = _run(llm, ids, params, timeout_s, show=not json)
        except RequestError as error:
            if isinstance(asked, list) and error.param == "prompt":
                raise RequestError(error.problem, param="token_ids") from None
            raise
    if json:
        typer.echo(json_text.dumps({"schema": 1, "plain": plain, **asdict(answer)}))
    else:
        note(answer.closing_line())


def _read_prompt(prompt: str | None, file: Path | None, ids: list[int] | None) -> str | list[int]:
    if sum(source is not None for source in (prompt, file, ids)) > 1:
        raise typer.BadParameter("give one of --prompt, --prompt-file and --token-ids")
    if ids is not None:
        return ids
    if file is not None:
        try:
            return _without_last_break(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(
                f"{file} cannot be read ({reason(error)}); name a UTF-8 text file", param="prompt_file"
            ) from None
    if prompt is not None and prompt != "-":
        return prompt
    if sys.stdin.isatty() and prompt is None:
        raise typer.BadParameter("no prompt: give --prompt, --prompt-file or --token-ids, or write it to stdin")
    try:
        return _without_last_break(sys.stdin.buffer.read().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError(
            f"stdin is not UTF-8 at byte {error.start}; convert it, e.g. with iconv", param="prompt"
        ) from None


def _without_last_break(text: str) -> str:
    """The text without the line break that `echo` and editors end it with; others are the prompt's own."""
    return text[:-1].removesuffix("\r") if text.endswith("\n") else text


def _prompt_ids(
    llm: LLM, asked: str | list[int], *, raw: bool, system: str | None, template: GivenTemplate
) -> list[int]:
    """The prompt as the model gets it, in token ids, so that its length can be told."""
    if isinstance(asked, list):
        return asked
    if not (asked if raw else asked.strip()):
        raise RequestError("got an empty prompt, expected text; give it with -p or on stdin", param="prompt")
    if llm.tokenizer is None:
        raise RequestError("this bundle has no tokenizer: give --token-ids 1,2,3 instead of text")
    if raw or not llm.has_chat_template:
        if system is not None:
            raise RequestError("needs a chat template and no --raw; put it into the prompt instead", param="system")
        if template != GivenTemplate():
            name = "tools" if template.tools else "chat_template_kwargs"
            raise RequestError("needs a chat template and no --raw; leave it out", param=name)
        return llm.tokenizer.encode(asked)
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": asked})
    return llm.tokenizer.encode(llm.render_chat(messages, **template.arguments()), add_special_tokens=False)


def _run(llm: LLM, ids: list[int], params: SamplingParams, timeout_s: float | None, *, show: bool) -> Answer:
    answer = Answer(prompt_tokens=len(ids))
    start = time.perf_counter()
    first: Delta | None = None
    last_s = 0.0
    pieces = llm.stream(ids, params, timeout_s=timeout_s)
    for delta in pieces:
        if delta.token_ids:
            first, last_s = first or delta, delta.at_s
        if show:
            _show(llm, delta, first=delta is first)
        _take(answer, delta)
    answer.total_s = time.perf_counter() - start
    if show:
        typer.echo()
    if first is not None:
        answer.first_token_s = first.at_s
        metrics = pieces.result().metrics
        answer.full_passes, answer.late_steps = metrics.full_passes, metrics.late_steps
        answer.dropped_tokens, answer.tokens_per_full_pass = metrics.dropped_tokens, metrics.tokens_per_full_pass
        if last_s > first.at_s:
            answer.decode_tok_per_s = (len(answer.token_ids) - len(first.token_ids)) / (last_s - first.at_s)
    return answer


def _take(answer: Answer, delta: Delta) -> None:
    answer.text += delta.text
    answer.token_ids += delta.token_ids
    if delta.finish_reason is not None:
        answer.finish_reason, answer.stop_reason = delta.finish_reason, delta.stop_reason


def _show(llm: LLM, delta: Delta, *, first: bool) -> None:
    text = delta.text
    if llm.tokenizer is None and delta.token_ids:
        text = ("" if first else " ") + " ".join(map(str, delta.token_ids))
    if text:
        typer.echo(printable(text), nl=False)
        sys.stdout.flush()
