"""Level ``structure``: the files, the manifest, the graphs and the weights agree with one another. No torch, no ONNX
Runtime.

1. Every listed file has its size and SHA-256.
2. Every weight stands where the manifest says, and reproduces its norm and probe: a weight altered in place is named
   even where the hashes were recomputed.
3. Every graph file has the inputs and outputs of the contract and of the manifest, opset 24, IR 10, passes
   onnx.checker in full, reads its weights from the manifest's places and from nowhere else, and rounds the inputs of
   products over blocks to int8.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import onnx

from dmtd_errors.words import kind_of, reason
from dmtd_export.bundle.split import spec_of
from dmtd_export.bundle.weights import PROBE_RTOL, Fingerprint, fingerprint_of, map_tensor
from dmtd_export.graphs.build import build_graph
from dmtd_export.graphs.checking import checker_fault
from dmtd_export.graphs.layers import COS, SIN
from dmtd_export.graphs.linear import ACCURACY_LEVEL, offset_product
from dmtd_export.graphs.rows import GraphSpec
from dmtd_export.graphs.writer import CONTRIB_DOMAIN, IR_VERSION, ONNX_DTYPES, OPSET, OWN_DOMAIN
from dmtd_export.verify.exact import PRODUCT
from dmtd_export.verify.exact_channels import all_nodes
from dmtd_export.verify.report import Check, Divergence
from dmtd_models.checkpoints.tensors import tensor_shapes
from dmtd_models.config.model import ModelConfig, Rope, read_config
from dmtd_models.errors import ModelError
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import (
    DTYPE_BYTES,
    GraphInfo,
    Manifest,
    TensorInfo,
    safe_relative,
    sha256_of,
)
from dmtd_runtime.errors import BundleError

ATTENTION_ATTRIBUTES = {
    "Attention": {"scale"},
    "GroupQueryAttention": {
        *("num_heads", "kv_num_heads", "do_rotary", "scale"),
        *("k_quant_type", "v_quant_type", "kv_cache_bit_width"),
    },
}
GRAPH_BYTES_LIMIT = 4 << 20  # a graph holds no weights; 60 layers for 8 slots stay under 1.5 MB
OnDone = Callable[[], None]


def steps(manifest: Manifest) -> int:
    """How many times ``check_structure`` calls ``on_done``."""
    return len(manifest.files) + len(manifest.weights) + len(manifest.graphs)


def check_structure(directory: Path, manifest: Manifest, on_done: OnDone = lambda: None) -> list[Check]:
    """All structural checks, cheapest first; a missing or truncated file ends them."""
    files = _check("files: size and SHA-256", _files(directory, manifest, on_done), len(manifest.files))
    if files.divergence is not None and "SHA-256" not in files.divergence.detail:
        return [files]
    layout = _check("weights: places and shapes", _layout(directory, manifest), len(manifest.weights))
    if not layout.ok:
        return [files, layout]
    # Where the numbers name a tensor, they say more than the hash of the file it stands in.
    weights = _check("weights: norm and probe", _fingerprints(directory, manifest, on_done), len(manifest.weights))
    graphs = _check("graphs: contract, checker, weights", _graphs(directory, manifest, on_done), len(manifest.graphs))
    checks = [files, layout, weights, graphs]
    return checks if weights.ok else [layout, weights, files, graphs]


def model_config(directory: Path) -> ModelConfig | None:
    """The architecture from the bundle's config.json; None where it has none that can be read."""
    try:
        return _described(directory)
    except BundleError:
        return None


def _described(directory: Path) -> ModelConfig | None:
    """The architecture from the bundle's config.json; None where it has none.

    Raises:
        BundleError: it describes no model.
    """
    path = directory / contract.CONFIG_FILE
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ModelError(f"got {kind_of(raw)}, expected an object")
        return read_config(raw)[0]
    except (OSError, ValueError, RecursionError) as error:  # ModelError is a ValueError
        raise BundleError(f"describes no model: {reason(error)}; export the bundle again") from None


def layer_of(weight: str) -> int | None:
    """The absolute layer that a weight's name carries."""
    parts = weight.split(".")
    return int(parts[2]) if weight.startswith("model.layers.") and parts[2].isdigit() else None


def _check(name: str, found: Iterator[Divergence], cases: int) -> Check:
    all_found = list(found)
    first = all_found[0] if all_found else None
    detail = "" if first is None else f"{len(all_found)} of {cases}: {first}"
    return Check(name=name, level="structure", ok=first is None, cases=cases, detail=detail, divergence=first)


def _files(directory: Path, manifest: Manifest, on_done: OnDone) -> Iterator[Divergence]:
    for required in (contract.WEIGHTS_FILE, *(graph.file for graph in manifest.graphs)):
        if required not in manifest.files:
            yield Divergence(graph=required, detail="the manifest's list of files lacks it")
    for name in manifest.unlisted_assets(directory):
        yield Divergence(graph=name, detail="not in the manifest's list of files")
    for name, info in manifest.files.items():
        on_done()
        path = directory / safe_relative(name)
        if path.is_file() and not os.access(path, os.R_OK):
            yield Divergence(graph=name, detail="cannot be read; mend its permissions")
            continue
        if not path.is_file():
            yield Divergence(
                graph=name, got="missing", expected=f"{info.bytes} bytes", detail="export the bundle again"
            )
        elif (size := path.stat().st_size) != info.bytes:
            yield Divergence(
                graph=name, got=f"{size} bytes", expected=f"{info.bytes} bytes", detail="truncated or altered"
            )
        elif (digest := sha256_of(path)) != info.sha256:
            yield Divergence(graph=name, got=digest[:16], expected=info.sha256[:16], detail="SHA-256 differs: altered")


def _layout(directory: Path, manifest: Manifest) -> Iterator[Divergence]:
    size = (directory / contract.WEIGHTS_FILE).stat().st_size
    try:
        config = _described(directory)
    except BundleError as error:
        yield Divergence(graph=contract.CONFIG_FILE, detail=str(error))
    else:
        if config is not None:
            yield from _missing_weights(config, manifest)
    end = 0
    for name, info in sorted(manifest.weights.items(), key=lambda item: item[1].offset):
        count = DTYPE_BYTES[info.dtype]
        for dim in info.shape:
            count *= dim
        if info.length != count or info.offset < end or info.offset + info.length > size:
            detail = (
                f"{name} [{info.offset}, {info.offset + info.length}) overlaps, leaves the file or has another shape"
            )
            yield Divergence(graph=contract.WEIGHTS_FILE, layer=layer_of(name), detail=detail)
        end = info.offset + info.length


def _missing_weights(config: ModelConfig, manifest: Manifest) -> Iterator[Divergence]:
    for name, shape in tensor_shapes(config).items():
        got = manifest.shape_of(name) or "missing"
        if got != shape:
            yield Divergence(
                graph=contract.MANIFEST_FILE,
                layer=layer_of(name),
                got=str(got),
                expected=str(shape),
                detail=f"weight {name}",
            )
    model, same = manifest.model, ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    for key in same:
        if getattr(model, key) != getattr(config, key):
            yield Divergence(
                graph=contract.MANIFEST_FILE,
                got=str(getattr(model, key)),
                expected=str(getattr(config, key)),
                detail=f"model.{key} against config.json",
            )


def _fingerprints(directory: Path, manifest: Manifest, on_done: OnDone) -> Iterator[Divergence]:
    path = directory / contract.WEIGHTS_FILE
    for name, info in manifest.weights.items():
        on_done()
        got, expected = fingerprint_of(map_tensor(path, info)), Fingerprint(norm=info.norm, probe=info.probe)
        if not got.matches(expected):
            apart_in_norm = not abs(got.norm - expected.norm) <= PROBE_RTOL * expected.norm
            kind = "norm" if apart_in_norm else "probe"
            holds = "" if math.isfinite(got.norm) else f", which holds {'NaN' if math.isnan(got.norm) else 'infinity'}"
            yield Divergence(
                graph=contract.WEIGHTS_FILE,
                layer=layer_of(name),
                expected=getattr(expected, kind),
                got=getattr(got, kind),
                detail=f"{kind} of {name}{holds}: the weight is not the one that was exported",
            )


def _graphs(directory: Path, manifest: Manifest, on_done: OnDone) -> Iterator[Divergence]:
    by_offset = {info.offset: name for name, info in manifest.weights.items()}
    spec = GraphSpec(
        config=model_config(directory) or _config_of(manifest),
        dmtd=spec_of(manifest.cycle),
        dtype=manifest.model.dtype,
        kv_dtype=manifest.model.cache_dtype,
        weights=manifest.weights,
        quantised=manifest.quantised,
    )
    for graph in manifest.graphs:
        on_done()
        for detail in _graph_faults(directory, graph, spec, manifest, by_offset):
            yield Divergence(graph=graph.file, dialect=graph.dialect, detail=detail)


def _graph_faults(
    directory: Path, graph: GraphInfo, spec: GraphSpec, manifest: Manifest, by_offset: Mapping[int, str]
) -> Iterator[str]:
    path = directory / graph.file
    if path.stat().st_size > GRAPH_BYTES_LIMIT:
        yield f"{path.stat().st_size} bytes, expected at most {GRAPH_BYTES_LIMIT}: weights stand in a file of their own"
        return
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # noqa: BLE001 - protobuf raises its own kinds
        yield f"not an ONNX file ({error})"
        return
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if (
        model.ir_version != IR_VERSION
        or opsets.pop("", None) != OPSET
        or opsets.items() - {CONTRIB_DOMAIN: 1, OWN_DOMAIN: 1}.items()
    ):
        found = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
        yield f"IR {model.ir_version}, opsets {found}; expected IR {IR_VERSION}, opset {OPSET}, and 1 of other domains"
    yield from _io_faults(model, graph, build_graph(spec, graph.name, graph.dialect, graph.slots)[1])
    yield from _rounding_faults(model)
    yield from _attention_faults(model)
    yield from _function_faults(model)
    for tensor in model.graph.initializer:
        fault = _initializer_fault(tensor, manifest, by_offset, graph.dialect)
        if fault:
            yield f"initializer {tensor.name}: {fault}"
    if (refusal := checker_fault(path)) is not None:
        yield f"onnx.checker: {refusal}"


def _io_faults(model: onnx.ModelProto, graph: GraphInfo, agreed: GraphInfo) -> Iterator[str]:
    sides: tuple[tuple[str, Sequence[onnx.ValueInfoProto], Sequence[TensorInfo], Sequence[TensorInfo]], ...] = (
        ("input", model.graph.input, graph.inputs, agreed.inputs),
        ("output", model.graph.output, graph.outputs, agreed.outputs),
    )
    for side, actual_protos, declared, by_contract in sides:
        actual = [_tensor_info(value) for value in actual_protos]
        for where, expected in (("the manifest", declared), ("the contract", by_contract)):
            if [_text(x) for x in actual] != [_text(x) for x in expected]:
                pairs = zip([*map(_text, actual), "nothing"], [*map(_text, expected), "nothing"], strict=False)
                got, wanted = next(((a, b) for a, b in pairs if a != b), ("another count", str(len(expected))))
                yield f"{side} {got} in the file, {wanted} in {where}"
                break


def _rounding_faults(model: onnx.ModelProto) -> Iterator[str]:
    """The first product over blocks that rounds its inputs otherwise than it was exported; runs still meet their margins."""
    for node in all_nodes(model.graph):
        if node.op_type == PRODUCT:
            level = next((attribute.i for attribute in node.attribute if attribute.name == "accuracy_level"), 0)
            if level != ACCURACY_LEVEL:
                yield f"accuracy_level of {node.name}: got {level}, expected {ACCURACY_LEVEL}; export the bundle again"
                return


def _function_faults(model: onnx.ModelProto) -> Iterator[str]:
    """A function that says something else than its name, or is missing: the runtime reads the name, ONNX Runtime the text."""
    for function in model.functions:
        if function != offset_product():
            yield f"the function {function.domain}.{function.name} is none that is exported; export the bundle again"
            return
    written = {function.name for function in model.functions}
    for node in all_nodes(model.graph):
        if node.domain == OWN_DOMAIN and node.op_type not in written:
            yield f"the function {node.domain}.{node.op_type} is missing; export the bundle again"
            return


def _attention_faults(model: onnx.ModelProto) -> Iterator[str]:
    """The first attention with an attribute that none is exported with: a window over the past shows in long contexts alone."""
    for node in all_nodes(model.graph):
        known = ATTENTION_ATTRIBUTES.get(node.op_type)
        others = [attribute.name for attribute in node.attribute if known is not None and attribute.name not in known]
        if others:
            yield f"{node.name}: got the attribute {others[0]}, expected none but {', '.join(sorted(known or ()))}"
            return


def _tensor_info(value: onnx.ValueInfoProto) -> TensorInfo:
    kind = value.type.tensor_type
    names = {number: name for name, number in ONNX_DTYPES.items()}
    dims = tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)
    return TensorInfo(name=value.name, dims=dims, dtype=names.get(kind.elem_type, f"type {kind.elem_type}"))


def _text(info: TensorInfo) -> str:
    return f"{info.name} {info.dtype} [{', '.join(map(str, info.dims))}]"


def _initializer_fault(
    tensor: onnx.TensorProto, manifest: Manifest, by_offset: Mapping[int, str], dialect: contract.Dialect
) -> str:
    """Why an initializer is not exactly one stored tensor, or several that stand one behind another; empty if it is."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return "" if tensor.ByteSize() < 4096 else f"{tensor.ByteSize()} bytes inside the graph"
    place = {entry.key: entry.value for entry in tensor.external_data}
    if place.get("location") != contract.WEIGHTS_FILE:
        return f"stands in {place.get('location')}, expected {contract.WEIGHTS_FILE}"
    if not all(place.get(key, "0").isascii() and place.get(key, "0").isdigit() for key in ("offset", "length")):
        return f"stands at offset {place.get('offset')}, length {place.get('length')}, expected whole numbers"
    offset, length = int(place.get("offset", 0)), int(place.get("length", -1))
    names, rows, at = [], 0, offset
    tail: tuple[int, ...] = ()
    while at < offset + length and at in by_offset:
        name = by_offset[at]
        info, (tail, dtype) = manifest.weights[name], manifest.read_as(name, dialect)
        if tensor.data_type != ONNX_DTYPES[dtype]:
            return f"element type {tensor.data_type}, the manifest says {dtype}"
        names.append(name)
        rows, at = rows + info.shape[0], at + info.length
    expected_name = contract.stack_name(names) if names else "nothing"
    if at != offset + length or tensor.name != expected_name or tuple(tensor.dims) != (rows, *tail):
        there = f"{expected_name} {(rows, *tail)}"
        return f"reads [{offset}, {offset + length}) as {tuple(tensor.dims)}; the manifest has {there} there"
    return ""


def _config_of(manifest: Manifest) -> ModelConfig:
    """An architecture with the manifest's dimensions: enough for inputs and outputs, not for numbers."""
    model, first = manifest.model, "model.layers.0."
    if COS not in manifest.weights or SIN not in manifest.weights:
        raise BundleError("the manifest lists no rotary tables; export the bundle again")
    return ModelConfig(
        family=model.family,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        rms_norm_eps=1e-6,
        rope=Rope(theta=10000.0),
        tie_word_embeddings=model.tie_word_embeddings,
        max_positions=model.max_model_len,
        dtype=model.dtype,
        qkv_bias=f"{first}self_attn.q_proj.bias" in manifest.weights,
        o_bias=f"{first}self_attn.o_proj.bias" in manifest.weights,
        mlp_bias=f"{first}mlp.down_proj.bias" in manifest.weights,
        qk_norm=f"{first}self_attn.q_norm.weight" in manifest.weights,
    )
