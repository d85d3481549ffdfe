"""Valid inputs for the graphs of this directory, for Polygraphy and for trying a graph by hand. Needs numpy only.

    polygraphy run thinking.ort.onnx --onnxrt --data-loader-script polygraphy_data.py

Random inputs are not valid ones: lengths, row indices and write indices must fit one another. ``load_data`` takes the
graph from the command line (a file name of this bundle among the arguments) or from the variable DMTD_GRAPH. An input's
values depend on its name alone, so that both dialects of a graph get the same tokens, caches and gates. The directory is a
bundle, or one that `dmtd build --backend simulator` made (engine.json): caches have a fixed capacity there, as TensorRT wants.
"""

import json
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
CAPACITY = 64  # rows of the caches made here
COMMITTED = 7  # rows that count as already written
ROWS = 4  # rows of the window


def load_data() -> Iterator[dict[str, Any]]:
    """Yield one feed dictionary, name -> array, for the graph that the command line names."""
    manifest = _manifest()
    graphs = {graph["file"]: graph for graph in manifest["graphs"]}
    wanted = [os.environ.get("DMTD_GRAPH", ""), *sys.argv[1:]]
    found = [graphs[Path(word).name] for word in wanted if Path(word).name in graphs]
    if not found:
        raise SystemExit(f"name one of {', '.join(graphs)} on the command line or in DMTD_GRAPH")
    yield feed(manifest, found[0])


def _manifest() -> dict[str, Any]:
    """The bundle's manifest, or as much of it as a record of engines tells."""
    record = HERE / "engine.json"
    if not record.is_file():
        loaded: dict[str, Any] = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
        return loaded
    engines = json.loads(record.read_text(encoding="utf-8"))["engines"]
    tables = [item for engine in engines for item in engine["inputs"] if item["name"] == "embedding_table"]
    graphs = [engine | {"name": engine["graph"], "slots": 1} for engine in engines]
    return {"graphs": graphs, "model": {"vocab_size": tables[0]["dims"][0]}}


def feed(manifest: dict[str, Any], graph: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """One valid feed of ``graph``: a window of ROWS over COMMITTED rows, the last row goes to the late layers.

    A graph for several slots serves slot 0; the attention nodes of the others share one row that belongs to nobody.
    """
    rows = 1 if graph["name"] == "late_decode" else ROWS
    slots = graph["slots"]
    sizes = {
        "batch": 1,
        "window_len": rows,
        "late_len": 1,
        "num_logits": 1,
        "capacity": CAPACITY,
        "visible_len": CAPACITY,
    }
    if slots > 1:
        sizes["window_len"] = rows + 1
        sizes |= {f"slot_len.{slot}": rows if slot == 0 else 1 for slot in range(slots)}
    return {item["name"]: _value(item, manifest, sizes, rows, seed) for item in graph["inputs"]}


def _value(item: dict[str, Any], manifest: dict[str, Any], sizes: dict[str, int], rows: int, seed: int) -> Any:
    name = "embedding_table" if item["name"] == "lm_head_table" else item["name"]  # one tensor
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    dims = [sizes.get(dim, dim) for dim in item["dims"]]
    group_rows = 1 if name.startswith("late_") else rows
    stop = COMMITTED + rows
    used = np.arange(max(dims[0], 1)) == 0  # of several slots the first one
    idle = name.rpartition(".")[2] not in ("0", name)  # an input of another slot
    if name in ("thinks", "num_steps"):  # of the cycle graph: one step of all layers
        return np.ones(dims, np.dtype(item["dtype"]))
    if name in ("input_ids", "late_ids"):
        return rng.integers(0, manifest["model"]["vocab_size"], dims)
    if name == "visible_rows":
        return np.arange(dims[0])
    if name == "position_ids":
        return np.arange(COMMITTED, stop)[None].repeat(dims[0], 0)
    if name.endswith("_write_indices"):
        return np.full(dims, stop - group_rows)
    if name.endswith("_seqlens_k"):
        return np.where(used, stop - 1, 0).astype(np.int32)
    if "_total_sequence_length" in name:
        return np.full(dims, 1 if idle else stop, np.int32)
    if name.startswith("thinking_slot_rows"):
        return np.full(dims, rows) if idle else np.arange(rows)
    if name == "thinking_kept_rows":
        return np.arange(dims[0])
    if name == "late_rows":
        return np.full(dims, rows - 1)
    if name == "logit_rows":
        return np.zeros(dims, np.int64)
    if name in ("gate_hidden", "gate_thought"):
        return np.ones(dims, bool)
    values = rng.standard_normal(dims) * (10 if item["dtype"] == "int8" else 0.1)  # codes of a cache, or numbers
    if name.startswith("past_key_values."):
        values[:, :, COMMITTED:] = 0  # as a cache that has not been written further
    return values.astype(_numpy_dtype(item["dtype"]))


def _numpy_dtype(name: str) -> Any:
    if name == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return np.dtype(name)
