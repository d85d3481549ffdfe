"""The options of ``SplitOptions``, which evaluate and finetune take too, and of ``ExportOptions``: what a bundle holds."""

from __future__ import annotations

from typing import Annotated

from dmtd_export.options import CALIBRATION_TOKENS, MAX_NUM_SEQS_LIMIT, ExportOptions, WeightOptions
from dmtd_models.config.model import SplitOptions
from dmtd_runtime.cli.options.groups import Group, option

_SPLIT, _BUNDLE = "Split and convention (by default as the checkpoint records them)", "Bundle"
SplitGroup = Annotated[
    SplitOptions,
    Group(
        {
            "encoding_layers": option(
                "E: layers before the thinking layers. 0 where the checkpoint records none.", panel=_SPLIT
            ),
            "thinking_layers": option(
                "T: layers that run once a cycle. By default all that E and D leave.", panel=_SPLIT
            ),
            "decoding_layers": option(
                "D: late layers, which run for every token. A plain model needs it.", panel=_SPLIT
            ),
            "cycle_length": option("Tokens of a cycle (tau). A plain model needs it.", panel=_SPLIT),
            "cycle_origin": option(
                "absolute: cycles count from the start of the sequence. prompt: from the end of the prompt; so it is for a "
                "plain model.",
                panel=_SPLIT,
            ),
            "prompt_input": option(
                "What prompt positions feed to the late layers. For a plain model thinking with origin prompt, cyclical "
                "with origin absolute.",
                panel=_SPLIT,
            ),
        }
    ),
]
_WEIGHTS = "Formats of weights"
WeightsGroup = Annotated[
    WeightOptions,
    Group(
        {
            "weights": option(
                "int8: rounded in blocks, with a scale each. int4: with a scale and a minimum, lm_head and embedding in int8. "
                "int4-symmetric: with a scale alone, everywhere; faster, loses more. int8-channel: for batches and prompts, with "
                "--calibration. fp8: floats of 8 bits with a scale for each output, for engines. keep: a quantised checkpoint's "
                "own blocks, the default for one. float: in --dtype.",
                panel=_WEIGHTS,
            ),
            "weights_thinking": option("The thinking layers' format, instead of --weights.", panel=_WEIGHTS),
            "weights_late": option("That of the layers that run for every token.", panel=_WEIGHTS),
            "weights_lm_head": option(
                "That of lm_head; where it is tied to the embedding, give both the same.", panel=_WEIGHTS
            ),
            "weights_embedding": option("That of the embedding table.", panel=_WEIGHTS),
            "weights_block": option("Inputs that share a scale: 16, 32, 64 or 128.", panel=_WEIGHTS),
        }
    ),
]
ExportGroup = Annotated[
    ExportOptions,
    Group(
        {
            "target": option(
                "Whose graphs the bundle holds: onnxruntime's, those that engines are built from (tensorrt), or all. By "
                "default all, with quantised weights or int8 caches onnxruntime, with fp8 tensorrt.",
                panel=_BUNDLE,
            ),
            "dtype": option(
                "Type of computation, of float weights and, unless --kv says otherwise, of caches. ONNX Runtime takes no "
                "bfloat16 on a CPU.",
                panel=_BUNDLE,
            ),
            "kv": option(
                "Type of caches: that of --dtype, or int8, a quarter of float32's bytes, for long contexts in ONNX Runtime's own "
                "graphs. int8 needs --calibration.",
                panel=_BUNDLE,
            ),
            "calibration": option(
                "Text like what the model will read: weights of 4 bits are rounded over it, which lose less then, and inputs of "
                "int8-channel and scales of int8 caches measured, which need it. A text file, or data as `dmtd finetune "
                "--data` takes it. May be given again.",
                metavar="FILE",
                panel=_BUNDLE,
            ),
            "calibration_tokens": option(
                f"Tokens of that text, of all files together, {CALIBRATION_TOKENS.start} to {CALIBRATION_TOKENS.stop - 1}. More "
                "take longer, and weights of 4 bits lose less.",
                panel=_BUNDLE,
            ),
            "max_model_len": option(
                "Tokens of prompt and answer together. By default the model's own limit.", panel=_BUNDLE
            ),
            "max_num_seqs": option(f"Most sequences at a time, 1 to {MAX_NUM_SEQS_LIMIT}.", panel=_BUNDLE),
            "generation_config": option(
                "A generation_config.json in the place of the checkpoint's, or none: its end ids alone.",
                metavar="none|FILE",
                panel=_BUNDLE,
            ),
            "verify": option("Verify the bundle before it takes its place.", "--verify/--no-verify", panel=_BUNDLE),
        }
    ),
]
