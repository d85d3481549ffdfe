"""What a build will make: capacity, buckets, optimisation profiles, bytes. Pure numbers over manifest and options.

**Lengths.** A cache has one fixed capacity (TensorRT updates it in place only so). Attention reads the first ``visible_len``
rows, cut out of it. What TensorRT-RTX 1.7 makes of that was read from the scratch memory it plans (4 kv heads, 16 heads, head_dim
64, 2 sequences, capacity 4096: keys and values are 4.2 MB each):

| rows | visible_len | scratch | so it moves |
|---|---|---|---|
| 1 | the capacity, fixed | 0.01 MB | ``capacity`` rows, read in place |
| 1 | 1024, changing or fixed | 2.1 MB | 3 x 1024 rows: the cut is a copy |
| 4 | the capacity, fixed | 33.7 MB | 9 x ``capacity`` rows: copied, and repeated for each head of a group |
| 4 | 1024, changing | 2.1 MB | 3 x 1024 rows |

So late steps, which have one row, have two profiles: lengths up to a third of the capacity, where a copy moves less than the
whole cache, and the whole capacity, fixed. Prefill and refill have one, with lengths up to the capacity. Buckets are 256,
512, ... and the capacity.

    Qwen3-4B, bfloat16, 147 kB of cache a position, one sequence, context 200, a plain step over 8.0 GB of weights: bucket 256
    moves 0.11 GB. Without buckets it is 0.64 GB at capacity 4352 and 6.1 GB at 41216.

**Rows.** Prefill takes chunks of up to ``prefill_chunk`` rows, a refill 1 to tau, a late step 1; batches 1 to ``max_num_seqs``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from dmtd_export.engines.options import BuildOptions
from dmtd_export.errors import ExportError
from dmtd_export.options import MAX_NUM_SEQS_LIMIT, ExportOptions
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.contract import GraphName
from dmtd_runtime.bundle.engine_record import (
    ANY_GPU,
    EngineBackend,
    InputRange,
    PassKind,
    ProfileInfo,
    content_hash,
    default_full_pass,
)
from dmtd_runtime.bundle.manifest import Manifest, TensorInfo

SMALLEST_BUCKET = 256
CAPACITY_MULTIPLE = 64
COPY_FACTOR = 3  # rows moved for a row that is cut out of a cache
REVISION = 1  # of how engines are made from graphs; a change makes old engines stale

KINDS: dict[GraphName, tuple[PassKind, ...]] = {
    contract.THINKING: ("prefill", "refill"),
    contract.FULL_PASS: ("prefill", "refill"),
    contract.LATE_DECODE: ("prefill", "step"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What engines are for: library, and GPU as far as they are tied to one. ``supported``: those that the library names."""

    backend: EngineBackend
    version: str
    compute_capability: str = ANY_GPU
    gpu_name: str | None = None
    supported: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """For directory names: any-tensorrt-rtx-1.7.1.116."""
        gpu = ANY_GPU if self.compute_capability == ANY_GPU else "sm" + self.compute_capability.replace(".", "")
        return f"{gpu}-{self.backend}-{self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildPlan:
    """Sizes of a build. ``length_buckets`` end with the capacity."""

    graphs: tuple[GraphName, ...]
    max_num_seqs: int
    max_model_len: int
    capacity: int
    prefill_chunk: int
    cycle_length: int
    length_buckets: tuple[int, ...]
    batch_buckets: tuple[int, ...]

    @property
    def sliced_limit(self) -> int:
        """The longest bucket that a late step cuts out of its cache rather than read the whole; 0 if it never does."""
        return max((b for b in self.length_buckets if b * COPY_FACTOR <= self.capacity), default=0)


def plan_build(manifest: Manifest, options: BuildOptions) -> BuildPlan:
    """The sizes that options and bundle ask for.

    Raises:
        ExportError: a size that the bundle does not allow, or caches or weights that no engine takes.
    """
    model = manifest.model
    if model.cache_dtype == "int8":
        raise ExportError(
            "this bundle's caches are int8, which no engine takes; export it without --kv int8: dmtd export MODEL -o OUT "
            "--target tensorrt"
        )
    if any(fmt.factors for fmt in manifest.quantised.values()):
        raise ExportError(
            "this bundle has weights in int8-channel, which no engine takes; export it with others: dmtd export MODEL -o OUT "
            "--weights int8 --target tensorrt"
        )
    max_model_len = options.max_model_len
    if max_model_len is None:
        max_model_len = min(model.max_model_len, contract.DEVICE_MODEL_LEN)
    max_num_seqs = options.max_num_seqs
    if max_num_seqs is None:
        max_num_seqs = manifest.max_num_seqs or ExportOptions().max_num_seqs
    for name, got, least, most in (
        ("max_model_len", max_model_len, 2, model.max_model_len),
        ("max_num_seqs", max_num_seqs, 1, MAX_NUM_SEQS_LIMIT),
        ("prefill_chunk", options.prefill_chunk, manifest.cycle.cycle_length, model.max_window),
    ):
        if not least <= got <= most:
            raise ExportError(f"got {got}, expected {least} to {most}; choose one in that range", param=name)
    capacity = math.ceil((max_model_len + options.prefill_chunk) / CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
    wanted = default_full_pass(manifest) == "fused" if options.fused is None else options.fused
    fused: tuple[GraphName, ...] = (contract.FULL_PASS,) if wanted else ()
    return BuildPlan(
        graphs=(contract.THINKING, contract.LATE_DECODE, *fused),
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        capacity=capacity,
        prefill_chunk=options.prefill_chunk,
        cycle_length=manifest.cycle.cycle_length,
        length_buckets=length_buckets(capacity),
        batch_buckets=batch_buckets(max_num_seqs),
    )


def length_buckets(capacity: int) -> tuple[int, ...]:
    """256, 512, ... and ``capacity``."""
    sliced, bucket = [], SMALLEST_BUCKET
    while bucket < capacity:
        sliced.append(bucket)
        bucket *= 2
    return (*sliced, capacity)


def batch_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, ... and ``max_num_seqs``."""
    return tuple(sorted({max_num_seqs, *(1 << i for i in range(max_num_seqs.bit_length()) if 1 << i < max_num_seqs)}))


def profiles(plan: BuildPlan, name: GraphName, inputs: tuple[TensorInfo, ...]) -> tuple[ProfileInfo, ...]:
    """The optimisation profiles of an engine graph, in the order of their indices."""
    found: list[ProfileInfo] = []
    for kind in KINDS[name]:
        rows = {"prefill": plan.prefill_chunk, "refill": plan.cycle_length, "step": 1}[kind]
        late = rows if kind == "prefill" else 1
        sizes = {
            "batch": (1, 1, plan.max_num_seqs),
            "window_len": (1, rows, rows),
            "late_len": (1, late, late),
            "num_logits": (1, 1, 1),
        }
        for length in _lengths(plan, rows):
            found.append(
                ProfileInfo(
                    index=len(found),
                    kind=kind,
                    whole=length[0] == length[2],
                    max_rows=rows,
                    min_visible=length[0],
                    max_visible=length[2],
                    inputs=ranges(inputs, {**sizes, "visible_len": length}),
                )
            )
    return tuple(found)


def _lengths(plan: BuildPlan, rows: int) -> list[tuple[int, int, int]]:
    """Ranges (min, opt, max) of visible_len for passes of up to ``rows`` rows, the shorter first."""
    shortest, capacity = plan.length_buckets[0], plan.capacity
    whole = (capacity, capacity, capacity)
    if rows > 1:
        return [(shortest, capacity, capacity)]
    return [(shortest, plan.sliced_limit, plan.sliced_limit), whole] if plan.sliced_limit else [whole]


def choice_profile(plan: BuildPlan, inputs: tuple[TensorInfo, ...]) -> ProfileInfo:
    """The one profile of a graph that chooses tokens from logits."""
    sizes = {"batch": (1, 1, plan.max_num_seqs), "num_logits": (1, 1, 1)}
    return ProfileInfo(
        index=0, kind="choose", whole=False, max_rows=1, min_visible=0, max_visible=0, inputs=ranges(inputs, sizes)
    )


def ranges(inputs: tuple[TensorInfo, ...], sizes: Mapping[str, tuple[int, int, int]]) -> dict[str, InputRange]:
    """Shapes of the inputs that have a symbolic dimension. ExportError for one that ``sizes`` does not know."""
    found = {}
    for info in inputs:
        symbols = [dim for dim in info.dims if isinstance(dim, str)]
        if unknown := [dim for dim in symbols if dim not in sizes]:
            raise ExportError(f"{info.name}: got the dimension {unknown[0]}, expected {', '.join(sizes)}; export again")
        if symbols:
            shapes = (tuple(sizes[dim][i] if isinstance(dim, str) else dim for dim in info.dims) for i in range(3))
            found[info.name] = InputRange(**dict(zip(("min", "opt", "max"), shapes, strict=True)))
    return found


def engine_key(plan: BuildPlan, target: Target, manifest: Manifest, graphs: Iterable[bytes]) -> str:
    """Name of the directory: GPU, backend, version, and a digest of everything else that makes an engine what it is."""
    facts = {
        "revision": REVISION,
        "content": content_hash(manifest),
        "graphs": [hashlib.sha256(graph).hexdigest() for graph in graphs],
        "plan": asdict(plan),
        "gpu": target.gpu_name,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{target.label}-{digest[:12]}"
