"""Which engines of a bundle serve here: records (``engine_record``) compared with what a runtime has and wants.

What does not fit is an error of one line, with the command that builds what would. No engine is opened.
"""

from __future__ import annotations

import logging
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.engine_record import (
    ANY_GPU,
    OLDEST_CAPABILITY,
    EngineBackend,
    EngineRecord,
    FullPass,
    content_hash,
    read_record,
    records,
)
from dmtd_runtime.bundle.manifest import Manifest
from dmtd_runtime.errors import BackendError, BundleError

logger = logging.getLogger("dmtd.engines")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineWish:
    """What a runtime has and wants; None: it does not matter, or is not known."""

    backend: EngineBackend | None = None
    version: str | None = None  # of the installed library
    compute_capability: str | None = None  # of the device, "8.9"
    gpu_name: str | None = None
    full_pass: FullPass | None = None
    max_num_seqs: int | None = None
    max_model_len: int | None = None
    prefill_chunk: int | None = None  # of engines to build; any serves


def mismatches(record: EngineRecord, manifest: Manifest, wish: EngineWish) -> list[str]:
    """Why the record does not serve the wish, each as 'what: got X, expected Y'; empty where it does."""
    found = []

    def compare(what: str, got: Any, expected: Any) -> None:
        if expected is not None and got != expected:
            found.append(f"{what}: built for {got}, here {expected}")

    compare("backend", record.backend, wish.backend)
    compare(f"{record.backend} version", record.version, wish.version)
    if wish.compute_capability is not None and not record.runs_on(wish.compute_capability):
        here = f"here {wish.compute_capability}"
        if record.compute_capability == ANY_GPU:
            found.append(f"compute capability: built for {OLDEST_CAPABILITY} and later, {here}")
        else:
            found.append(f"compute capability: built for {record.compute_capability}, {here}")
    if record.gpu_name is not None:
        compare("GPU", record.gpu_name, wish.gpu_name)
    graphs = [engine.graph for engine in record.engines]
    if wish.full_pass == "fused" and contract.FULL_PASS not in graphs:
        found.append("full pass: built for staged only, asked for fused")
    if record.content_sha256 != content_hash(manifest):
        found.append("the bundle's graphs or weights have changed since")
    for what, limit, wanted in (
        ("max_num_seqs", record.max_num_seqs, wish.max_num_seqs),
        ("max_model_len", record.max_model_len, wish.max_model_len),
    ):
        if wanted is not None and wanted > limit:
            found.append(f"{what}: built for up to {limit}, asked for {wanted}")
    return found


def choose_record(bundle: Path, manifest: Manifest, wish: EngineWish) -> tuple[Path, EngineRecord]:
    """The newest engines of the bundle that serve the wish, one built for this very GPU before one for any; where no length is
    asked for, those of the greatest, so that a later, shorter build does not refuse what ran before.

    Raises:
        BackendError: none does; says what is wrong with the closest, and the command that builds fitting ones.
        BundleError: no record can be read. One that cannot be, beside others that can, is passed over with a warning.
    """
    damaged: list[BundleError] = []
    candidates = [
        (mismatches(record, manifest, wish), path, record) for path, record in records(bundle, damaged=damaged)
    ]
    if damaged and not candidates:
        raise damaged[0]
    for error in damaged:
        logger.warning("passed over: %s", error)
    fitting = [(path, record) for why, path, record in candidates if not why]
    if fitting:
        length = 0 if wish.max_model_len is not None else 1
        return min(fitting, key=lambda item: (item[1].compute_capability == ANY_GPU, -length * item[1].max_model_len))
    if not candidates:
        raise BackendError(f"{bundle} has no engines; build them with: {build_command(bundle, wish)}")
    why, path, record = min(candidates, key=lambda item: len(item[0]))
    command = build_command(bundle, _filled(wish, record))
    others = f" (and {len(candidates) - 1} more that do not fit)" if len(candidates) > 1 else ""
    raise BackendError(f"{path}{others} does not fit: {'; '.join(why)}; build engines that do with: {command}")


def require_fit(bundle: Path, directory: Path, manifest: Manifest, wish: EngineWish) -> EngineRecord:
    """The record of one directory. BackendError where its engines do not serve the wish; BundleError as in read_record."""
    record = read_record(directory)
    if why := mismatches(record, manifest, wish):
        command = build_command(bundle, _filled(wish, record))
        raise BackendError(f"{directory} does not fit: {'; '.join(why)}; build engines that do with: {command}")
    return record


def _filled(wish: EngineWish, record: EngineRecord) -> EngineWish:
    """The wish, and what the record served besides."""
    return EngineWish(
        backend=wish.backend or record.backend,
        version=wish.version,
        compute_capability=wish.compute_capability if _is_named(record, wish) else None,
        gpu_name=wish.gpu_name,
        full_pass="fused" if any(e.graph == contract.FULL_PASS for e in record.engines) else wish.full_pass,
        max_num_seqs=max(wish.max_num_seqs or 1, record.max_num_seqs),
        max_model_len=max(wish.max_model_len or 1, record.max_model_len),
        prefill_chunk=record.prefill_chunk,
    )


def _is_named(record: EngineRecord, wish: EngineWish) -> bool:
    """Whether engines like the record's can be built for the wish's GPU alone; those for any GPU serve one that is not named."""
    return record.compute_capability != ANY_GPU and wish.compute_capability in (
        record.supported or (wish.compute_capability,)
    )


def build_command(bundle: Path, wish: EngineWish) -> str:
    """The `dmtd build` command for a wish."""
    words = [f"dmtd build {shlex.quote(str(bundle))}"]
    if wish.backend is not None:
        words.append(f"--backend {wish.backend}")
    if wish.compute_capability is not None and wish.backend == "tensorrt-rtx":
        words.append(f"--compute-capability {wish.compute_capability}")
    if wish.full_pass == "fused":
        words.append("--fused")
    if wish.max_num_seqs is not None:
        words.append(f"--max-num-seqs {wish.max_num_seqs}")
    if wish.max_model_len is not None:
        words.append(f"--max-model-len {wish.max_model_len}")
    if wish.prefill_chunk not in (None, contract.MIN_WINDOW):
        words.append(f"--prefill-chunk {wish.prefill_chunk}")
    return " ".join(words)
