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

Kind = Literal["float", "int8", "int4", "int8-channel"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """Picoseconds of a weight in one row, in layers and in lm_head, and what every further row adds, as a share."""

    layers: float
    lm_head: float
    rows: float


# ONNX Runtime 1.31, 2 cores of an AMD EPYC with AVX2: 18 layers of SmolLM2's shapes (63.7 M weights) and its lm_head (28.3 M),
# in ms at 1 row: float32 20.1 and 6.7, 8 bits 7.5 and 2.1, 4 bits 4.4 and 0.93, 8 bits in whole numbers 7.0 and 1.8; at 4 rows
# 21.5, 12.5, 7.0 and 6.7, at 8 rows of the last 9.8.
KERNELS: dict[Kind, Kernel] = {
    "float": Kernel(layers=315.0, lm_head=237.0, rows=0.02),
    "int8": Kernel(layers=118.0, lm_head=74.0, rows=0.22),
    "int4": Kernel(layers=69.0, lm_head=33.0, rows=0.20),
    "int8-channel": Kernel(layers=110.0, lm_head=64.0, rows=0.05),
}
# Of a cached value: ONNX Runtime 1.32, one thread of an Intel Xeon, SmolLM2's 30 layers, contexts of 160 and 4000. What a step
# took longer over the latter: float32 82 ms at one row and 67 with a refill of four, int8 44 and 53.
CACHES = {"float": Kernel(layers=315.0, lm_head=0.0, rows=0.0), "int8": Kernel(layers=165.0, lm_head=0.0, rows=0.07)}


def kernel_bound(manifest: Manifest, context: float, batch: int = 1) -> float | None:
    """How many times faster than plain decoding the kernels allow DMTD to be.

    None for float weights, where bytes say it, and without ONNX Runtime's own graphs, whose kernels were measured.
    """
    if not manifest.quantised or manifest.default_dialect != contract.ONNXRUNTIME:
        return None
    tau, split = manifest.cycle.cycle_length, split_bytes(manifest)
    kernel = CACHES["int8" if manifest.model.cache_dtype == "int8" else "float"]
    values = 2 * manifest.model.num_kv_heads * manifest.model.head_dim * batch * context
    encoding, thinking, decoding = (layers * values * kernel.layers for layers in split.num_layers)
    plain = cycle = 0.0
    for group, kind, count in _multiplied(manifest):
        product = KERNELS[kind]
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
