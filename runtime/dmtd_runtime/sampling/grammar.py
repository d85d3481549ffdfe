"""Which tokens may come next, where an answer must have a form: ``GrammarCompiler``, over llguidance.

Flow: ``StructuredOutputs`` -> ``GrammarCompiler.compile``, in the caller's thread -> ``Grammar`` -> for each sequence one
``GrammarState``, in the worker's -> the mask of ``Sampler``. The library (extra ``structured``) is loaded when first asked for.
What cannot be compiled, or not be enforced to the letter, is refused before anything starts.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from dmtd_runtime.errors import DmtdError, MissingExtraError, RequestError
from dmtd_runtime.sampling.structured import JSON_OPTIONS, PARAM, StructuredOutputs

if TYPE_CHECKING:
    import llguidance

# What bounds time and memory in the library: some 0.4 s and 100 MB for the worst of a compilation.
_LIMITS = {"initial_lexer_fuel": 300_000, "step_lexer_fuel": 50_000, "max_lexer_states": 30_000}


class TokenizerFile(Protocol):
    """What the library reads: ``tokenizer.Tokenizer``."""

    @property
    def vocab_size(self) -> int:
        """One past the largest id."""

    def to_json(self) -> str:
        """tokenizer.json's text, without padding and truncation."""


class GrammarCompiler:
    """Compiles for one bundle. The library's form of the tokenizer is made once, when first needed. Thread-safe."""

    def __init__(self, tokenizer: TokenizerFile | None, *, vocab_size: int, eos_token_ids: Sequence[int] = ()) -> None:
        """Remembers the tokenizer.

        Args:
            tokenizer: None where the bundle has none.
            vocab_size: Number of logits in a row. Those beyond the tokenizer's ids are never allowed.
            eos_token_ids: What may follow a complete answer.
        """
        self._source, self._vocab_size = tokenizer, vocab_size
        self._eos_token_ids = [token_id for token_id in eos_token_ids if 0 <= token_id < vocab_size]
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._lock = threading.Lock()

    def compile(self, wanted: StructuredOutputs) -> Grammar:
        """Compile; takes milliseconds as a rule, and under a second.

        Raises:
            RequestError: It cannot be compiled or enforced, or the bundle has no tokenizer.
            MissingExtraError: llguidance is not installed.
        """
        library = _library()
        tokenizer = self._made_tokenizer(library)
        with _refusing():
            limits = library.LLParserLimits(verbose_errors=False, **_LIMITS)
            matcher = library.LLMatcher(tokenizer, _grammar_text(wanted), log_level=0, limits=limits)
            state = GrammarState(matcher, self._vocab_size)
            _check(matcher)
            if warnings := matcher.get_grammar_warnings():
                raise _refused("; ".join(warnings))
            if not state.allowed().any():
                raise _refused("it allows no text at all")
        return Grammar(matcher, self._vocab_size)

    def _made_tokenizer(self, library: ModuleType) -> llguidance.LLTokenizer:
        if self._source is None:
            raise RequestError("this bundle has no tokenizer, without which tokens have no text", param=PARAM)
        with self._lock:
            if self._tokenizer is None:
                with _refusing():
                    self._tokenizer = library.LLTokenizer(
                        self._source.to_json(),
                        n_vocab=max(self._vocab_size, self._source.vocab_size),  # fewer ids it does not take
                        eos_token=self._eos_token_ids or None,
                    )
            return self._tokenizer


class Grammar:
    """A compiled form, for any number of sequences."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def start(self) -> GrammarState:
        """The state of a new sequence."""
        return GrammarState(self._matcher.deep_copy(), self._vocab_size)


class GrammarState:
    """How far one sequence has come. One thread at a time."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    @property
    def complete(self) -> bool:
        """Whether the answer is whole, and nothing may follow it."""
        return self._matcher.is_stopped()

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, bool [vocab]; end-of-sequence ids where the answer may end here.

        Raises:
            RequestError: The library's limits for a step.
        """
        with _refusing():
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            _check(self._matcher)
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)

    def observe(self, token_id: int) -> None:
        """Take the token that was chosen, an allowed one.

        Raises:
            RequestError: The library's limits for a step.
        """
        with _refusing():
            self._matcher.consume_token(token_id)
            _check(self._matcher)


def _grammar_text(wanted: StructuredOutputs) -> str:
    """The grammar in the library's own notation."""
    from llguidance import LLMatcher, grammar_from

    if wanted.schema_text is not None:
        return LLMatcher.grammar_from_json_schema(wanted.schema_text, overrides=JSON_OPTIONS)  # type: ignore[arg-type]
    if wanted.regex is not None:
        return LLMatcher.grammar_from_regex(wanted.regex)
    if wanted.choice is not None:
        return grammar_from("choice", json.dumps(wanted.choice))
    assert wanted.grammar is not None, "exactly one form is given"
    return grammar_from("grammar", wanted.grammar)


def _library() -> ModuleType:
    try:
        import llguidance
    except ImportError as error:
        raise MissingExtraError(
            f'{PARAM} needs llguidance, which cannot be imported ({error}); run: pip install "dmtd[structured]"'
        ) from None
    return llguidance


def _check(matcher: llguidance.LLMatcher) -> None:
    if matcher.is_error():
        raise _refused(matcher.get_error())


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Whatever the library raises is the request's fault, and ends nothing else; a panic of native code is no Exception."""
    try:
        yield
    except (DmtdError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise _refused(str(error) or type(error).__name__) from error


def _refused(reason: str) -> RequestError:
    line = " ".join(reason.replace("<non-verbose/>", "").split())
    line = line if len(line) <= 300 else line[:297] + "..."
    return RequestError(f"it cannot be enforced ({line}); change it, or leave it out", param=PARAM)
