"""Which run a directory belongs to: its options in ``job.json``, so that another run never goes on from its states.

Stands between ``job``, which knows the options, and the states that ``run`` goes on from. Options that change no weight (where
to save, how often to report) are not recorded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from dmtd_errors.words import reason
from dmtd_models.checkpoints.saving import write_json
from dmtd_models.errors import ConfigError
from dmtd_models.finetune.options import Precision
from dmtd_models.finetune.states import latest_checkpoint

RECORD = "job.json"
_FREE = ("cache_features", "eval_every_tokens", "log_every_steps", "save_every_s")
_NO_OPTIONS = {
    "base": "BASE",
    "documents": "documents of --data",
    "text": "digest of what stands in --data",
    "processes": "number of processes",
}


def recorded_options(train_options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of training that decide what weights come out."""
    return {name: value for name, value in train_options.items() if name not in _FREE}


def recorded_precision(directory: Path) -> Precision | None:
    """The precision of the run whose states are in ``directory``, if there are any: another CPU must not change it."""
    if latest_checkpoint(directory) is None or not (directory / RECORD).is_file():
        return None
    precision = dict(_recorded(directory)).get("train.precision")
    return next((known for known in get_args(Precision) if known == precision), None)


def require_same_run(directory: Path, record: Mapping[str, Any]) -> None:
    """Refuse to go on from the states in ``directory`` if they are of a run with other options.

    Args:
        directory: of the run's states and its record.
        record: options of the run that is to be; what it lacks is not compared.

    Raises:
        ConfigError: names the option and both values.
    """
    if latest_checkpoint(directory) is None or not (directory / RECORD).is_file():
        return
    before = dict(_recorded(directory))
    for name, value in _flat(json.loads(json.dumps(record))):
        if before.get(name) != value:
            option = name.rpartition(".")[2]
            told = _NO_OPTIONS.get(option)
            raise ConfigError(
                f"{told + ': ' if told else ''}got {_shown(value)}, but the run in {directory} has "
                f"{_shown(before.get(name))}; give the same options to go on with it, or another -o",
                param=None if told else option,
            )


def write_record(directory: Path, record: Mapping[str, Any]) -> None:
    """Note whose states these are going to be."""
    write_json(directory / RECORD, dict(record))


def _recorded(directory: Path) -> list[tuple[str, Any]]:
    file = directory / RECORD
    try:
        return list(_flat(json.loads(file.read_text(encoding="utf-8"))))
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{file}: not a record of a run ({reason(error)}); give another -o") from error


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _shown(value: object) -> str:
    if value is None:
        return "none given"
    text = ("off", "on")[value] if isinstance(value, bool) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
