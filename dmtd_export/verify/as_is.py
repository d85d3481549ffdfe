"""Graphs that are run as they are: in half precision, or with the inputs of products rounded to int8. Which, how, within what.

Beside them ``run`` holds all graphs, cast to float32 and rounding no inputs, to float32's margin.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from dmtd_export.verify.graph_checks import ordered
from dmtd_export.verify.graph_runs import OpenSession, open_evaluator, open_onnxruntime
from dmtd_export.verify.levels import float32_bytes
from dmtd_export.verify.margins import Margin, half_margin, rounding_margin, rounds_inputs
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import GraphInfo, Manifest

EVALUATOR_BYTES = 16 << 20  # float32 bytes of the largest model that ONNX's reference evaluator is asked to run


@dataclass(frozen=True, slots=True, kw_only=True)
class AsIs:
    """Graphs that run in their own type. ``twin``: of each one that rounds no inputs."""

    graphs: tuple[GraphInfo, ...]
    label: str
    margin: Margin
    open_session: OpenSession
    twin: bool = False


def margins_as_is(manifest: Manifest) -> tuple[Margin | None, ...]:
    """Those that graphs are held to as they are: half precision's, and that of inputs rounded to int8."""
    model = manifest.model
    half = None if model.dtype == "float32" else half_margin(model.dtype, model.num_layers)
    return (half, rounding_margin(manifest) if rounds_inputs(manifest) and model.dtype != "bfloat16" else None)


def standard_graphs(manifest: Manifest) -> tuple[GraphInfo, ...]:
    """Those in the standard dialect."""
    return tuple(graph for graph in ordered(manifest) if graph.dialect == contract.STANDARD)


def is_evaluated(manifest: Manifest) -> bool:
    """Whether a bfloat16 bundle is small enough for the evaluator, which multiplies element by element."""
    return manifest.model.dtype == "bfloat16" and float32_bytes(manifest) <= EVALUATOR_BYTES


def as_is_runs(manifest: Manifest) -> list[AsIs]:
    """The graphs in half precision or with rounded inputs that can run as they are, how, and within what."""
    half, rounded = margins_as_is(manifest)
    # The kernels do not know of slots, and their graphs are held to the closer margin of ``run``.
    own = (graph for graph in ordered(manifest) if graph.dialect == contract.ONNXRUNTIME)
    single, prepacked = tuple(g for g in own if g.slots == 1), partial(open_onnxruntime, prepack=True)
    dtype, runs = manifest.model.dtype, []
    if rounded is not None:
        runs.append(AsIs(graphs=single, label=", as it is,", margin=rounded, open_session=prepacked))
    if half is None:
        return runs
    if dtype == "float16" and rounds_inputs(manifest):  # what a GPU's kernels compute, which round none
        label = ", in float16, inputs not rounded,"
        runs.append(AsIs(graphs=single, label=label, margin=half, open_session=prepacked, twin=True))
    if dtype == "float16":
        graphs = standard_graphs(manifest) if rounds_inputs(manifest) else tuple(ordered(manifest))
        runs.append(AsIs(graphs=graphs, label=", as it is,", margin=half, open_session=open_onnxruntime))
    elif is_evaluated(manifest):
        label = ", as it is in ONNX's evaluator,"
        runs.append(AsIs(graphs=standard_graphs(manifest), label=label, margin=half, open_session=open_evaluator))
    return runs
