"""``dmtd inspect``: a bundle without running it."""

from __future__ import annotations

import json as json_text

import typer
from rich.console import Console

from dmtd_runtime.bundle import describe as inspect_bundle
from dmtd_runtime.bundle.manifest import load_manifest
from dmtd_runtime.cli.common import BundleArgument, BundleOption, JsonOption, pick


def inspect(bundle: BundleArgument = None, model: BundleOption = None, json: JsonOption = False) -> None:
    """Draw a bundle's split and cycle; list its graphs, bytes, and the speed-up the bytes allow.

    Reads manifest.json and the sizes of the files; `dmtd verify` checks the rest.
    """
    directory = pick(bundle, model, "BUNDLE")
    manifest = load_manifest(directory)
    manifest.check_files(directory, hashes=False)
    if json:
        typer.echo(json_text.dumps(inspect_bundle.to_json(manifest)))
        return
    console = Console(highlight=False)
    console.print(inspect_bundle.render(manifest, width=console.width))
