"""Typed access to the values of a parsed JSON object. Each raises ConfigError with the key, the value and the fix."""

from __future__ import annotations

from collections.abc import Mapping

from dmtd_errors.words import shown
from dmtd_models.errors import ConfigError


def integer(raw: Mapping[str, object], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        if default is None:
            raise ConfigError(f"{key}: missing; add it to config.json")
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{key}: got {shown(value)}, expected an integer")
    return value


def number(raw: Mapping[str, object], key: str, default: float | None = None) -> float:
    value = raw.get(key)
    if value is None:
        if default is None:
            raise ConfigError(f"{key}: missing; add it to config.json")
        return default
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{key}: got {shown(value)}, expected a number")
    return float(value)


def positive(raw: Mapping[str, object], key: str) -> float:
    value = number(raw, key)
    if not 0 < value < float("inf"):
        raise ConfigError(f"{key}: got {value}, expected a positive number")
    return value


def boolean(raw: Mapping[str, object], key: str, default: bool) -> bool:
    value = raw.get(key, default)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"{key}: got {shown(value)}, expected true or false")
    return value
