"""Ways to spoil a bundle, and to recompute every hash and size of its manifest afterwards. For tests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from dmtd_export.bundle.weights import fingerprint_of

WEIGHTS = "model.onnx.data"
Edit = Callable[[onnx.ModelProto], None]


def reseal(bundle: Path) -> None:
    """Make the manifest's sizes and hashes those of the files as they are now."""
    with edited_manifest(bundle) as manifest:
        for name in manifest["files"]:
            content = (bundle / name).read_bytes()
            manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@contextmanager
def edited_manifest(bundle: Path) -> Iterator[dict]:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    yield manifest
    path.write_text(json.dumps(manifest))


@contextmanager
def edited_graph(bundle: Path, file: str) -> Iterator[onnx.ModelProto]:
    model = onnx.load(bundle / file, load_external_data=False)
    yield model
    (bundle / file).write_bytes(model.SerializeToString())


def edit_weight(bundle: Path, name: str, edit: Callable[[np.ndarray], None], *, refingerprint: bool = False) -> None:
    """Change a stored tensor in place; with ``refingerprint`` also the numbers that the manifest knows it by."""
    info = json.loads((bundle / "manifest.json").read_text())["weights"][name]
    tensor = np.memmap(bundle / WEIGHTS, info["dtype"], "r+", offset=info["offset"], shape=tuple(info["shape"]))
    edit(tensor)
    tensor.flush()
    if refingerprint:
        numbers = fingerprint_of(tensor)
        with edited_manifest(bundle) as manifest:
            manifest["weights"][name] |= {"norm": numbers.norm, "probe": numbers.probe}


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.name == name)


def nodes_of(model: onnx.ModelProto, op: str) -> list[onnx.NodeProto]:
    found = [n for n in all_nodes(model.graph) if n.op_type == op]
    assert found, f"no {op} node"
    return found


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of its branches."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from all_nodes(attribute.g)


def set_attribute(target: onnx.NodeProto, name: str, value: float) -> None:
    kept = [a for a in target.attribute if a.name != name]
    del target.attribute[:]
    target.attribute.extend([*kept, helper.make_attribute(name, value)])


def insert_before(model: onnx.ModelProto, target: onnx.NodeProto, slot: int, op: str, *more: str) -> None:
    """Put a node between an input of ``target`` and what feeds it."""
    name = f"{target.name}/spoiled_{slot}"
    added = helper.make_node(op, [target.input[slot], *more], [name], name=name)
    index = list(model.graph.node).index(target)
    target.input[slot] = name
    model.graph.node.insert(index, added)


def add_one(model: onnx.ModelProto, target: onnx.NodeProto, slot: int, dtype: str) -> None:
    """Add 1 to an integer input of ``target``."""
    constant = f"spoiled_one_{dtype}"
    if constant not in {tensor.name for tensor in model.graph.initializer}:
        model.graph.initializer.append(numpy_helper.from_array(np.array([1], dtype), constant))
    insert_before(model, target, slot, "Add", constant)


def swap_layers(model: onnx.ModelProto, first: int, second: int) -> None:
    """Let two layers read one another's weights."""
    names = {first: f"model.layers.{first}.", second: f"model.layers.{second}."}
    for n in model.graph.node:
        for slot, value in enumerate(n.input):
            for mine, other in ((first, second), (second, first)):
                if value.startswith(names[mine]):
                    n.input[slot] = value.replace(names[mine], names[other])
                    break


def rename_input(model: onnx.ModelProto, old: str, new: str) -> None:
    for value in model.graph.input:
        if value.name == old:
            value.name = new
    for n in model.graph.node:
        for slot, value in enumerate(n.input):
            if value == old:
                n.input[slot] = new


# Edits of a graph: what they do to its computation is in their names.


def ignore_gate(model: onnx.ModelProto) -> None:
    node(model, "/model/gate_thought/Where").CopyFrom(identity_of(node(model, "/model/gate_thought/Where"), 1))


def identity_of(where: onnx.NodeProto, slot: int) -> onnx.NodeProto:
    return helper.make_node("Identity", [where.input[slot]], list(where.output), name=where.name)


def invert_gate(model: onnx.ModelProto) -> None:
    insert_before(model, node(model, "/model/gate_hidden/Where"), 0, "Not")


def write_one_row_off(model: onnx.ModelProto) -> None:
    cache = node(model, "/model/layers.1/self_attn/value_cache/TensorScatter")
    add_one(model, cache, 2, "int64")


def length_one_off(model: onnx.ModelProto) -> None:
    gqa = nodes_of(model, "GroupQueryAttention")
    for one in gqa:
        if "layers.1/" in one.name:
            add_one(model, one, 5, "int32")


def other_scale(op: str) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        for one in nodes_of(model, op):
            if "layers.1/" in one.name:
                set_attribute(one, "scale", 0.3)

    return edit


def other_epsilon(model: onnx.ModelProto) -> None:
    for op in ("RMSNormalization", "SkipSimplifiedLayerNormalization"):
        for one in model.graph.node:
            if one.op_type == op and "layers.1/input_layernorm" in one.name:
                set_attribute(one, "epsilon", 1e-3)


def mask_one_more(model: onnx.ModelProto) -> None:
    """Every row sees one row too many: the one behind it."""
    less = next(n for n in model.graph.node if n.op_type == "LessOrEqual")
    add_one(model, less, 1, "int64")


def swapped(first: int, second: int) -> Edit:
    return lambda model: swap_layers(model, first, second)


# The cycle graph's branches


def other_likeliest(model: onnx.ModelProto) -> None:
    """A later step feeds the least likely token."""
    nodes_of(model, "ArgMax")[-1].op_type = "ArgMin"


def step_one_off(model: onnx.ModelProto) -> None:
    """A later step writes over the row of the one before."""
    [add] = [node for node in all_nodes(model.graph) if node.name == "/step2/seqlens_k/Add"]
    add.input[1] = "/constants/int32/1_rank1"


def caches_of_another_layer(model: onnx.ModelProto) -> None:
    """A further step's layer reads another layer's keys."""
    [node] = [n for n in nodes_of(model, "GroupQueryAttention") if n.name.startswith("/step1/model/layers.4/")]
    node.input[3] = node.input[3].replace(".4.", ".3.")


def another_embedding(model: onnx.ModelProto) -> None:
    """A later step's residual stream begins with the first one's hidden state."""
    [node] = [n for n in nodes_of(model, "Reshape") if n.name.startswith("/step1/model/embed_tokens/rows")]
    add = next(n for n in all_nodes(model.graph) if n.name.startswith("/step1/model/layers.3/post_attention_layernorm"))
    assert node.output[0] in add.input
    add.input[list(add.input).index(node.output[0])] = "/late/hidden"


def epsilon_of_the_window(model: onnx.ModelProto) -> None:
    [norm] = [n for n in all_nodes(model.graph) if n.name.startswith("/thinking/model/layers.1/input_layernorm")]
    set_attribute(norm, "epsilon", 1e-3)


def epsilon_of_the_last_step(model: onnx.ModelProto) -> None:
    """So small a fault that tokens are mostly the same ones."""
    [norm] = [n for n in all_nodes(model.graph) if n.name.startswith("/step2/model/layers.4/post_attention_layernorm")]
    set_attribute(norm, "epsilon", 1e-3)


def scale_of_the_last_step(model: onnx.ModelProto) -> None:
    [node] = [n for n in nodes_of(model, "GroupQueryAttention") if n.name.startswith("/step2/model/layers.4/")]
    node.attribute.append(onnx.helper.make_attribute("scale", 0.3))


def gate_left_out(model: onnx.ModelProto) -> None:
    """The first step of D reads its thought whatever the gate says."""
    [gate] = [n for n in nodes_of(model, "Where") if n.name.startswith("/step0/model/gate_thought")]
    gate.CopyFrom(identity_of(gate, 1))


def thought_left_out(model: onnx.ModelProto) -> None:
    """D of a full pass reads the thought that was given, and not T's."""
    [gate] = [n for n in nodes_of(model, "Where") if n.name.startswith("/step0/model/gate_thought")]
    gate.input[1] = "/model/thought/rows/Reshape_output_0"
