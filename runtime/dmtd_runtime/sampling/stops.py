"""When a sequence ends, and which text may be handed out meanwhile: ``StopRules``.

Flow: chosen token -> ``StopRules.push`` -> ``StopStep`` (text for the client, finish reason) -> next step or the end.
The rules, after each token:

1. A stop string completed by the text so far ends the sequence with ``"stop"``. Of several, the one whose last
   character comes first; of those that end together, the longest.
2. An end-of-sequence id (unless ``ignore_eos``) or one of ``stop_token_ids`` ends it with ``"stop"``; the token's own
   text is left out unless ``include_stop_str_in_output``.
   A form (grammar.py) that is complete ends it too, with ``"stop"`` and no stop reason, however few tokens there are.
3. ``max_tokens``, or the room that the model's length leaves, ends it with ``"length"``.
4. Rules 1 and 2 sleep for the first ``min_tokens`` tokens.
5. Text that could be the beginning of a stop string is held back until it is clear that it is not, so the pieces handed
   out never hold a part of a stop string that ended the sequence.

It chooses no token, and runs no model; cancelled requests and deadlines are the engine's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from dmtd_runtime.errors import RequestError
from dmtd_runtime.sampling.params import SamplingParams


class TextSource(Protocol):
    """What turns tokens into text piece by piece: ``tokenizer.TextStream``."""

    def push(self, token_id: int) -> str:
        """Takes the next token and gives the text it completes."""

    def flush(self) -> str:
        """Gives what is left at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopStep:
    """What one token led to.

    Attributes:
        text: New text that is safe to hand out; all steps together are the whole text.
        finish_reason: None while the sequence goes on.
        stop_reason: The stop string or the token id that ended it; None for ``"length"``.
    """

    text: str = ""
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: str | int | None = None


class StopRules:
    """Decides the end of one sequence."""

    def __init__(
        self,
        params: SamplingParams,
        *,
        eos_token_ids: Sequence[int] = (),
        room: int | None = None,
        text: TextSource | None = None,
    ) -> None:
        """Makes the rules of one sequence.

        Args:
            params: The request's options.
            eos_token_ids: The model's end-of-sequence ids.
            room: Tokens that the model's length leaves after the prompt, at least 1; None: no such limit.
            text: A fresh stream; None where the bundle has no tokenizer (the text is then empty).

        Raises:
            RequestError: Stop strings without a tokenizer.
        """
        if text is None and params.stop_strings:
            raise RequestError(
                "got stop strings, but the bundle has no tokenizer to make text; use stop_token_ids instead",
                param="stop",
            )
        assert room is None or room >= 1, f"room for at least one token, got {room}"
        limits = [limit for limit in (params.max_tokens, room) if limit is not None]
        self._limit = min(limits) if limits else None
        self._min_tokens = params.min_tokens
        self._end_ids = frozenset((*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)))
        self._include_stop = params.include_stop_str_in_output
        self._text = text
        self._matcher = StopStringMatcher(params.stop_strings, include=params.include_stop_str_in_output)
        self._num_tokens = 0
        self._finished = False

    @property
    def num_tokens(self) -> int:
        """Tokens pushed so far, the ending one included."""
        return self._num_tokens

    @property
    def remaining(self) -> int | None:
        """Tokens that may still follow; None where nothing limits them."""
        return None if self._limit is None else self._limit - self._num_tokens

    @property
    def finished(self) -> bool:
        """Whether the sequence has ended."""
        return self._finished

    def push(self, token_id: int, *, complete: bool = False) -> StopStep:
        """Takes the next token.

        Args:
            token_id: As chosen.
            complete: Whether nothing may follow it: the answer has the form that was asked for.

        Returns:
            The text to hand out, and the reason if this token ended the sequence.
        """
        assert not self._finished, "no token follows the end of a sequence"
        self._num_tokens += 1
        awake = complete or self._num_tokens > self._min_tokens
        ends_by_id = awake and token_id in self._end_ids
        self._finished = ends_by_id or complete or self._num_tokens == self._limit
        text, matched = self._next_text(token_id, shown=self._include_stop or not ends_by_id, awake=awake)
        if matched is not None:
            self._finished = True
            return StopStep(text=text, finish_reason="stop", stop_reason=matched)
        if ends_by_id:
            return StopStep(text=text, finish_reason="stop", stop_reason=token_id)
        if complete:
            return StopStep(text=text, finish_reason="stop")
        return StopStep(text=text, finish_reason="length" if self._finished else None)

    def flush(self) -> str:
        """Ends the sequence from outside (cancelled, out of time).

        Returns:
            The text that was held back.
        """
        if self._finished or self._text is None:
            self._finished = True
            return ""
        self._finished = True
        text, matched = self._matcher.push(self._text.flush(), active=self._num_tokens > self._min_tokens)
        return text if matched is not None else text + self._matcher.release()

    def _next_text(self, token_id: int, *, shown: bool, awake: bool) -> tuple[str, str | None]:
        if self._text is None:
            return "", None
        piece = self._text.push(token_id) if shown else ""
        if self._finished:
            piece += self._text.flush()
        text, matched = self._matcher.push(piece, active=awake)
        if self._finished and matched is None:
            text += self._matcher.release()
        return text, matched


class StopStringMatcher:
    """Finds stop strings in text that comes in pieces; how the text is cut into pieces changes nothing."""

    def __init__(self, strings: Sequence[str], *, include: bool = False) -> None:
        """Makes a matcher.

        Args:
            strings: Stop strings, none of them empty.
            include: Whether the text that is given back holds the stop string.
        """
        self._prefixes = [_PrefixState(string) for string in dict.fromkeys(strings)]
        self._include = include
        self._held = ""

    def push(self, piece: str, *, active: bool = True) -> tuple[str, str | None]:
        """Takes the next piece.

        Args:
            piece: Text that follows what was pushed before.
            active: Whether a stop string that ends in this piece counts.

        Returns:
            Text that is safe to hand out, and the stop string if one was found (the rest of the piece is then dropped).
        """
        if not self._prefixes:
            return piece, None
        buffer = self._held + piece
        for index in range(len(self._held), len(buffer)):
            char = buffer[index]
            found = ""
            for prefix in self._prefixes:
                if prefix.push(char) and len(prefix.string) > len(found):
                    found = prefix.string
            if found and active:
                self._held = ""
                end = index + 1
                return buffer[: end if self._include else end - len(found)], found
        safe = len(buffer) - max(prefix.length for prefix in self._prefixes)
        self._held = buffer[safe:]
        return buffer[:safe], None

    def release(self) -> str:
        """Gives the text that was held back, at the end of the sequence."""
        held, self._held = self._held, ""
        return held


class _PrefixState:
    """The longest beginning of one string that the text so far ends with (Knuth, Morris, Pratt).

    The table of borders grows with the longest beginning seen, so a long stop string costs nothing until it is matched.
    """

    __slots__ = ("_borders", "length", "string")

    def __init__(self, string: str) -> None:
        self.string = string
        self.length = 0
        self._borders = [0]  # of string[: i + 1]: its longest proper beginning that is also its end

    def push(self, char: str) -> bool:
        """Takes one character; True if it completes the string, whose longest border then stays as the state."""
        string, borders, length = self.string, self._borders, self.length
        while length and string[length] != char:
            length = borders[length - 1]
        if string[length] == char:
            length += 1
            if len(borders) < length:
                self._grow()
        if length == len(string):
            self.length = borders[length - 1]
            return True
        self.length = length
        return False

    def _grow(self) -> None:
        char = self.string[len(self._borders)]
        border = self._borders[-1]
        while border and self.string[border] != char:
            border = self._borders[border - 1]
        self._borders.append(border + (self.string[border] == char))
