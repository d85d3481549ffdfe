"""Prompts of a serving load from a file of JSON lines, in the shapes that benchmarks of servers share.

A line is ShareGPT's ``{"conversations": [{"from": "human", "value": TEXT}, {"from": "gpt", "value": TEXT}, ...]}``, of which the
first turn is the prompt and the second says how many tokens to generate, or ``{"prompt": TEXT or token ids, "max_tokens": N}``;
``output_len`` means the same as ``max_tokens``, and without either the number is the caller's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmtd_errors.words import reason, shown
from dmtd_runtime.bench.load import LoadRequest
from dmtd_runtime.errors import RequestError
from dmtd_runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Requests in the order of their lines; ``left_out`` lines are longer than the model."""

    requests: tuple[LoadRequest, ...]
    left_out: int


def read_dataset(
    path: Path, tokenizer: Tokenizer | None, *, vocab_size: int, max_model_len: int, max_tokens: int
) -> Dataset:
    """Read all lines.

    Raises:
        RequestError: the file cannot be read, a line is none of the above, or none fits the model.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read as text: {reason(error)}", param="dataset") from None
    found = [
        _Line(f"{path}, line {number}", tokenizer, vocab_size).request(line, max_tokens)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    fitting = tuple(request for request in found if request.total_len <= max_model_len)
    if not fitting:
        raise RequestError(
            f"{path}: got {len(found)} prompts, expected at least one that fits {max_model_len} tokens with its answer",
            param="dataset",
        )
    return Dataset(requests=fitting, left_out=len(found) - len(fitting))


@dataclass(frozen=True, slots=True)
class _Line:
    place: str
    tokenizer: Tokenizer | None
    vocab_size: int

    def request(self, text: str, max_tokens: int) -> LoadRequest:
        try:
            line = json.loads(text)
        except ValueError as error:
            raise self._error(f"got no JSON ({reason(error)}), expected an object a line") from None
        if isinstance(line, dict) and "conversations" in line:
            return self._of_conversation(line["conversations"])
        if isinstance(line, dict) and "prompt" in line:
            ids = self._ids(line["prompt"])
            return LoadRequest(prompt_ids=ids, max_tokens=self._wanted(line, max_tokens))
        raise self._error('got neither "conversations" nor "prompt", expected an object with one of them')

    def _of_conversation(self, turns: Any) -> LoadRequest:
        if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns[:2]):
            raise self._error('conversations: got no prompt with an answer, expected turns of {"from", "value"}')
        prompt, answer = (self._ids(turn.get("value")) for turn in turns[:2])
        return LoadRequest(prompt_ids=prompt, max_tokens=len(answer))

    def _ids(self, prompt: Any) -> tuple[int, ...]:
        if isinstance(prompt, list):
            if not prompt or not all(type(each) is int and 0 <= each < self.vocab_size for each in prompt):
                raise self._error(f"got a list, expected token ids from 0 to {self.vocab_size - 1}, at least one")
            return tuple(prompt)
        if not isinstance(prompt, str) or not prompt.strip():
            raise self._error(f"got {shown(prompt)} for a text, expected words or a list of token ids")
        if self.tokenizer is None:
            raise self._error("got text, and the bundle has no tokenizer; give token ids")
        return tuple(self.tokenizer.encode(prompt))

    def _wanted(self, line: Mapping[str, Any], default: int) -> int:
        wanted = line.get("max_tokens", line.get("output_len", default))
        if type(wanted) is not int or wanted < 1:
            raise self._error(f"max_tokens: got {shown(wanted)}, expected a whole number of at least 1")
        return wanted

    def _error(self, problem: str) -> RequestError:
        return RequestError(f"{self.place}: {problem}", param="dataset")
