"""A checkpoint's tokenizer and chat template for training text: ``TextTokenizer``. Needs tokenizers, and transformers for chats.

Flow: ``open_checkpoint(path).assets()`` -> ``TextTokenizer`` -> ``examples.py`` cuts what it encodes.
Encoding is tokenizers' own over tokenizer.json, as in the runtime; templates run in transformers' jinja sandbox.
Nothing here chooses lengths or checks roles.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dmtd_errors.native import NativePanicError, call_native
from dmtd_models.checkpoints.checkpoint import Checkpoint
from dmtd_models.checkpoints.hf_tokenizer import named_tokens
from dmtd_models.data.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TextTokenizer:
    """Text and chats to token ids."""

    def __init__(self, assets: Mapping[str, bytes], *, vocab_size: int, problem: str | None = None) -> None:
        """Reads a checkpoint's files.

        Args:
            assets: tokenizer.json and, where there is one, chat_template.jinja and tokenizer_config.json, by name.
            vocab_size: rows of the model's embedding: every id must be below it.
            problem: why there is no tokenizer.json, in one line.

        Raises:
            DataError: no tokenizer, or one that the model is too small for.
        """
        from tokenizers import Tokenizer

        source = assets.get("tokenizer.json")
        if source is None:
            why = problem or "no tokenizer.json in the checkpoint"
            raise DataError(f"tokenizer: {why}; put the model's tokenizer.json into its directory")
        try:
            self.tokenizer: Tokenizer = call_native(Tokenizer.from_str, source.decode("utf-8"), quiet=True)
            config = json.loads(assets.get("tokenizer_config.json", b"{}"))
        except Exception as error:  # tokenizers raises a bare Exception
            raise DataError(f"tokenizer: cannot be read ({error}); take the model's files anew") from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.vocab_size = vocab_size
        template = assets.get("chat_template.jinja")
        self._template = template.decode("utf-8") if template else _default_template(config.get("chat_template"))
        self._special = named_tokens(config)
        parts = (source, (self._template or "").encode(), json.dumps(self._special, sort_keys=True).encode())
        self.fingerprint = hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
        """SHA-256 of all that the ids depend on."""
        added = self.tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(number for number, token in added.items() if token.special)
        """Ids of special tokens (begin, end, role marks)."""
        self._special_texts = tuple(token.content for token in added.values() if token.special)

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> TextTokenizer:
        """The tokenizer and template that a checkpoint carries."""
        return cls(checkpoint.assets(), vocab_size=checkpoint.config.vocab_size, problem=checkpoint.tokenizer_problem)

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of plain documents, with the special tokens that tokenizer.json adds (a BOS, say)."""
        return [self._checked(encoding.ids) for encoding in _on_text(self.tokenizer.encode_batch, list(texts))]

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of rendered chat text, which has its special tokens already."""
        return self._checked(_on_text(self.tokenizer.encode, text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return str(_on_text(self.tokenizer.decode, list(ids), skip_special_tokens=True))

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """The chat as the model's template writes it.

        Raises:
            DataError: no template, or one that refuses these messages.
        """
        if self._template is None:
            raise DataError(
                "chat template: the checkpoint has none, so chats cannot be rendered; "
                "put the model's chat_template.jinja into its directory, or give `text` documents"
            )
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, _ = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                chat_template=self._template,
                add_generation_prompt=add_generation_prompt,
                **self._special,
            )
        except Exception as error:  # a template may fail in any way that an expression can
            line = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"chat template: refuses this chat ({line}); check its roles and their order") from error
        return str(rendered[0])

    def without_tail(self, text: str) -> str:
        """Rendered text without the white space that a template writes after the closing special token."""
        stripped = text.rstrip()
        return stripped if stripped.endswith(self._special_texts) else text

    def _checked(self, ids: list[int]) -> list[int]:
        if ids and max(ids) >= self.vocab_size:
            raise DataError(
                f"tokenizer: got id {max(ids)}, expected ids below the model's {self.vocab_size}; "
                "the tokenizer and the weights are not of one model"
            )
        return ids


class NoTokenizer(TextTokenizer):
    """In the place of a tokenizer that is missing: enough for records of token ids, and text is refused."""

    def __init__(self, vocab_size: int, error: DataError) -> None:
        """``error``: what is raised for text."""
        self.vocab_size = vocab_size
        self._error = error

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Raises."""
        raise self._error

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """Raises."""
        raise self._error


def _on_text(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call of the library; what it says of its own file is one line."""
    try:
        return call_native(function, *args, **kwargs)
    except Exception as error:
        if type(error) not in (Exception, NativePanicError):  # the library raises nothing more precise
            raise
        raise DataError(f"tokenizer: fails on this text ({error}); take the model's files anew") from error


def _default_template(value: object) -> str | None:
    """``chat_template`` of tokenizer_config.json: a text, or a list of named ones."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None
