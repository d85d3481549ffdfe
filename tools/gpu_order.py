"""What tools/gpu_check does, as plain data: steps in the order of their worth, each with the seconds that it may take.

A step runs in a process of its own (tools/gpu_step.py has a function for each ``do``), so one that crashes or hangs costs itself
only. Needs no package: what it takes to run a step stands in its options.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

ENGINE_SECONDS = 900
LARGEST_VERIFIED = 4  # sequences at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A bundle that steps need; the name says what it is. ``weights``: their format, None for floats; not of a ring."""

    shape: str
    dtype: str
    tau: int = 4
    late: int = 8
    weights: str | None = None

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.shape, self.dtype, self.weights, f"tau{self.tau}-d{self.late}")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing to find out.

    ``do`` is a function of gpu_step.py, called with ``options`` and the paths of ``bundles``. ``after`` names a step without
    whose success this one is not tried; ``environ`` is added to the environment.
    """

    name: str
    do: str
    limit_s: float
    options: dict[str, Any] = field(default_factory=dict)
    bundles: tuple[Wanted, ...] = ()
    after: str | None = None
    environ: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """On what the order is run: the models of a check, or of a rehearsal."""

    device: str
    small: Wanted
    small_float32: Wanted
    large: Wanted
    tiny_dtypes: tuple[str, ...]
    tiny_batches: tuple[int, ...]
    contexts: tuple[int, int]
    new_tokens: int
    many: int
    max_model_len: int
    repeats: int = 3
    copy_bytes: int = 1 << 30
    cudnn_attention: str = "1"


CHECK = Sizes(
    device="cuda",
    small=Wanted(shape="smollm2", dtype="bfloat16"),
    small_float32=Wanted(shape="smollm2", dtype="float32"),
    large=Wanted(shape="qwen3-4b", dtype="bfloat16"),
    tiny_dtypes=("float16", "bfloat16"),
    tiny_batches=(1, 4),
    contexts=(128, 1024),
    new_tokens=128,
    many=8,
    max_model_len=2048,
)

MATRIX = replace(CHECK, tiny_dtypes=(), many=32, max_model_len=4096 + 256)


def rehearsal(device: str, *, real_small: bool = False) -> Sizes:
    """The same on tiny models; ``device`` cpu has kernels for float32 only."""
    half = "float32" if device == "cpu" else "bfloat16"
    shape, split = ("smollm2", {}) if real_small else ("tiny", {"tau": 3, "late": 2})
    return Sizes(
        device=device,
        small=Wanted(shape=shape, dtype=half, **split),
        small_float32=Wanted(shape=shape, dtype="float32", **split),
        large=Wanted(shape="tiny-ring", dtype=half, late=2),
        tiny_dtypes=("float32",) if device == "cpu" else CHECK.tiny_dtypes,
        tiny_batches=CHECK.tiny_batches,
        contexts=(16, 32),
        new_tokens=25,
        many=2,
        max_model_len=96,
        repeats=1,
        copy_bytes=1 << 26,
        cudnn_attention="0",  # the stand-in of cuDNN has none
    )


def provider_steps(sizes: Sizes) -> Iterator[Step]:
    """ONNX Runtime's provider, the most telling steps first."""
    device = {"device": sizes.device}
    if sizes.device == "cuda":
        yield Step(name="provider", do="provider", limit_s=30)
        yield Step(name="copy bandwidth", do="bandwidth", limit_s=20, options={"bytes": sizes.copy_bytes})
    after = "provider" if sizes.device == "cuda" else None
    for dtype in sizes.tiny_dtypes:
        for batch in sizes.tiny_batches:
            yield Step(
                name=f"tokens tiny {dtype} batch {batch}",
                do="tokens",
                limit_s=40,
                options={**device, "batch": batch},
                bundles=tuple(Wanted(shape="tiny", dtype=kind, tau=3, late=2) for kind in ("float32", dtype)),
                after=after,
            )
    # One sequence first: only what a batch alone gets wrong stands between sequences. In float32 the standard dialect has no
    # fused attention: what is wrong there is layout, cache or lengths.
    standard, few = {**device, "dialect": "standard"}, LARGEST_VERIFIED
    for what, bundle, options, batch in (
        (sizes.small.dtype, sizes.small, device, 1),
        ("float32 standard, captured graphs", sizes.small_float32, {**standard, "cuda_graphs": True}, 1),
        ("float32 standard, no graphs", sizes.small_float32, {**standard, "cuda_graphs": False}, 1),
        (f"{sizes.small.dtype}, batch {few} too", sizes.small, device, few),
    ):
        yield verify_step(bundle, what, options, batch=batch, after=after)
    yield from _speed_steps(sizes, after)


def verify_step(bundle: Wanted, what: str, options: dict[str, Any], *, batch: int, after: str | None) -> Step:
    """A bundle held to the oracle at batch 1 and ``batch``."""
    return Step(
        name=f"verify {bundle.shape} {what}",
        do="verify",
        limit_s=60,
        options={"backend": options, "max_num_seqs": batch},
        bundles=(bundle,),
        after=after,
    )


def in_blocks(bundle: Wanted) -> tuple[Wanted, ...]:
    """The bundle with quantised weights: in 4 bits with minimums, which take a second product, and in 8."""
    return tuple(replace(bundle, weights=weights) for weights in ("int4", "int8"))


def _speed_steps(sizes: Sizes, after: str | None) -> Iterator[Step]:
    device, (short, long) = {"device": sizes.device}, sizes.contexts
    small, large = sizes.small, sizes.large
    for bundle in (small, large):
        for context in (short, long):
            yield bench_step(sizes, bundle, device, context=context, after=after)
    for bundle in in_blocks(small):
        way = f" {bundle.weights}"
        yield verify_step(bundle, small.dtype + way, device, batch=LARGEST_VERIFIED, after=after)
        for batch in (1, sizes.many):
            yield bench_step(sizes, bundle, device, context=short, batch=batch, after=after, way=way)
    cudnn, note = {"ORT_ENABLE_CUDNN_FLASH_ATTENTION": sizes.cudnn_attention}, ", cuDNN attention"
    yield bench_step(sizes, large, device, context=long, after=after, note=note, environ=cudnn)
    captured, apart = ({**device, "dialect": "onnxruntime", "cuda_graphs": graphs} for graphs in (True, False))
    yield bench_step(sizes, small, captured, context=short, after=after, note=", captured graphs")
    yield bench_step(sizes, large, captured, context=short, after=after, note=", captured graphs")
    yield bench_step(sizes, small, apart, context=short, after=after, note=", no graphs")
    yield bench_step(sizes, large, device, context=short, batch=sizes.many, after=after)
    yield bench_step(sizes, large, apart, context=short, after=after, note=", no graphs")
    yield bench_step(sizes, small, device, context=short, batch=sizes.many, after=after)


def bench_step(
    sizes: Sizes,
    bundle: Wanted,
    options: dict[str, Any],
    *,
    context: int,
    batch: int = 1,
    after: str | None,
    note: str = "",
    environ: dict[str, str] | None = None,
    way: str = "",
    limit_s: float = 45,
) -> Step:
    """Plain beside DMTD at one batch and context."""
    return Step(
        name=f"bench {bundle.shape} {bundle.dtype}{way} batch {batch} context {context}{note}",
        do="bench",
        limit_s=limit_s,
        options={
            "backend": {**options, "max_model_len": sizes.max_model_len},
            "bench": {
                "batches": [batch],
                "prompt_len": context,
                "max_tokens": sizes.new_tokens,
                "repeats": sizes.repeats,
                "warmup": 1,
            },
        },
        bundles=(bundle,),
        after=after,
        environ=environ or {},
    )


def engine_steps(backend: str, sizes: Sizes, bundles: tuple[Wanted, ...]) -> Iterator[Step]:
    """Engines of one library: build, verify, bench."""
    library, options = f"library {backend}", {"backend": backend}
    yield Step(name=library, do="library", limit_s=60, options={"backend": backend})
    for bundle in bundles:
        build = f"build {bundle.shape} {bundle.dtype} {backend}"
        yield Step(
            name=build,
            do="build",
            limit_s=ENGINE_SECONDS,
            options={"backend": backend, "max_num_seqs": sizes.many, "max_model_len": sizes.max_model_len},
            bundles=(bundle,),
            after=library,
        )
        if bundle.shape in (sizes.small.shape, "tiny", "smollm2"):  # the oracle of a large one takes too long
            yield Step(
                name=f"verify {bundle.shape} {bundle.dtype} {backend}",
                do="verify",
                limit_s=ENGINE_SECONDS,
                options={"backend": options, "max_num_seqs": min(LARGEST_VERIFIED, sizes.many)},
                bundles=(bundle,),
                after=build,
            )
        for context in sizes.contexts[: 1 if backend == "simulator" else 2]:
            for batch in (1, sizes.many):
                yield bench_step(
                    sizes,
                    bundle,
                    options,
                    context=context,
                    batch=batch,
                    after=build,
                    way=f" {backend}",
                    limit_s=ENGINE_SECONDS,
                )


def check_steps() -> list[Step]:
    """The order of a check."""
    engines = [engine_steps(name, CHECK, (CHECK.small, CHECK.large)) for name in ("tensorrt", "tensorrt-rtx")]
    return [*provider_steps(CHECK), *(step for steps in engines for step in steps)]


def rehearsal_steps(device: str, *, real_small: bool = False) -> list[Step]:
    """The same order over tiny models: on stand-ins of CUDA's libraries, or on the CPU; and engines on the simulator."""
    host = rehearsal("cpu")
    return [*provider_steps(rehearsal(device, real_small=real_small)), *engine_steps("simulator", host, (host.small,))]


def matrix_steps() -> list[Step]:
    """The check, then every shape, type, split, batch and context."""
    steps = {step.name: step for step in check_steps()}
    for shape in ("smollm2", "qwen3-0.6b", "qwen3-4b"):
        for dtype in ("bfloat16", "float16"):
            for tau in (4, 3, 2):
                for late in (8, 16):
                    bundle = Wanted(shape=shape, dtype=dtype, tau=tau, late=late)
                    for step in _matrix_cells(bundle):
                        steps.setdefault(step.name, step)
    return list(steps.values())


def _matrix_cells(bundle: Wanted) -> Iterator[Step]:
    split = f" tau{bundle.tau} d{bundle.late}"
    for context in (128, 1024) if bundle.shape == "smollm2" else (128, 1024, 4096):
        for batch in (1, 2, 4, 8, 16, 32):
            yield bench_step(
                MATRIX,
                bundle,
                {"device": "cuda"},
                context=context,
                batch=batch,
                after="provider",
                way=split,
                limit_s=300,
            )
    for backend in ("tensorrt", "tensorrt-rtx"):
        for step in engine_steps(backend, MATRIX, (bundle,)):
            yield _named(step, split)


def _named(step: Step, split: str) -> Step:
    if step.do == "library":
        return step
    after = step.after if step.after is None or step.after.startswith("library") else step.after + split
    return replace(step, name=step.name + split, after=after)
