"""``dmtd export``: options, progress and the closing table. The work is ``dmtd_export.bundle.export``'s."""

from __future__ import annotations

import json as json_text
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dmtd_errors.words import counted
from dmtd_export.cli.options.export import ExportGroup, SplitGroup, WeightsGroup
from dmtd_export.cli.progress import StageDisplay
from dmtd_export.options import GROUPS, ExportOptions, WeightOptions, check_options
from dmtd_models.config.model import SplitOptions
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.speed_bound import split_bytes, weight_formats
from dmtd_runtime.cli.common import JsonOption, human_bytes, logs_to_stderr, pick, require

if TYPE_CHECKING:
    from dmtd_runtime.bundle.manifest import Manifest

SYMMETRIC_LOSES = (
    "int4-symmetric costs a small model much: SmolLM2-135M 1.35 times the perplexity, with int4 under 1.05; less over a text: "
    "--calibration FILE"
)
LIBRARIES = ("numpy", "onnx", "safetensors", "gguf", "ml_dtypes")


def export(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(metavar="MODEL", help="A Hugging Face directory (safetensors) or a GGUF file."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="The checkpoint, instead of the argument.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Directory of the bundle. A bundle that is there is replaced whole."),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            help="A directory that `dmtd finetune` made of MODEL. It is merged into the weights. By default none."
        ),
    ] = None,
    split: SplitGroup = SplitOptions(),
    formats: WeightsGroup = WeightOptions(),
    options: ExportGroup = ExportOptions(),
    json: JsonOption = False,
) -> None:
    """Make a bundle of ONNX graphs from a checkpoint, and verify it.

    A plain checkpoint needs --decoding-layers and --cycle-length; one trained for DMTD brings them along.
    """
    source = pick(checkpoint, model, "MODEL")
    if output is None:
        raise typer.BadParameter("-o / --output: missing; name the directory of the bundle")
    options = replace(options, split=split, formats=formats)
    check_options(options)
    require("export", LIBRARIES, "export")
    if options.calibration and formats.over_text:
        require("export --calibration", ("torch",), "oracle")
    from dmtd_export.bundle.export import export_bundle

    with logs_to_stderr(), StageDisplay() as display:
        hook = None
        if options.verify:
            from dmtd_export.verify import VerifyOptions, verify_hook

            hook = verify_hook(VerifyOptions(), progress=display.verified)
        manifest = export_bundle(
            source,
            output,
            options,
            adapter=adapter,
            progress=display.counted,
            verify=hook,
        )
    if json:
        typer.echo(json_text.dumps(_summary(output, manifest)))
    else:
        Console(highlight=False).print(_table(output, manifest, formats))


def _summary(output: Path, manifest: Manifest) -> dict[str, Any]:
    cycle = manifest.cycle
    return {
        "schema": 1,
        "bundle": str(output),
        "encoding_layers": cycle.encoding_layers,
        "thinking_layers": cycle.thinking_layers,
        "decoding_layers": cycle.decoding_layers,
        "cycle_length": cycle.cycle_length,
        "cycle_origin": cycle.cycle_origin,
        "prompt_input": cycle.prompt_input,
        "dmtd_trained": cycle.dmtd_trained,
        "dtype": manifest.model.dtype,
        "kv_dtype": manifest.model.cache_dtype,
        "max_model_len": manifest.model.max_model_len,
        "weight_bytes": split_bytes(manifest).stored,
        "weight_formats": weight_formats(manifest),
        "files": {name: info.bytes for name, info in manifest.files.items()},
        "verification": dict(manifest.verification),
    }


def _table(output: Path, manifest: Manifest, formats: WeightOptions) -> Table:
    cycle, model = manifest.cycle, manifest.model
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")

    def row(name: str, text: str, style: str = "") -> None:
        table.add_row(name, Text(text, style=style))

    row("bundle", str(output))
    row(
        "split",
        f"E{cycle.encoding_layers} T{cycle.thinking_layers} D{cycle.decoding_layers}, cycle of {cycle.cycle_length}, "
        f"origin {cycle.cycle_origin}, prompt input {cycle.prompt_input}",
    )
    row("model", f"{model.family}, {model.dtype}, up to {model.max_model_len} tokens")
    if model.cache_dtype != model.dtype:
        row("", f"caches: {model.cache_dtype}")
    if manifest.quantised:
        for name, stored in weight_formats(manifest).items():
            row("", f"{name.replace('_', ' ')}: {stored}")
    if any(formats.format_of(group) == "int4-symmetric" for group in GROUPS) and "weights" not in manifest.calibration:
        row("", SYMMETRIC_LOSES, "yellow")
    if not cycle.dmtd_trained:
        row("", cycle.training, "yellow")
    size = sum(info.bytes for info in manifest.files.values())
    row("size", f"{human_bytes(size)} in {counted(len(manifest.files), 'file')}, {len(manifest.graphs)} of them graphs")
    record = manifest.verification
    if record:
        row("verified", f"level {record.get('level', 'unknown')}", "green")
        if record.get("level_note"):
            row("", str(record["level_note"]), "dim")
    else:
        row("verified", f"no; check it with: dmtd verify {shlex.quote(str(output))}", "yellow")
    row("next", _next(output, manifest))
    return table


def _next(output: Path, manifest: Manifest) -> str:
    """A command that runs the bundle, or makes the engines of one that is for them: ONNX Runtime has no bfloat16 on a CPU."""
    place, half = shlex.quote(str(output)), manifest.model.dtype == "bfloat16"
    if half and manifest.default_dialect == contract.STANDARD:
        return f"dmtd build {place}"
    chat, has_text = (name in manifest.files for name in ("chat_template.jinja", "tokenizer.json"))
    given = "" if chat else " -p TEXT" if has_text else " --token-ids 1,2,3"
    return f"dmtd {'chat' if chat else 'generate'} {place}{given}{' --device cuda' if half else ''}"
