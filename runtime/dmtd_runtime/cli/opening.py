"""The bundle of a verb that generates, opened."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from dmtd_runtime.backends.base import OF_THE_BACKEND_ALONE, BackendOptions
from dmtd_runtime.cli.common import logs_to_stderr, note
from dmtd_runtime.llm import LLM
from dmtd_runtime.serving.options import ServingOptions


@contextlib.contextmanager
def open_llm(bundle: Path, options: BackendOptions, serving: ServingOptions, *, plain: bool) -> Iterator[LLM]:
    """The bundle, open; says on stderr if its weights were not trained for DMTD."""
    given = {
        name: value for name, value in (asdict(options) | asdict(serving)).items() if name not in OF_THE_BACKEND_ALONE
    }
    with logs_to_stderr(without="not trained for DMTD"), LLM(bundle, **given | {"plain": plain}) as llm:
        if not (cycle := llm.manifest.cycle).dmtd_trained and not plain:
            note(f"note: weights {cycle.training} (compare with --plain)")
        yield llm
