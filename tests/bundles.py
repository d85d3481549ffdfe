"""Tiny bundles that tests of the command line share, exported once a session by their fixtures."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import ExportOptions
from dmtd_models.config.model import SplitOptions
from dmtd_models.reference.testing import write_tiny_checkpoint


def make_checkpoint(directory: Path, *, tokenizer: bool = True) -> Path:
    """Five layers of random Llama."""
    return write_tiny_checkpoint(directory, family="llama", layers=5, tokenizer=tokenizer)


def make_bundle(directory: Path, *, tokenizer: bool = True) -> Path:
    """E0 T3 D2, cycle of 3, float32, batches of up to 2."""
    checkpoint = make_checkpoint(directory / "checkpoint", tokenizer=tokenizer)
    options = ExportOptions(
        split=SplitOptions(decoding_layers=2, cycle_length=3, cycle_origin="prompt", prompt_input="thinking"),
        max_num_seqs=2,
    )
    export_bundle(checkpoint, directory / "bundle", options)
    return directory / "bundle"


def with_files(bundle: Path, copy: Path, files: Mapping[str, bytes | None]) -> Path:
    """A copy of a bundle with files (None: taken out) that its manifest vouches for."""
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    for name, content in files.items():
        manifest["files"].pop(name, None)
        (copy / name).unlink(missing_ok=True)
        if content is not None:
            (copy / name).write_bytes(content)
            manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy
