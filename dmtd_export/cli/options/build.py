"""The options of ``BuildOptions``: which engines are built."""

from __future__ import annotations

from typing import Annotated

from dmtd_export.engines.options import BuildOptions
from dmtd_export.options import MAX_NUM_SEQS_LIMIT
from dmtd_runtime.bundle import contract
from dmtd_runtime.cli.options.groups import Group, option

_SIZES = "Sizes"
BuildGroup = Annotated[
    BuildOptions,
    Group(
        {
            "backend": option(
                "tensorrt, tensorrt-rtx, or simulator: the graphs alone, for the CPU. By default the library "
                "that is installed.",
                metavar="NAME",
            ),
            "fused": option(
                "Build full_pass too: encoding layers are read once, D and lm_head are in memory twice. By default "
                "where the split has encoding layers.",
                "--fused/--no-fused",
            ),
            "compute_capability": option(
                "With tensorrt-rtx: build for this compute capability alone. By default for any from 8.0 on.",
                metavar="8.9",
            ),
            "max_num_seqs": option(
                f"Most sequences at a time, 1 to {MAX_NUM_SEQS_LIMIT}. By default as the bundle was exported.",
                panel=_SIZES,
            ),
            "max_model_len": option(
                "Most tokens of prompt and answer together. By default the bundle's limit, at most "
                f"{contract.DEVICE_MODEL_LEN}.",
                panel=_SIZES,
            ),
            "prefill_chunk": option("Most prompt tokens in one pass.", panel=_SIZES),
            "timing_cache": option(
                "With tensorrt: file that remembers timings. By default in the user's cache directory."
            ),
            "force": option("Build again what is built already. By default it is left as it is.", "--force"),
        }
    ),
]
