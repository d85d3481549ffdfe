"""Graphs that are reached by symbolic links, as in the Hub's cache, or whose weights lie on another disk.

ONNX Runtime refuses a weights file that a link leads out of the graph's directory. Such a graph is handed over as bytes, with
an empty file standing for its weights, and the weights as arrays mapped from where they are.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dmtd_runtime.bundle import contract

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


def reached_by_links(graph: Path) -> bool:
    """Whether a graph's file or the weights file beside it is a symbolic link."""
    return graph.is_symlink() or (graph.parent / contract.WEIGHTS_FILE).is_symlink()


@contextlib.contextmanager
def graph_source(graph: Path, settings: Any, weights: Mapping[str, Any]) -> Iterator[str | bytes]:
    """What to make a session of inside the block: the path, or bytes where links are in the way and ``weights`` are given.

    Args:
        graph: its file.
        settings: the session's ``SessionOptions``.
        weights: all initializers that stand in the weights file, as OrtValues on the CPU; they must outlive the session.
    """
    if not weights or not reached_by_links(graph):
        yield str(graph)
        return
    # Not ``add_initializer``: optimisers that fold constants read the file all the same, and here it is empty.
    settings.add_external_initializers(list(weights), list(weights.values()))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / contract.WEIGHTS_FILE).touch()
        settings.add_session_config_entry(_WEIGHTS_FOLDER, folder)
        yield graph.read_bytes()
