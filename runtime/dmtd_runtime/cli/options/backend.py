"""The options of ``BackendOptions``: what runs a bundle, where, and how."""

from __future__ import annotations

from typing import Annotated

from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.cli.options.groups import Group, option, threads_option

_PANEL = "Backend"
BACKEND = Group(
    {
        "backend": option(
            "onnxruntime runs the bundle's graphs; tensorrt, tensorrt-rtx and simulator run engines that `dmtd build` made.",
            panel=_PANEL,
            metavar="NAME",
        ),
        "device": option("With onnxruntime: where to run. cuda takes a float16 or bfloat16 bundle.", panel=_PANEL),
        "device_id": option("Which GPU, by its number in nvidia-smi.", panel=_PANEL),
        "full_pass": option(
            "staged: T, then D, each layer in memory once. fused: one graph, encoding layers are read once, for more memory. By "
            "default one graph runs all on the CPU; elsewhere fused where there are encoding layers.",
            panel=_PANEL,
        ),
        "dialect": option(
            "With onnxruntime: which of the bundle's graphs to run. standard: plain ONNX. onnxruntime: its own operators, "
            "faster. By default onnxruntime where the bundle has it.",
            panel=_PANEL,
        ),
        "max_num_seqs": option("Most sequences at a time.", panel=_PANEL, min=1),
        "max_model_len": option(
            "Most tokens of prompt and answer together. By default the bundle's limit.", panel=_PANEL, min=1
        ),
        "threads": threads_option(_PANEL),
        "cuda_graphs": option(
            "On a GPU: capture work once as CUDA graphs and replay it.", "--cuda-graphs/--no-cuda-graphs", panel=_PANEL
        ),
        "warm_up": option(
            "On a GPU: run every shape once at opening, so that no answer waits for it. By default off.",
            "--warm-up",
            panel=_PANEL,
        ),
    }
)
_HOW = ("backend", "device", "device_id", "full_pass", "dialect", "max_model_len", "threads", "cuda_graphs")
AnswerBackend = Annotated[BackendOptions, BACKEND.only(*_HOW, "warm_up")]
BenchBackend = Annotated[BackendOptions, BACKEND.only(*_HOW)]
