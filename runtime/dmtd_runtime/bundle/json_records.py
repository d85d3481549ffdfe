"""Records of the bundle from JSON: dataclasses, tuples, mappings, literals and scalars by their annotations, nothing guessed."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal


def decode(kind: Any, raw: Any, where: str) -> Any:
    """Build ``kind`` (dataclasses, tuples, mappings, literals, scalars) from JSON; ValueError names the place."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return raw
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(raw, dict):
            raise ValueError(f"{where} is {type(raw).__name__}, expected an object")
        hints = _hints(kind)
        known = {f.name: f for f in dataclasses.fields(kind)}
        missing = [
            name
            for name, f in known.items()
            if name not in raw and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ValueError(f"{where} lacks {', '.join(missing)}")
        return kind(**{name: decode(hints[name], raw[name], f"{where}.{name}") for name in known if name in raw})
    if origin is tuple:
        if not isinstance(raw, list):
            raise ValueError(f"{where} is {type(raw).__name__}, expected a list")
        return tuple(decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(raw))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(raw, dict):
            raise ValueError(f"{where} is {type(raw).__name__}, expected an object")
        return {name: decode(args[1], item, f"{where}.{name}") for name, item in raw.items()}
    if origin is Literal:
        if raw not in args:
            raise ValueError(f"{where} is {raw!r}, expected one of {', '.join(map(str, args))}")
        return raw
    if origin is types.UnionType:
        return _decode_union(args, raw, where)
    if kind is float and isinstance(raw, int) and not isinstance(raw, bool):
        return float(raw)
    if not isinstance(raw, kind) or (kind is int and isinstance(raw, bool)):
        raise ValueError(f"{where} is {raw!r}, expected {kind.__name__}")
    return raw


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _decode_union(kinds: tuple[Any, ...], raw: Any, where: str) -> Any:
    for kind in kinds:
        if kind is type(None):
            if raw is None:
                return None
        elif isinstance(raw, kind) and not isinstance(raw, bool):
            return raw
    raise ValueError(f"{where} is {raw!r}, expected {' or '.join(kind.__name__ for kind in kinds)}")
