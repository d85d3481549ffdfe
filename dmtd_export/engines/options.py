"""What `dmtd build` can be told. The command line takes its defaults from here, so that CLI and API cannot differ."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.engine_record import EngineBackend


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """Options of a build.

    ``max_model_len`` None: the bundle's, at most contract.DEVICE_MODEL_LEN. ``compute_capability`` is
    tensorrt-rtx's: "8.9" for one kind of GPU, None for any of 8.0 and later. ``timing_cache`` is tensorrt's.
    """

    backend: EngineBackend | None = None  # None: what is installed
    fused: bool | None = None  # full_pass besides thinking; None: where the split has encoding layers
    max_num_seqs: int | None = None  # None: what the bundle was exported for
    max_model_len: int | None = None
    prefill_chunk: int = contract.MIN_WINDOW
    compute_capability: str | None = None
    timing_cache: Path | None = None
    force: bool = False  # build even what stands there already
