"""What of a request to open a bundle ONNX Runtime can give, checked before anything is opened."""

from __future__ import annotations

from dmtd_runtime.backends.base import BackendOptions, FullPass
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.engine_record import default_full_pass
from dmtd_runtime.bundle.manifest import GraphInfo, Manifest
from dmtd_runtime.bundle.speed_bound import split_bytes
from dmtd_runtime.errors import BackendError, RequestError
from dmtd_runtime.ort.cuda_provider import check_cuda_provider
from dmtd_runtime.ort.library import import_onnxruntime

# Of a step that may run with others in one go. Where it reads more the host's part of it is small, and tokens are wanted one
# by one, as they come.
MAX_STEP_BYTES = 1 << 28


def runs_own_products(manifest: Manifest, options: BackendOptions) -> bool:
    """Whether products over blocks may be ours (``ort/kernels``), where the processor has them."""
    here = options.device == "cpu" and (options.dialect or manifest.default_dialect) == contract.ONNXRUNTIME
    return (
        here and options.kernels and options.prepack and bool(manifest.quantised) and manifest.model.dtype == "float32"
    )


def graph_slots(manifest: Manifest, options: BackendOptions) -> int:
    """Slots of the packed graphs to load: the fewest that hold ``max_num_seqs`` sequences."""
    stored = sorted({graph.slots for graph in manifest.graphs if graph.dialect == contract.ONNXRUNTIME})
    fitting = [slots for slots in stored if slots >= options.max_num_seqs]
    if not fitting:
        most = max(stored, default=0)
        raise RequestError(
            f"got {options.max_num_seqs}, expected 1 to {most}, what the bundle was exported for; for more sequences at a time "
            f"export it again: dmtd export ... --max-num-seqs {options.max_num_seqs}",
            param="max_num_seqs",
        )
    return fitting[0]


def max_model_len(manifest: Manifest, options: BackendOptions) -> int:
    limit = manifest.model.max_model_len
    if options.max_model_len is not None and not 1 <= options.max_model_len <= limit:
        raise RequestError(
            f"got {options.max_model_len}, expected 1 to {limit}, the bundle's limit", param="max_model_len"
        )
    return options.model_len(limit)


def runs_plain_alone(options: BackendOptions, *, packed: bool) -> bool:
    """Whether plain passes have the fused graph to themselves where nobody said: of one sequence on the CPU, which needs none of
    the cycle graph's branches. They cost a pass a twentieth.
    """
    usual = packed and options.device == "cpu" and options.full_pass is None
    return usual and options.plain and options.max_num_seqs == 1


def usual_full_pass(manifest: Manifest, options: BackendOptions, *, packed: bool) -> FullPass:
    """How a full pass runs where nobody said: with several sequences at a time as one in which prompts can ride."""
    if runs_plain_alone(options, packed=packed):
        return "fused"
    if options.full_pass is None and packed and options.device == "cpu" and options.max_num_seqs > 1:
        return "staged"
    return options.full_pass or default_full_pass(manifest)


def cycle_graph(manifest: Manifest, options: BackendOptions, *, packed: bool, slots: int) -> GraphInfo | None:
    """The one graph for all that runs, on the CPU, where the bundle has it and nobody asked for others."""
    if (
        not packed
        or options.device != "cpu"
        or options.full_pass is not None
        or runs_plain_alone(options, packed=packed)
    ):
        return None
    found = (graph for graph in manifest.graphs if graph.name == contract.CYCLE and graph.slots == slots)
    return next(found, None)


def runs_in_one_go(manifest: Manifest, *, plain: bool = False) -> bool:
    """Whether late steps, or plain ones, may run with others in one go: they read few weights."""
    read = split_bytes(manifest)
    return read.encoding + plain * read.thinking + read.decoding + read.lm_head <= MAX_STEP_BYTES


def check_dtype(manifest: Manifest, options: BackendOptions) -> None:
    dtype = manifest.model.dtype
    if options.device == "cpu" and dtype == "bfloat16":
        raise BackendError(
            "this bundle is bfloat16, which ONNX Runtime cannot run on the CPU; "
            "export it with --dtype float32, or use --device cuda"
        )
    if options.device == "cpu":
        return
    check_cuda_provider(import_onnxruntime())  # who has no provider wants to know that before anything of the bundle
    if manifest.model.cache_dtype == "int8":
        raise BackendError(
            "this bundle's caches are int8, which run on the CPU alone; export it without --kv int8 and with --dtype bfloat16"
        )
    dialect, formats = options.dialect or manifest.default_dialect, manifest.quantised.values()
    if dialect == contract.STANDARD and formats and (dtype == "bfloat16" or any(fmt.bits == 8 for fmt in formats)):
        what = "8 bits" if dtype != "bfloat16" else "bfloat16"
        raise BackendError(
            f"this bundle's standard graphs have weights in blocks, got {what}, and ONNX Runtime's CUDA provider dequantises 4 "
            "bits to float16 or float32 only; export it with --target onnxruntime, or build engines: dmtd build"
        )
    if dtype == "float32" and dialect == contract.ONNXRUNTIME:
        raise BackendError(
            "this bundle is float32, and GroupQueryAttention on CUDA takes float16 or bfloat16 only; "
            "export it with --dtype bfloat16"
        )
