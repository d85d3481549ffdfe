"""Records of the bundle from JSON: dataclasses, tuples, mappings, literals and scalars by their annotations, nothing guessed.

A bundle lists thousands of inputs and outputs, so what an annotation asks for is worked out once, and where a value stands is
put into words only when it is wrong.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from dmtd_errors.words import TYPES, kind_of, shown

Decoder = Callable[[Any], Any]


class _MisfitError(Exception):
    """A value that does not fit: what is wrong, and where, below what was to be decoded."""

    def __init__(self, words: str) -> None:
        self.place, self.words = "", words

    def below(self, place: str) -> _MisfitError:
        self.place = place + self.place
        return self


def decode(kind: Any, raw: Any, where: str) -> Any:
    """Build ``kind`` (dataclasses, tuples, mappings, literals, scalars) from JSON; ValueError names the place."""
    try:
        return _decoder(kind)(raw)
    except _MisfitError as misfit:
        raise ValueError(f"{where}{misfit.place} {misfit.words}") from None


@functools.cache
def _decoder(kind: Any) -> Decoder:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return lambda raw: raw
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _record(kind)
    if origin is tuple:
        return _several(_decoder(args[0]))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _by_name(_decoder(args[1]))
    if origin is Literal:
        return _literal(args)
    if origin is types.UnionType:
        return _union(args)
    return _scalar(kind)


def _record(kind: Any) -> Decoder:
    hints = typing.get_type_hints(kind)
    fields = [(field.name, _decoder(hints[field.name])) for field in dataclasses.fields(kind)]
    required = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]

    def record(raw: Any) -> Any:
        if not isinstance(raw, dict):
            raise _MisfitError(f"is {kind_of(raw)}, expected an object")
        if missing := [name for name in required if name not in raw]:
            raise _MisfitError(f"lacks {', '.join(missing)}")
        given = {}
        for name, decoder in fields:
            if name in raw:
                try:
                    given[name] = decoder(raw[name])
                except _MisfitError as misfit:
                    raise misfit.below(f".{name}") from None
        return kind(**given)

    return record


def _several(decoder: Decoder) -> Decoder:
    def several(raw: Any) -> tuple[Any, ...]:
        if not isinstance(raw, list):
            raise _MisfitError(f"is {kind_of(raw)}, expected a list")
        found = []
        for item in raw:
            try:
                found.append(decoder(item))
            except _MisfitError as misfit:
                raise misfit.below(f"[{len(found)}]") from None
        return tuple(found)

    return several


def _by_name(decoder: Decoder) -> Decoder:
    def by_name(raw: Any) -> dict[str, Any]:
        if not isinstance(raw, dict):
            raise _MisfitError(f"is {kind_of(raw)}, expected an object")
        found = {}
        for name, item in raw.items():
            try:
                found[name] = decoder(item)
            except _MisfitError as misfit:
                raise misfit.below(f".{name}") from None
        return found

    return by_name


def _literal(values: tuple[Any, ...]) -> Decoder:
    words = ", ".join(value if isinstance(value, str) else shown(value) for value in values)

    def literal(raw: Any) -> Any:
        if raw not in values:
            raise _MisfitError(f"is {shown(raw)}, expected one of {words}")
        return raw

    return literal


def _union(kinds: tuple[Any, ...]) -> Decoder:
    def union(raw: Any) -> Any:
        if not isinstance(raw, kinds) or isinstance(raw, bool):
            raise _MisfitError(f"is {shown(raw)}, expected {' or '.join(TYPES[each] for each in kinds)}")
        return raw

    return union


def _scalar(kind: Any) -> Decoder:
    def scalar(raw: Any) -> Any:
        if kind is float and isinstance(raw, int) and not isinstance(raw, bool):
            return float(raw)
        fits = isinstance(raw, kind) and not (kind is int and isinstance(raw, bool))
        if not fits or (kind is float and not math.isfinite(raw)):  # NaN is no JSON, and Python reads it all the same
            raise _MisfitError(f"is {shown(raw)}, expected {TYPES[kind]}")
        return raw

    return scalar
