"""Ways to damage files, as calls for later: a checkpoint ``m`` and a bundle ``b`` in the working directory. For tests."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Damage = Callable[[], None]


def nothing() -> None:
    """No damage: the command itself is wrong."""


def remove(name: str) -> Damage:
    return lambda: shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()


def cut(name: str, size: int) -> Damage:
    return lambda: os.truncate(name, size)


def write(name: str, text: str | bytes) -> Damage:
    raw = text.encode() if isinstance(text, str) else text

    def damage() -> None:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(raw)

    return damage


def flip(name: str, offset: int) -> Damage:
    def damage() -> None:
        raw = bytearray(Path(name).read_bytes())
        raw[offset] ^= 0x40
        Path(name).write_bytes(raw)

    return damage


def edit(name: str, change: Callable[[Any], object]) -> Damage:
    def damage() -> None:
        raw = json.loads(Path(name).read_text())
        change(raw)
        Path(name).write_text(json.dumps(raw))

    return damage


def config(**fields: object) -> Damage:
    return edit("m/config.json", lambda raw: raw.update(fields))


def sealed(name: str, damage: Damage) -> Damage:
    """The damage, with the manifest's hash of the file made right again."""

    def both() -> None:
        damage()
        raw = Path("b", name).read_bytes()
        info = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        edit("b/manifest.json", lambda manifest: manifest["files"].update({name: info}))()

    return both
