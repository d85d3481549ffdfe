"""What the files beside tokenizer.json say: the special tokens by name, and the ids that end a sequence. Reads, no more.

A bundle's tokenizer_config.json is complete: `dmtd export` has put into it what older directories keep in other files.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmtd_errors.pointers import lfs_pointer
from dmtd_errors.words import kind_of, reason, shown
from dmtd_runtime.errors import BundleError

MAX_CONFIG_BYTES = 64 << 20

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""What transformers knows by name; a model may have more."""


def read_special_tokens(directory: Path) -> dict[str, str]:
    """The named special tokens of tokenizer_config.json as text: ``bos_token``, ``eos_token``, ``pad_token``, ...

    Chat templates see them all, those with a name of the model's own (``image_token``) included; none where the file is absent.

    Raises:
        BundleError: The file is broken.
    """
    config = read_config(directory / "tokenizer_config.json")
    own = {name: value for name, value in config.items() if name.endswith("_token") and isinstance(value, str | dict)}
    extra = config.get("extra_special_tokens")
    named = {name: config.get(name) for name in NAMED_TOKENS} | own | (extra if isinstance(extra, dict) else {})
    found = {name: _token_text(name, value) for name, value in named.items()}
    return {name: text for name, text in found.items() if text is not None}


def eos_token_ids_of(directory: str | Path) -> tuple[int, ...]:
    """End-of-sequence ids of generation_config.json or, where it names none, of config.json.

    Args:
        directory: A bundle, or a Hugging Face model directory; it needs no tokenizer.

    Returns:
        Ids in the order of the file, possibly none.

    Raises:
        BundleError: A file is broken.
    """
    for name in ("generation_config.json", "config.json"):
        file = Path(directory) / name
        value = read_config(file).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise BundleError(
                f"{file}: eos_token_id: got {shown(value)}, expected a token id or a list of them; correct it"
            )
        if ids:
            return tuple(ids)
    return ()


def read_config(file: Path) -> Mapping[str, Any]:
    """Reads a small JSON file of a bundle.

    Args:
        file: Its path.

    Returns:
        The object; empty where the file is absent.

    Raises:
        BundleError: Too large, unreadable, or not a JSON object.
    """
    if not file.exists():
        return {}
    text = read_text(file, MAX_CONFIG_BYTES)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file}: not JSON ({reason(error)}); export the model again") from error
    if not isinstance(value, dict):
        raise BundleError(f"{file}: got {kind_of(value)}, expected an object; export the model again")
    return value


def read_text(file: Path, max_bytes: int) -> str:
    """A file's text. BundleError where it is larger, cannot be read, or is not UTF-8."""
    if (pointer := lfs_pointer(file)) is not None:
        raise BundleError(f"{file}: {pointer}")
    try:
        size = file.stat().st_size
        if size > max_bytes:
            raise BundleError(f"{file}: got {size} bytes, expected at most {max_bytes}; is this the right file?")
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise BundleError(f"{file}: cannot be read ({reason(error)}); mend that") from error
    except UnicodeDecodeError as error:
        raise BundleError(f"{file}: cannot be read as UTF-8 ({reason(error)}); export the model again") from error


def _token_text(name: str, value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise BundleError(
            f"tokenizer_config.json: {name}: got {shown(value)}, expected a token's text; correct the file"
        )
    return value
