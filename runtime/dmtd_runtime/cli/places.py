"""Where an option's value was written, if not on the command line: errors name that place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CONFIG = "dmtd.config"


def note_config(context: Any, file: Path, keys: Mapping[str, str]) -> None:
    """Remember which key of a file a parameter's value comes from."""
    context.meta[_CONFIG] = (file, keys)


def place_of(context: Any, parameter: Any) -> str | None:
    """The environment variable, or the key and its file; None for the command line and for defaults."""
    source = context.get_parameter_source(parameter.name)
    if source is None or source.name not in ("ENVIRONMENT", "DEFAULT_MAP"):
        return None
    if source.name == "ENVIRONMENT":
        return variable_of(context, parameter)
    file, keys = context.meta[_CONFIG]
    return f"{keys[parameter.name]} in {file}"


def variable_of(context: Any, parameter: Any) -> str:
    """The environment variable of an option."""
    return str(parameter.envvar or f"{context.auto_envvar_prefix}_{parameter.name.upper()}")
