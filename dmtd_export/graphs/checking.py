"""onnx's checker over one graph file of a bundle, wherever its weights are."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import onnx

from dmtd_runtime.bundle import contract


def checker_fault(path: Path) -> str | None:
    """What onnx's checker refuses a graph for, in one line; None if it passes.

    The checker takes weights that are a link, or have a second name, for an attack, wants paths in UTF-8, and reads none of the
    weights: it is shown a copy of the graph beside an empty file.
    """
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(path, Path(folder, path.name))
        Path(folder, contract.WEIGHTS_FILE).touch()
        try:
            onnx.checker.check_model(Path(folder, path.name), full_check=True)
        except Exception as error:  # noqa: BLE001 - the checker raises several kinds
            return str(error).strip().splitlines()[0].replace(f"{folder}/", "")
    return None
