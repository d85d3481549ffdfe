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
                "tensorrt, tensorrt-rtx, or simulator: the graphs alone, for the CPU. By default the library that is "
                "installed.",
                metavar="NAME",
            ),
            "fused": option(
                "Build full_pass too, which reads encoding layers once and holds D and the head again; by default where the "
                "split has encoding layers.",
                "--fused/--no-fused",
            ),
            "compute_capability": option(
                "Of tensorrt-rtx: build for this kind of GPU only; by default for any from 8.0 on.", metavar="8.9"
            ),
            "max_num_seqs": option(f"Sequences at a time, 1 to {MAX_NUM_SEQS_LIMIT}.", panel=_SIZES),
            "max_model_len": option(
                "Tokens of prompt and answer together; by default the bundle's limit, at most "
                f"{contract.DEVICE_MODEL_LEN}.",
                panel=_SIZES,
            ),
            "prefill_chunk": option("Most prompt tokens in one pass.", panel=_SIZES),
            "timing_cache": option(
                "Of tensorrt: file that remembers timings; by default in the user's cache directory."
            ),
            "force": option("Build again what stands there already.", "--force"),
        }
    ),
]
