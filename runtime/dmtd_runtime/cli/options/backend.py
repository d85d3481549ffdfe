"""The options of ``BackendOptions``: what runs a bundle, where, and how."""

from __future__ import annotations

from typing import Annotated

from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.cli.options.groups import Group, option

_PANEL = "Backend"
BACKEND = Group(
    {
        "backend": option(
            "onnxruntime runs the bundle's graphs; tensorrt, tensorrt-rtx and simulator run engines that `dmtd build` made.",
            panel=_PANEL,
            metavar="NAME",
        ),
        "device": option("Of onnxruntime; cuda takes a float16 or bfloat16 bundle.", panel=_PANEL),
        "device_id": option("Which GPU, as nvidia-smi numbers them.", panel=_PANEL),
        "full_pass": option(
            "staged: each layer once in memory; fused: encoding layers read once, more memory. By default fused where there "
            "are encoding layers.",
            panel=_PANEL,
        ),
        "dialect": option(
            "Of onnxruntime: which of the bundle's graphs; by default onnxruntime's own where it has them.",
            panel=_PANEL,
        ),
        "max_num_seqs": option("Sequences at a time.", panel=_PANEL, min=1),
        "max_model_len": option(
            "Tokens of prompt and answer together; by default the bundle's limit.", panel=_PANEL, min=1
        ),
        "threads": option("CPU threads; by default one for each core this process may use.", panel=_PANEL, min=1),
        "cuda_graphs": option(
            "On a GPU: capture work once and replay it.", "--cuda-graphs/--no-cuda-graphs", panel=_PANEL
        ),
        "warm_up": option(
            "On a GPU: run every shape once at opening, so that no answer waits.", "--warm-up", panel=_PANEL
        ),
    }
)
_HOW = ("backend", "device", "device_id", "full_pass", "dialect", "max_model_len", "threads", "cuda_graphs")
AnswerBackend = Annotated[BackendOptions, BACKEND.only(*_HOW, "warm_up")]
BenchBackend = Annotated[BackendOptions, BACKEND.only(*_HOW)]
ServeBackend = Annotated[BackendOptions, BACKEND.only(*_HOW, "max_num_seqs", "warm_up")]
