"""The options of ``ExportOptions``: the split and convention, which evaluate and finetune take too, and the bundle."""

from __future__ import annotations

from typing import Annotated

from dmtd_export.options import MAX_NUM_SEQS_LIMIT, ExportOptions
from dmtd_runtime.cli.options.groups import Group, option

SPLIT_PANEL, _BUNDLE = "Split and convention (by default as the checkpoint records them)", "Bundle"
SPLIT = Group(
    {
        "encoding_layers": option("E: layers before the thinking layers; 0 for a plain checkpoint.", panel=SPLIT_PANEL),
        "thinking_layers": option("T: layers that run once a cycle; by default the rest.", panel=SPLIT_PANEL),
        "decoding_layers": option("D: late layers, that run for every token.", panel=SPLIT_PANEL),
        "cycle_length": option("Tokens of a cycle (tau).", panel=SPLIT_PANEL),
        "cycle_origin": option(
            "absolute: cycles count from the start of the sequence; prompt: from the end of the prompt.",
            panel=SPLIT_PANEL,
        ),
        "prompt_input": option("What prompt positions feed to the late layers.", panel=SPLIT_PANEL),
    }
)
SplitGroup = Annotated[ExportOptions, SPLIT]
ExportGroup = Annotated[
    ExportOptions,
    Group(
        {
            **SPLIT.options,
            "target": option("Graphs for ONNX Runtime, for TensorRT, or both.", panel=_BUNDLE),
            "dtype": option("Type of weights and caches.", panel=_BUNDLE),
            "max_model_len": option(
                "Tokens of prompt and answer together; by default the model's limit.", panel=_BUNDLE
            ),
            "max_num_seqs": option(f"Sequences at a time, 1 to {MAX_NUM_SEQS_LIMIT}.", panel=_BUNDLE),
            "generation_config": option(
                "A generation_config.json in the place of the checkpoint's, or none: its end ids alone.",
                metavar="none|FILE",
                panel=_BUNDLE,
            ),
            "verify": option("Verify before the bundle takes its place.", "--verify/--no-verify", panel=_BUNDLE),
        }
    ),
]
