"""Valid inputs for the graphs of this bundle, for Polygraphy and for trying a graph by hand. Needs numpy only.

    polygraphy run thinking.ort.onnx --onnxrt --data-loader-script polygraphy_data.py

Random inputs are not valid ones: lengths, row indices and write indices must fit one another. ``load_data`` takes the graph
from the command line (a file name of this bundle among the arguments) or from the variable DMTD_GRAPH.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
CAPACITY = 64  # rows of the caches made here
COMMITTED = 7  # rows that count as already written
ROWS = 4  # rows of the window


def load_data():
    """Yield one feed dictionary: name -> array, for the graph that the command line names."""
    manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    graphs = {graph["file"]: graph for graph in manifest["graphs"]}
    wanted = [os.environ.get("DMTD_GRAPH", ""), *sys.argv[1:]]
    found = [graphs[Path(word).name] for word in wanted if Path(word).name in graphs]
    if not found:
        raise SystemExit(f"name one of {', '.join(graphs)} on the command line or in DMTD_GRAPH")
    yield feed(manifest, found[0])


def feed(manifest, graph, seed=0):
    """One valid feed of ``graph``: a window of ROWS over COMMITTED rows, the last row goes to the late layers."""
    rng = np.random.default_rng(seed)
    late_only = graph["name"] == "late_decode"
    rows = 1 if late_only else ROWS
    sizes = {"batch": 1, "window_len": rows, "late_len": 1, "num_logits": 1, "capacity": CAPACITY}
    slots = graph["slots"]
    if slots > 1:  # packed: only slot 0 takes part, every other slot gets one padding row
        sizes["window_len"] = rows
    return {item["name"]: _value(item, manifest, sizes, rows, slots, rng) for item in graph["inputs"]}


def _value(item, manifest, sizes, rows, slots, rng):
    name = item["name"]
    dims = [sizes.get(dim, dim) for dim in item["dims"]]
    group_rows = 1 if name.startswith("late_") else rows
    start = COMMITTED + rows - group_rows
    used = np.arange(slots) == 0
    if name == "input_ids":
        return rng.integers(0, manifest["model"]["vocab_size"], dims)
    if name == "position_ids":
        return np.arange(COMMITTED, COMMITTED + dims[1])[None].repeat(dims[0], 0)
    if name.endswith("_write_indices"):
        return np.full(dims, start)
    if name.endswith("_seqlens_k"):
        return np.where(used, start + group_rows - 1, 0).astype(np.int32)
    if name.endswith("_total_sequence_length"):
        return np.where(used, start + group_rows, 1).astype(np.int32)
    if name.endswith("_slot_rows"):
        return np.where(used, group_rows, 1)
    if name.endswith("_pad_rows"):
        return np.array([slots - 1])
    if name == "late_rows":
        return np.full(dims, rows - 1)
    if name == "logit_rows":
        return np.zeros(dims, np.int64)
    if name in ("gate_hidden", "gate_thought"):
        return np.ones(dims, bool)
    return (rng.standard_normal(dims) * 0.1).astype(_numpy_dtype(item["dtype"]))


def _numpy_dtype(name):
    if name == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return np.dtype(name)
