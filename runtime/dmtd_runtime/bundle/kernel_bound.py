"""What the kernels allow where weights are quantised: in few bits a step waits for products and no longer for bytes alone.

Two things that ``speed_bound`` does not know: four rows of a refill cost more than one row, and a weight of lm_head costs less
than one of a layer, which brings norms, activations and small matrices along. With c the time of a weight in one row and g what
every further row adds to it,

    rows(n) = 1 + g * (n - 1)
    plain   = (c(layers) + c(lm_head)) * rows(batch)
    cycle   = c(T) * rows(tau * batch) + tau * (c(E, D) + c(lm_head)) * rows(batch)
    bound   = tau * plain / cycle

The times are measured (``KERNELS``), so it is a bound for kernels like those, and an estimate for others. Float caches are read
as fast as float weights, by however many rows; those in int8 in half the time, and further rows cost something (``CACHES``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import BlockFormat, Manifest
from dmtd_runtime.bundle.speed_bound import LM_HEAD_NAME, matrices, split_bytes
from dmtd_runtime.ort.kernels.library import instruction_set

Kind = Literal["float", "int8", "int4", "int8-channel"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """Picoseconds of a weight in one row, in layers and in lm_head, and what every further row adds, as a share."""

    layers: float
    lm_head: float
    rows: float


# 2 cores of an AMD EPYC (Zen 4), ONNX Runtime 1.32: SmolLM2's 22 layers of T in one graph, and its lm_head, in ms at one row.
# With the runtime's own products and AVX-512 4 bits 2.36 and 0.45, 8 bits 3.27 and 0.94; with AVX2 2.44 and 0.47, 3.57 and 0.94.
# With ONNX Runtime's 3.29 and 0.65, 4.16 and 1.05, float32 11.6 and 3.8, whole numbers 5.26. What a further row adds is that of
# the products alone, at four rows: in 4 bits 1.7, 5.8 and 7.7 ps a weight, in 8 bits 1.2, 8.1 and 7.2.
ALWAYS: dict[Kind, Kernel] = {
    "float": Kernel(layers=149.0, lm_head=135.0, rows=0.02),
    "int8-channel": Kernel(layers=68.0, lm_head=37.0, rows=0.05),
}
KERNELS: dict[str | None, dict[Kind, Kernel]] = {
    "avx512": {
        **ALWAYS,
        "int8": Kernel(layers=42.0, lm_head=33.0, rows=0.03),
        "int4": Kernel(layers=30.0, lm_head=16.0, rows=0.06),
    },
    "avx2": {
        **ALWAYS,
        "int8": Kernel(layers=46.0, lm_head=33.0, rows=0.18),
        "int4": Kernel(layers=31.0, lm_head=17.0, rows=0.19),
    },
    None: {
        **ALWAYS,
        "int8": Kernel(layers=53.0, lm_head=37.0, rows=0.14),
        "int4": Kernel(layers=42.0, lm_head=23.0, rows=0.18),
    },
}
# Of a cached value: ONNX Runtime 1.32, one thread of an Intel Xeon, SmolLM2's 30 layers, contexts of 160 and 4000. What a step
# took longer over the latter: float32 82 ms at one row and 67 with a refill of four, int8 44 and 53.
CACHES = {"float": Kernel(layers=315.0, lm_head=0.0, rows=0.0), "int8": Kernel(layers=165.0, lm_head=0.0, rows=0.07)}


def kernel_bound(manifest: Manifest, context: float, batch: int = 1) -> float | None:
    """How many times faster than plain decoding the kernels allow DMTD to be.

    Those of this machine's instructions. None for float weights, where bytes say it, and without ONNX Runtime's own graphs,
    whose kernels were measured.
    """
    if not manifest.quantised or manifest.default_dialect != contract.ONNXRUNTIME:
        return None
    tau, split = manifest.cycle.cycle_length, split_bytes(manifest)
    kernel = CACHES["int8" if manifest.model.cache_dtype == "int8" else "float"]
    values = 2 * manifest.model.num_kv_heads * manifest.model.head_dim * batch * context
    encoding, thinking, decoding = (layers * values * kernel.layers for layers in split.num_layers)
    plain = cycle = 0.0
    for group, kind, count in _multiplied(manifest):
        product = KERNELS[instruction_set()][kind]
        once = count * (product.lm_head if group == "lm_head" else product.layers)
        plain += once * (1 + product.rows * (batch - 1))
        late = group != "thinking"
        rows = batch if late else tau * batch
        cycle += (tau if late else 1) * once * (1 + product.rows * (rows - 1))
    plain += encoding + thinking + decoding
    cycle += thinking * (1 + kernel.rows * (tau - 1)) + tau * (encoding + decoding)
    return tau * plain / cycle


def _multiplied(manifest: Manifest) -> Iterator[tuple[str, Kind, int]]:
    """(group, kind, weights) of every matrix that a step multiplies by; a tied embedding is lm_head."""
    tied = manifest.shape_of(LM_HEAD_NAME) is None
    for name, group, count in matrices(manifest):
        if group != "embedding" or tied:
            yield "lm_head" if group == "embedding" else group, _kind(manifest.quantised.get(name)), count


def _kind(fmt: BlockFormat | None) -> Kind:
    if fmt is None:
        return "float"
    return "int4" if fmt.bits == 4 else "int8-channel" if fmt.factors else "int8"
