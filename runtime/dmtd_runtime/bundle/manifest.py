"""The bundle's manifest: what the exporter writes and what every reader checks first. JSON, no code, no torch.

Reading order of a consumer: :func:`load_manifest` (shape and schema), :meth:`Manifest.check_files` (sizes; hashes on demand).
The records themselves stand in ``records``.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shlex
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from dmtd_errors.pointers import lfs_pointer
from dmtd_errors.words import counted, reason, shown
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.json_records import decode
from dmtd_runtime.bundle.records import CALIBRATED as CALIBRATED
from dmtd_runtime.bundle.records import DTYPE_BYTES as DTYPE_BYTES
from dmtd_runtime.bundle.records import PAGE_BYTES as PAGE_BYTES
from dmtd_runtime.bundle.records import BlockFormat as BlockFormat
from dmtd_runtime.bundle.records import CalibrationInfo as CalibrationInfo
from dmtd_runtime.bundle.records import CycleInfo as CycleInfo
from dmtd_runtime.bundle.records import FileInfo as FileInfo
from dmtd_runtime.bundle.records import GraphInfo as GraphInfo
from dmtd_runtime.bundle.records import Manifest as Manifest
from dmtd_runtime.bundle.records import ModelInfo as ModelInfo
from dmtd_runtime.bundle.records import TensorInfo as TensorInfo
from dmtd_runtime.bundle.records import WeightInfo as WeightInfo
from dmtd_runtime.bundle.records import safe_relative as safe_relative
from dmtd_runtime.bundle.records import sha256_of as sha256_of
from dmtd_runtime.errors import BundleError
from dmtd_runtime.version import __version__


def _unreachable(path: Path) -> str | None:
    """Why nothing can be said of a path: no right to pass a directory above it, a ring of links, a name that is too long."""
    try:
        path.stat()
    except FileNotFoundError:
        return (
            f"{path} is a link to {path.readlink()}, which is not there; mend the link" if path.is_symlink() else None
        )
    except NotADirectoryError:
        return None
    except (OSError, ValueError) as error:  # ValueError: a null byte
        return f"{path} cannot be reached: {reason(error)}; mend that, or name another directory"
    return None


def load_manifest(directory: Path) -> Manifest:
    """Read and check ``directory``/manifest.json. Raises BundleError in one line for whatever is wrong with it."""
    path = directory / contract.MANIFEST_FILE
    problem = _unreachable(directory) or _unreachable(path)
    if problem is not None:
        raise BundleError(problem)
    if not directory.is_dir():
        fault = "is a file, so it is not a bundle" if directory.exists() else "does not exist"
        is_free = directory.parent.is_dir() and not directory.exists()
        place = shlex.quote(str(directory)) if is_free else "OUT"
        raise BundleError(f"{directory} {fault}; make a bundle with: dmtd export MODEL -o {place}")
    if not path.is_file():
        raise BundleError(
            f"{directory} has no manifest.json, so it is not a bundle; make one with: dmtd export MODEL -o OUT"
        )
    if (pointer := lfs_pointer(path)) is not None:
        raise BundleError(f"{path}: {pointer}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {reason(error)}; mend that") from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read as JSON ({reason(error)}); export the bundle again") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("schema"), int):
        raise BundleError(f"{path} has no integer 'schema'; it is not a DMTD bundle's manifest")
    if raw["schema"] < contract.OLDEST_SCHEMA:
        raise BundleError(
            f"{path} has schema {raw['schema']}, expected {contract.OLDEST_SCHEMA} or later: another version of dmtd made it; "
            "export the bundle again"
        )
    if raw["schema"] > contract.SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema {raw['schema']}, this version reads up to {contract.SCHEMA_VERSION}; {_UPGRADE}"
        )
    try:
        manifest: Manifest = decode(Manifest, raw, "manifest")
        for name in manifest.files:
            safe_relative(name)
        for look in _LOOKS:
            for fault in look(manifest):
                raise ValueError(fault)
    except (TypeError, ValueError) as error:
        newer = _is_newer(raw.get("tools"))
        raise BundleError(f"{path}: {error}; {_UPGRADE if newer else 'export the bundle again'}") from None
    return manifest


_UPGRADE = "upgrade with: pip install -U dmtd"


def _is_newer(tools: object) -> bool:
    """Whether a version later than this one wrote the manifest: what is wrong with it here may be a format of its own."""
    made_by = tools.get("dmtd") if isinstance(tools, dict) else None
    return isinstance(made_by, str) and _numbers(made_by) > _numbers(__version__)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def _faults_of_split(manifest: Manifest) -> Iterator[str]:
    """The split, and sizes without which nothing else can be looked at."""
    cycle, model = manifest.cycle, manifest.model
    parts = (cycle.encoding_layers, cycle.thinking_layers, cycle.decoding_layers)
    if sum(parts) != model.num_layers or min(parts) < 0 or min(parts[1:]) < 1 or cycle.cycle_length < 1:
        yield (
            f"split E{parts[0]} T{parts[1]} D{parts[2]} with cycle length {cycle.cycle_length} "
            f"does not fit {model.num_layers} layers"
        )
    if not (cycle.trained_for or "").isprintable():
        yield f"cycle.trained_for is {shown(cycle.trained_for)}, expected words"
    for name in _SIZES:
        if (size := getattr(model, name)) < 1:
            yield f"model.{name} is {size}, expected at least 1"
    if not model.max_window >= contract.MIN_WINDOW or cycle.cycle_length > model.max_window:
        yield (
            f"max_window is {model.max_window}, expected at least {contract.MIN_WINDOW} and the cycle length "
            f"{cycle.cycle_length}"
        )
    for name in contract.ROTARY_TABLES:
        rows = next(iter(manifest.weights[name].shape), 0) if name in manifest.weights else 0
        if rows != model.max_model_len + model.max_window:
            yield (
                f"{name} has {rows} rows, expected max_model_len + max_window = {model.max_model_len + model.max_window}"
            )


def _faults_of_files(manifest: Manifest) -> Iterator[str]:
    """Graphs are there, and in the list of files."""
    if not manifest.decoder_graphs:
        yield "lists no graphs"
    for graph in manifest.graphs:
        if graph.file not in manifest.files:
            yield f"graph file {graph.file} is not in the list of files"
        if graph.name == contract.CYCLE and graph.dialect != contract.ONNXRUNTIME:
            yield f"{graph.file} is a {graph.name} graph in the {graph.dialect} dialect, which has none"


_MAY_OVERLAP = ContextVar("weights may overlap", default=False)


@contextlib.contextmanager
def weights_may_overlap() -> Iterator[None]:
    """For bundles that serve measurements alone: while this lasts, tensors of what is opened may share bytes of their file."""
    before = _MAY_OVERLAP.set(True)
    try:
        yield
    finally:
        _MAY_OVERLAP.reset(before)


def _faults_of_weights(manifest: Manifest) -> Iterator[str]:
    """Tensors fill the weights file one behind another; a group of them begins at a page."""
    stored, end = manifest.files.get(contract.WEIGHTS_FILE), 0
    if stored is None:
        yield f"the list of files lacks {contract.WEIGHTS_FILE}"
        return
    in_blocks = {part: fmt for weight, fmt in manifest.quantised.items() for part in manifest.parts_of(weight)}
    if lacking := [part for part in in_blocks if part not in manifest.weights]:
        yield f"{lacking[0]} of a quantised weight is not among the weights"
        return
    for name, info in sorted(manifest.weights.items(), key=lambda item: item[1].offset):
        allowed = _dtypes_of(name, in_blocks.get(name), manifest.model.dtype)
        if info.dtype not in allowed or not info.shape or min(info.shape) < 1:
            yield f"weight {name} is {info.dtype} {list(info.shape)}, expected {' or '.join(allowed)} and no empty shape"
            return
        if info.length != math.prod(info.shape) * DTYPE_BYTES[info.dtype]:
            yield f"weight {name} of shape {list(info.shape)} has {info.length} bytes"
        if _MAY_OVERLAP.get():
            end = max(end, info.offset + info.length)
            continue
        if info.offset not in (end, -(-end // PAGE_BYTES) * PAGE_BYTES):
            yield f"weight {name} begins at byte {info.offset}, the one before it ends at {end}"
        end = info.offset + info.length
    if end > stored.bytes if _MAY_OVERLAP.get() else end != stored.bytes:
        yield f"the weights end at byte {end}, {contract.WEIGHTS_FILE} has {stored.bytes}"


def _dtypes_of(name: str, fmt: BlockFormat | None, dtype: str) -> tuple[str, ...]:
    """What a stored tensor's type may be, ``fmt`` that of the weight which it is a part of."""
    if fmt is None:
        return (dtype,)
    codes = "float8_e4m3fn" if fmt.float8 else "uint8"
    return (codes,) if name.endswith(f".{contract.CODES}") else ("float16", "float32")


def _faults_of_blocks(manifest: Manifest) -> Iterator[str]:
    """Codes, scales and minimums of a quantised weight fit its format and one another."""
    for name, fmt in manifest.quantised.items():
        if not re.fullmatch(r"[\w-]{1,32}", fmt.source, re.ASCII):
            yield f"{name} is quantised from {shown(fmt.source)}, expected the name of a format"
        codes, *per_block = (manifest.weights[part].shape for part in manifest.parts_of(name))
        if fmt.factors and (fmt.bits, fmt.minimums, codes[1:2], per_block.pop()) != (8, False, (1,), (fmt.block,)):
            yield f"{name} has factors and codes {list(codes)}, expected one of each input, of 8 bits, and one scale an output"
        elif fmt.zeros and (fmt.bits != 4 or not fmt.minimums):
            yield f"{name} is quantised in {fmt.name} with zero points, which 4 bits with minimums alone have"
        elif fmt.block < 16 or not 2 <= fmt.levels <= 1 << fmt.bits or (fmt.float8 and (fmt.bits != 8 or fmt.minimums)):
            yield f"{name} is quantised in {fmt.name} with {fmt.levels} levels"
        elif len(codes) != 3 or codes[2] != fmt.code_bytes or any(shape != codes[:2] for shape in per_block):
            yield f"{name} has codes {list(codes)} and, a block, {list(map(list, per_block))}, which {fmt.name} has not"


def _faults_of_calibration(manifest: Manifest) -> Iterator[str]:
    """A text is a number of tokens and their digest, and something was measured over it."""
    formats = manifest.quantised.values()
    used = {
        "weights": any(fmt.source == CALIBRATED or fmt.factors for fmt in formats),
        "kv": manifest.model.cache_dtype == "int8",
    }
    for what, text in manifest.calibration.items():
        if not used.get(what):
            yield f"calibration names {shown(what)}, which nothing was measured for"
        elif text.num_tokens < 1 or not re.fullmatch(r"[0-9a-f]{64}", text.sha256):
            yield (
                f"calibration.{what} is {counted(text.num_tokens, 'token')} of SHA-256 {shown(text.sha256)}, expected at least "
                "1 and 64 hexadecimal digits"
            )


def _faults_of_model(manifest: Manifest) -> Iterator[str]:
    """The model's dimensions are those of its weights."""
    model, layer = manifest.model, "model.layers.0."
    hidden, head = model.hidden_size, model.head_dim
    expected = {
        "model.embed_tokens.weight": (model.vocab_size, hidden),
        f"{layer}self_attn.q_proj.weight": (model.num_heads * head, hidden),
        f"{layer}self_attn.k_proj.weight": (model.num_kv_heads * head, hidden),
        f"{layer}mlp.up_proj.weight": (model.intermediate_size, hidden),
    }
    expected |= dict.fromkeys(contract.ROTARY_TABLES, (model.max_model_len + model.max_window, head // 2))
    if not model.tie_word_embeddings:
        expected["lm_head.weight"] = (model.vocab_size, hidden)
    elif manifest.shape_of("lm_head.weight") is not None:
        yield "model.tie_word_embeddings is true, and lm_head.weight is stored"
    for name, shape in expected.items():
        found = manifest.shape_of(name)
        if found != shape:
            got = "missing" if found is None else str(list(found))
            yield f"weight {name} is {got}, expected {list(shape)} by the model's dimensions"
    ids = (*model.eos_token_ids, *(() if model.bos_token_id is None else (model.bos_token_id,)))
    if any(not 0 <= token < 1 << 31 for token in ids):
        yield f"token ids {list(ids)} of begin and end, expected none below 0 and none beyond 31 bits"


def _faults_of_caches(manifest: Manifest) -> Iterator[str]:
    """Caches have the model's type, or are int8 with a scale for each channel."""
    model = manifest.model
    if model.cache_dtype not in (model.dtype, "int8") or (model.cache_dtype == "int8" and model.dtype != "float32"):
        yield f"model.kv_dtype is {model.kv_dtype} in a model of {model.dtype}"
    if model.cache_dtype != "int8":
        return
    channels = (model.num_kv_heads * model.head_dim,)
    for layer in range(model.num_layers):
        for kind in contract.KINDS:
            info = manifest.weights.get(name := contract.kv_scale(layer, kind))
            if info is None or info.shape != channels or info.dtype != "float32":
                got = "missing" if info is None else f"{info.dtype} {list(info.shape)}"
                yield f"{name} is {got}, expected float32 {list(channels)} for caches in int8"


def _faults_of_graphs(manifest: Manifest) -> Iterator[str]:
    """What the list of a graph's inputs and outputs says is what the model's dimensions and the split say."""
    model, cycle = manifest.model, manifest.cycle
    layers = {
        contract.FULL_PASS: {*range(model.num_layers)},
        contract.THINKING: {*cycle.encoding_range, *cycle.thinking_range},
        contract.LATE_DECODE: {*cycle.encoding_range, *cycle.decoding_range},
        contract.CYCLE: {*range(model.num_layers)},
    }
    widths = {contract.THOUGHT: model.hidden_size, contract.NEW_THOUGHT: model.hidden_size}
    widths |= dict.fromkeys(map(contract.logits, range(contract.MAX_STEPS)), model.vocab_size)
    for graph in manifest.graphs:
        if graph.slots < 1 or graph.file != contract.graph_file(graph.name, graph.dialect, graph.slots):
            yield f"graph file {graph.file} for {graph.name}, {graph.dialect}, {counted(graph.slots, 'slot')}"
        steps = 1 + max((contract.step_of(info.name) for info in graph.outputs), default=0)
        if graph.name == contract.CYCLE and steps != min(cycle.cycle_length, contract.MAX_STEPS):
            yield f"{graph.file} has {counted(steps, 'step')}, but the cycle length is {cycle.cycle_length}"
        for side in (graph.inputs, graph.outputs):
            caches = {name.layer for info in side if (name := contract.cache_name(info.name))}
            if caches != layers.get(graph.name, set()):
                yield f"{graph.file} keeps caches of layers {sorted(caches)}, which the split does not say"
        for info in (*graph.inputs, *graph.outputs):
            if info.dtype not in DTYPE_BYTES or any(
                isinstance(dim, int) and not 0 < dim < 1 << 31 for dim in info.dims
            ):
                yield f"{graph.file}: {info.name} is {info.dtype} {list(info.dims)}"
            elif contract.cache_name(info.name) and (
                info.dims[1:] != (model.num_kv_heads, "capacity", model.head_dim) or info.dtype != model.cache_dtype
            ):
                yield f"{graph.file}: {info.name} is {info.dtype} {list(info.dims)}, which the model's dimensions do not say"
            elif info.name in widths and info.dims[-1:] != (widths[info.name],):
                yield f"{graph.file}: {info.name} is {list(info.dims)}, expected to end in {widths[info.name]}"
        if unknown := [name for name in graph.weights if name.partition("+")[0] not in manifest.weights]:
            yield f"{graph.file} reads {unknown[0]}, which is not among the weights"


_SIZES = (
    "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_model_len", "max_window",
)  # fmt: skip
_LOOKS = (
    _faults_of_split,
    _faults_of_files,
    _faults_of_weights,
    _faults_of_blocks,
    _faults_of_model,
    _faults_of_caches,
    _faults_of_calibration,
    _faults_of_graphs,
)
