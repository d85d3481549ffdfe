"""Valid inputs for the graphs of this bundle, for Polygraphy and for trying a graph by hand. Needs numpy only.

    polygraphy run thinking.ort.onnx --onnxrt --data-loader-script polygraphy_data.py

Random inputs are not valid ones: lengths, row indices and write indices must fit one another. ``load_data`` takes the graph
from the command line (a file name of this bundle among the arguments) or from the variable DMTD_GRAPH.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
CAPACITY = 64  # rows of the caches made here
COMMITTED = 7  # rows that count as already written
ROWS = 4  # rows of the window


def load_data() -> Iterator[dict[str, Any]]:
    """Yield one feed dictionary: name -> array, for the graph that the command line names."""
    manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    graphs = {graph["file"]: graph for graph in manifest["graphs"]}
    wanted = [os.environ.get("DMTD_GRAPH", ""), *sys.argv[1:]]
    found = [graphs[Path(word).name] for word in wanted if Path(word).name in graphs]
    if not found:
        raise SystemExit(f"name one of {', '.join(graphs)} on the command line or in DMTD_GRAPH")
    yield feed(manifest, found[0])


def feed(manifest: Any, graph: Any, seed: int = 0) -> dict[str, Any]:
    """One valid feed of ``graph``: a window of ROWS over COMMITTED rows, the last row goes to the late layers."""
    rng = np.random.default_rng(seed)
    rows = 1 if graph["name"] == "late_decode" else ROWS
    sizes = {"batch": 1, "window_len": rows, "late_len": 1, "num_logits": 1, "capacity": CAPACITY}
    return {item["name"]: _value(item, manifest, sizes, rows, graph["slots"], rng) for item in graph["inputs"]}


def _value(item: Any, manifest: Any, sizes: Any, rows: int, slots: int, rng: Any) -> Any:
    name = item["name"]
    dims = [sizes.get(dim, dim) for dim in item["dims"]]
    late = name.startswith("late_")
    start, count = (COMMITTED + rows - 1, 1) if late else (COMMITTED, rows)
    # Of several slots only the first takes part; the others get a row of padding that the graph appends and drops.
    used = np.arange(max(dims[0], 1)) == 0
    if name == "input_ids":
        return rng.integers(0, manifest["model"]["vocab_size"], dims)
    if name == "position_ids":
        return np.arange(start, start + dims[1])[None].repeat(dims[0], 0)
    if name.endswith("_write_indices"):
        return np.full(dims, start)
    if name.endswith("_seqlens_k"):
        return np.where(used, start + count - 1, 0).astype(np.int32)
    if name.endswith("_total_sequence_length"):
        return np.where(used, start + count, 1).astype(np.int32)
    if name == "thinking_slot_rows":
        return np.where(used, count, 1)
    if name == "thinking_pad_rows":
        return np.array([slots - 1])
    if name == "late_rows":
        return np.full(dims, rows - 1)
    if name == "logit_rows":
        return np.zeros(dims, np.int64)
    if name in ("gate_hidden", "gate_thought"):
        return np.ones(dims, bool)
    return (rng.standard_normal(dims) * 0.1).astype(_numpy_dtype(item["dtype"]))


def _numpy_dtype(name: str) -> Any:
    if name == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return np.dtype(name)
