"""Graphs whose path ONNX Runtime does not take: reached by links (the Hub's cache, weights on another disk), or not UTF-8.

It refuses a weights file that a link leads out of the graph's directory. Such a graph is handed over as bytes, with an empty
file standing for its weights, and the weights as arrays mapped from where they are.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dmtd_runtime.bundle import contract

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


def path_problem(graph: Path) -> str | None:
    """Why a path may not be taken, and how to mend that; None for a plain one."""
    if not os.fsencode(graph).isascii() and not _is_utf8(graph):
        return "its path is not UTF-8, which may be the matter: rename the directory"
    if graph.is_symlink() or (graph.parent / contract.WEIGHTS_FILE).is_symlink():
        return "its files are links, which may be the matter: copy what they lead to (cp -rL)"
    return None


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


@contextlib.contextmanager
def graph_source(
    graph: Path, settings: Any, weights: Mapping[str, Any], *, holds_no_weights: bool = False
) -> Iterator[str | bytes]:
    """What to make a session of inside the block: the path, or bytes where the path is not taken and ``weights`` are given.

    Args:
        graph: its file.
        settings: the session's ``SessionOptions``.
        weights: all initializers that stand in the weights file, as OrtValues on the CPU; they must outlive the session.
        holds_no_weights: it has none.
    """
    if path_problem(graph) is None or not (weights or holds_no_weights):
        yield str(graph)
        return
    # Not ``add_initializer``: optimisers that fold constants read the file all the same, and here it is empty.
    settings.add_external_initializers(list(weights), list(weights.values()))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / contract.WEIGHTS_FILE).touch()
        settings.add_session_config_entry(_WEIGHTS_FOLDER, folder)
        yield graph.read_bytes()
