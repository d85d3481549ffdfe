"""Text to token ids and back: ``Tokenizer`` over the bundle's tokenizer.json, ``TextStream`` for text as it grows.

Flow: prompt text -> ``Tokenizer.encode`` -> the model; chosen ids -> ``TextStream`` -> stops.py -> the client.
A bundle without tokenizer.json has no ``Tokenizer`` and works on token ids.

A prompt gets the special tokens (a BOS, say) that tokenizer.json adds. Text from a chat template has them already:
encode it with ``add_special_tokens=False``. Nothing here renders chats or looks for stop strings.
"""

import codecs
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers

from dmtd_errors.native import NativePanicError, call_native
from dmtd_runtime.errors import BundleError, RequestError
from dmtd_runtime.text.messages import whole_text
from dmtd_runtime.text.special_tokens import eos_token_ids_of, read_special_tokens, read_text

MAX_TOKENIZER_BYTES = 256 << 20
LONG_TEXT = 4000
"""Characters beyond which a text is encoded as a batch: the library then lets Python's other threads run meanwhile."""

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Tokenizer:
    """A tokenizer.json with what the files beside it say of special tokens. Safe to use from several threads."""

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        *,
        eos_token_ids: Sequence[int] = (),
        special_tokens: Mapping[str, str] = MappingProxyType({}),
        model_vocab_size: int | None = None,
    ) -> None:
        """Wraps a loaded tokenizer; ``from_directory`` is the usual way in.

        Args:
            core: The tokenizer; its truncation and padding are switched off.
            eos_token_ids: Ids that end a sequence.
            special_tokens: Named special tokens as text: ``bos_token``, ``eos_token``, ...
            model_vocab_size: Rows of the model's embedding: text that needs an id beyond them is refused. None: any id.
        """
        # Settings left from training would cut or fill prompts silently.
        core.no_truncation()
        core.no_padding()
        self._core = core
        self._model_vocab_size = model_vocab_size
        added = core.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._vocab_size = max([core.get_vocab_size(with_added_tokens=True), *(token_id + 1 for token_id in added)])
        self._eos_token_ids = tuple(eos_token_ids)
        self._special_tokens = special_tokens
        self._decoders = _decoder_types(core)

    @classmethod
    def from_directory(cls, path: str | Path, *, model_vocab_size: int | None = None) -> "Tokenizer | None":
        """Reads tokenizer.json, and the special tokens from the three config files beside it.

        Args:
            path: A bundle, or a Hugging Face model directory.
            model_vocab_size: As above.

        Returns:
            The tokenizer; None where there is no tokenizer.json.

        Raises:
            BundleError: A file is broken.
        """
        directory = Path(path)
        file = directory / "tokenizer.json"
        if not file.exists():
            return None
        text = read_text(file, MAX_TOKENIZER_BYTES)
        try:
            core = call_native(tokenizers.Tokenizer.from_str, text, quiet=True)
        except Exception as error:  # the library raises nothing more precise
            reason = " ".join(str(error).split())
            raise BundleError(f"{file}: not a usable tokenizer ({reason}); export the model again") from error
        special = read_special_tokens(directory)
        eos_token_ids = list(eos_token_ids_of(directory))
        if "eos_token" in special:
            eos_id = core.token_to_id(special["eos_token"])
            if eos_id is None:
                raise BundleError(
                    f"{directory / 'tokenizer_config.json'}: eos_token: got {special['eos_token']!r}, expected a token of "
                    "tokenizer.json; correct the file"
                )
            eos_token_ids.append(eos_id)
        return cls(
            core,
            eos_token_ids=tuple(dict.fromkeys(eos_token_ids)),
            special_tokens=special,
            model_vocab_size=model_vocab_size,
        )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a sequence: those of the model's configs and of ``eos_token``."""
        return self._eos_token_ids

    @property
    def bos_token_id(self) -> int | None:
        """The id of ``bos_token``, None where the model has none."""
        return None if self.bos_token is None else self._core.token_to_id(self.bos_token)

    @property
    def bos_token(self) -> str | None:
        """BOS as text."""
        return self._special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """EOS as text."""
        return self._special_tokens.get("eos_token")

    @property
    def vocab_size(self) -> int:
        """One past the largest id that stands for text; a model's logits may be a few more (padding)."""
        return self._vocab_size

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Turns text into token ids.

        Args:
            text: Any text; special tokens written out in it become special tokens.
            add_special_tokens: Whether tokenizer.json's own BOS / EOS are added; False for text from a chat template.

        Returns:
            Token ids, possibly none.

        Raises:
            RequestError: Not text, text with half a surrogate pair, or with a token that the model has no row for.
            BundleError: tokenizer.json fails on it.
        """
        if not isinstance(text, str):
            raise RequestError(f"got {type(text).__name__}, expected a string", param="prompt")
        whole_text(text, "prompt")
        try:
            if len(text) > LONG_TEXT:
                encode = self._core.encode_batch_fast
                [encoding] = call_native(encode, [text], add_special_tokens=add_special_tokens)
            else:
                encoding = call_native(self._core.encode, text, add_special_tokens=add_special_tokens)
            ids = list(encoding.ids)
        except Exception as error:  # the library raises nothing more precise: no token for a character, say
            raise RequestError(
                f"the tokenizer cannot encode it ({' '.join(str(error).split())}); leave out what it has no token for",
                param="prompt",
            ) from error
        if self._model_vocab_size is not None and max(ids, default=0) >= self._model_vocab_size:
            token_id = next(i for i in ids if i >= self._model_vocab_size)
            raise RequestError(
                f"got {self._core.id_to_token(token_id)!r}, token id {token_id} of the tokenizer, expected ids from 0 to "
                f"{self._model_vocab_size - 1}, which the model has; leave it out",
                param="prompt",
            )
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Turns token ids into text.

        Args:
            ids: Token ids; those that stand for no text (padding of the model's head) give none.
            skip_special_tokens: Whether special tokens are left out.

        Returns:
            The text; bytes that are not UTF-8 become U+FFFD.

        Raises:
            RequestError: A negative id, or one beyond 32 bits.
            BundleError: The library fails on them.
        """
        try:
            return str(_on_text(self._core.decode, list(ids), skip_special_tokens=skip_special_tokens))
        except OverflowError as error:
            raise RequestError(
                "token ids: got a negative id or one beyond 32 bits, expected ids of the model"
            ) from error

    def to_json(self) -> str:
        """tokenizer.json's text, without padding and truncation."""
        return str(self._core.to_str())

    def token_to_id(self, token: str) -> int | None:
        """The id of a token written as in tokenizer.json, None if there is none."""
        return self._core.token_to_id(token)

    def text_stream(self, *, skip_special_tokens: bool = True) -> "TextStream":
        """A fresh stream for one sequence."""
        return TextStream(self, skip_special_tokens=skip_special_tokens)

    def token_for_text(self, token_id: int, *, skip_special_tokens: bool) -> str | None:
        """A token as tokenizer.json writes it; None where it gives no text (unknown, or special and skipped)."""
        if skip_special_tokens and token_id in self._special_ids:
            return None
        return self._core.id_to_token(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of the text that a token stands for, blank before a word included; none for an id without text."""
        token = self.token_for_text(token_id, skip_special_tokens=False)
        if token is None:
            return b""
        if "ByteLevel" in self._decoders and token_id not in self._special_ids:
            return _bytes_of(token)
        if "ByteFallback" in self._decoders and _BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()

    @property
    def decoder_types(self) -> tuple[str, ...]:
        """The kinds of tokenizer.json's decoder steps, in order."""
        return self._decoders


class TextStream:
    """The text of a growing sequence, piece by piece.

    All pieces and the flush together equal ``Tokenizer.decode`` of all ids. A piece never ends inside a character.
    A token's cost does not grow with the text before it (one exception below).

    Byte-level decoders (GPT-2's kind: Llama 3, Qwen, SmolLM) map each token to bytes, so an incremental UTF-8 decoder
    is exact. Every other decoder is run over the tokens of the last piece and the new ones, and the difference is the
    new text; with byte fallback (Llama 2's kind), whose decoder judges a run of byte tokens as a whole, the run is held
    back until it ends. Where byte level is one step of a longer decoder, a run of broken bytes is held back the same
    way, and read again with every token: no known model of our families has such a decoder.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        """Starts an empty text.

        Args:
            tokenizer: Where the ids come from.
            skip_special_tokens: As for ``Tokenizer.decode``.
        """
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_byte_level = [kind for kind in tokenizer.decoder_types if kind != "Fuse"] == ["ByteLevel"]
        self._has_byte_tokens = "ByteFallback" in tokenizer.decoder_types
        self._may_be_partial = "ByteLevel" in tokenizer.decoder_types
        self._anchor: list[int] = []
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Takes the next token.

        Args:
            token_id: Any id of the model.

        Returns:
            The text that is certain now, often none.
        """
        token = self._tokenizer.token_for_text(token_id, skip_special_tokens=self._skip_special_tokens)
        if token is None:
            return ""
        if self._is_byte_level:
            return self._utf8.decode(_bytes_of(token))
        self._pending.append(token_id)
        if self._has_byte_tokens and _BYTE_TOKEN.fullmatch(token):
            return ""
        return self._take_pending(final=False)

    def flush(self) -> str:
        """Ends the text.

        Returns:
            What is left; a character that was cut short becomes U+FFFD.
        """
        if self._is_byte_level:
            return self._utf8.decode(b"", final=True)
        return self._take_pending(final=True) if self._pending else ""

    def _take_pending(self, *, final: bool) -> str:
        before = self._decode(self._anchor)
        text = self._decode(self._anchor + self._pending)
        if not final:
            if not text.startswith(before):  # a decoder that changes what it said: only the end will tell
                return ""
            if self._may_be_partial and text.endswith("\ufffd"):
                return ""
        piece = text[len(before) :]
        if piece:
            self._anchor = self._pending
            self._pending = []
        elif self._anchor:
            self._pending = []  # says nothing and need not be read again; at the start it may eat the first space
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens) if ids else ""


def _on_text(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call of the library over text or ids: what it says of its own file is an error of the bundle."""
    try:
        return call_native(function, *args, **kwargs)
    except Exception as error:
        if type(error) not in (Exception, NativePanicError):  # the library raises nothing more precise
            raise
        reason = " ".join(str(error).split())
        raise BundleError(
            f"tokenizer.json: fails on this text ({reason}); restore it and export the model again"
        ) from error


def _decoder_types(core: tokenizers.Tokenizer) -> tuple[str, ...]:
    """The kinds of the decoder's steps, sequences flattened."""
    decoder = core.decoder
    if decoder is None:
        return ()

    def flat(state: Mapping[str, Any]) -> list[str]:
        if state.get("type") == "Sequence":
            return [kind for step in state.get("decoders", ()) for kind in flat(step)]
        return [str(state.get("type"))]

    return tuple(flat(json.loads(decoder.__getstate__())))


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level tokens: printable Latin-1 stands for itself, the rest for 256, 257, ..."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _bytes_of(token: str) -> bytes:
    """The bytes of a byte-level token; one with a character outside the alphabet (an added token) is plain text."""
    try:
        return bytes([_BYTE_OF[char] for char in token])
    except KeyError:
        return token.encode()
