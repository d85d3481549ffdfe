"""Attention in standard ONNX, opset 24: TensorRT builds from it, and ONNX Runtime runs it too.

The mask is an explicit boolean input of Attention, built in the graph: TensorRT's parser silently drops
``nonpad_kv_seqlen`` and reads ``is_causal`` as upper-left, which is wrong over a past. Row r of sequence b may see the
cache rows up to ``write_indices[b] + r``, so rows that pad a window on the right are never seen by valid ones.
The queries are scaled by head_dim^-1/2 in the graph and Attention by 1: left to itself, TensorRT's parser scales queries and the
whole visible cache of keys by head_dim^-1/4, rounded to the model's type. The factor costs no precision of its own where it can:
it goes into the float32 part of q_norm, or is a power of two; elsewhere it is a float32 product between casts.
In half precision norms are computed in float32 through casts. The softmax's type is left to the kernel, because TensorRT refuses
``softmax_precision``: its fused attention and ONNX Runtime's CUDA kernels accumulate in float32 whatever the attribute says.
Quantised weights go through DequantizeLinear, a tied embedding through one for its rows and lm_head (see ``linear``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from dmtd_export.graphs.layers import COS, KINDS, SIN, State, kv_dims, qk_norm_weights, sum_state
from dmtd_export.graphs.linear import dequantised_product, dequantised_table, linear
from dmtd_export.graphs.rows import EMBED, TABLE, GraphSpec, Rows
from dmtd_export.graphs.writer import ONNX_DTYPES, GraphWriter
from dmtd_models.config.model import ModelConfig
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.contract import Group, Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class RowGroup:
    """Values shared by all layers that run over the same rows."""

    positions: str  # int64 [batch, rows]
    write_indices: str  # int64 [batch]
    shape: str  # int64 [2]: batch, rows
    mask: str  # bool [batch, 1, rows, capacity]


class StandardDialect:
    """Writes norms and attention of the standard dialect into ``writer``."""

    capacity: int | str = "capacity"  # rows of the caches
    signed_codes = False  # of quantised weights: in the bundle's weights file they are unsigned

    def __init__(self, writer: GraphWriter, config: ModelConfig, dtype: str) -> None:
        self.writer = writer
        self._config = config
        self._dtype = dtype
        self._groups: dict[Group, RowGroup] = {}

    def add_group(self, group: Group, positions: str, any_layer: int) -> None:
        """Declare the group's write indices and build its mask over the capacity of ``any_layer``'s cache."""
        w, path = self.writer, f"/{group}_rows"
        write_indices = w.input(contract.write_indices(group), ["batch"], "int64")
        shape = w.op("Shape", [positions], path)
        zero, one = w.constant(0, "int64"), w.constant(1, "int64")
        rows = w.op("Gather", [shape, one], f"{path}/count")
        row_index = w.op("Range", [zero, rows, one], f"{path}/row_index")
        start = w.op("Unsqueeze", [write_indices, w.constant([1], "int64")], f"{path}/start")
        last_seen = w.op("Add", [start, row_index], f"{path}/last_seen")  # [batch, rows]
        last_seen = w.op("Unsqueeze", [last_seen, w.constant([1, 3], "int64")], f"{path}/last_seen")
        mask = w.op("LessOrEqual", [self._cache_index(any_layer, path), last_seen], f"{path}/mask")
        self._groups[group] = RowGroup(positions=positions, write_indices=write_indices, shape=shape, mask=mask)

    def _cache_index(self, any_layer: int, path: str) -> str:
        """0, 1, 2, ... for every cache row that attention reads."""
        w = self.writer
        capacity = w.op("Shape", [contract.past(any_layer, "key")], f"{path}/capacity", attrs={"start": 2, "end": 3})
        capacity = w.op("Squeeze", [capacity, w.constant([0], "int64")], f"{path}/capacity")
        return w.op("Range", [w.constant(0, "int64"), capacity, w.constant(1, "int64")], f"{path}/cache_index")

    def norm(self, x: str, weight: str, path: str, scale: float = 1.0) -> str:
        """RMSNorm times ``scale``, which is taken in float32."""
        w, attrs = self.writer, {"axis": -1, "epsilon": self._config.rms_norm_eps}
        if self._dtype == "float32":
            y = w.op("RMSNormalization", [x, w.weight(weight)], path, attrs=attrs)
            return y if scale == 1.0 else w.op("Mul", [y, w.constant(scale, "float32")], f"{path}/scale")
        full = w.op("Cast", [x], f"{path}/to_float32", attrs={"to": ONNX_DTYPES["float32"]})
        width = (
            self._config.head_dim if weight.endswith(("q_norm.weight", "k_norm.weight")) else self._config.hidden_size
        )
        factor = w.op("Expand", [w.constant([scale], "float32"), w.constant([width], "int64")], f"{path}/factor")
        full = w.op("RMSNormalization", [full, factor], path, attrs=attrs)
        half = w.op("Cast", [full], f"{path}/to_half", attrs={"to": ONNX_DTYPES[self._dtype]})
        return w.op("Mul", [half, w.weight(weight)], path)

    def add_norm(self, state: State, weight: str, path: str, into: tuple[str, ...]) -> tuple[str, str]:
        residual = sum_state(self.writer, state, f"{path}/residual")
        return self.norm(residual, weight, path), residual

    def linear(self, x: str, modules: tuple[str, ...], path: str, *, normed: bool = False) -> str:
        in_blocks = partial(dequantised_product, self.writer, self._dtype, signed=self.signed_codes)
        return linear(self.writer, x, modules, path, in_blocks)

    def attention(self, x: str, layer: int, group: Group, path: str) -> str:
        w, config, rows = self.writer, self._config, self._groups[group]
        module = f"model.layers.{layer}.self_attn"
        norms = qk_norm_weights(w, layer)
        heads = {}
        for kind, count in (("q", config.num_heads), ("k", config.num_kv_heads), ("v", config.num_kv_heads)):
            flat = self.linear(x, (f"{module}.{kind}_proj",), f"{path}/{kind}_proj")
            split = w.op(
                "Concat",
                [rows.shape, w.constant([count, config.head_dim], "int64")],
                f"{path}/{kind}_shape",
                attrs={"axis": 0},
            )
            y = w.op("Reshape", [flat, split], f"{path}/{kind}_heads")
            scale = config.head_dim**-0.5 if kind == "q" else 1.0
            if kind in norms:
                y = self.norm(y, norms[kind], f"{path}/{kind}_norm", scale)
            y = w.op("Transpose", [y], f"{path}/{kind}_heads", attrs={"perm": [0, 2, 1, 3]})
            if kind != "v":
                y = w.op("RotaryEmbedding", [y, w.weight(COS), w.weight(SIN), rows.positions], f"{path}/{kind}_rotary")
            if kind == "q" and kind not in norms:
                y = self._scale(y, scale, f"{path}/q_scale")
            heads[kind] = y
        caches = [self._updated_cache(layer, kind, heads[kind[0]], rows, path) for kind in KINDS]
        y = w.op("Attention", [heads["q"], *caches, rows.mask], path, attrs={"scale": 1.0})
        y = w.op("Transpose", [y], f"{path}/merge_heads", attrs={"perm": [0, 2, 1, 3]})
        return w.op(
            "Reshape", [y, w.constant([-1, config.num_heads * config.head_dim], "int64")], f"{path}/merge_heads"
        )

    def _scale(self, x: str, scale: float, path: str) -> str:
        """``x`` times ``scale``, rounded once to the model's type, and not at all by a power of two."""
        w = self.writer
        if self._dtype == "float32" or math.frexp(scale)[0] == 0.5:
            return w.op("Mul", [x, w.constant(scale, self._dtype)], path)
        full = w.op("Cast", [x], f"{path}/to_float32", attrs={"to": ONNX_DTYPES["float32"]})
        full = w.op("Mul", [full, w.constant(scale, "float32")], path)
        return w.op("Cast", [full], f"{path}/to_half", attrs={"to": ONNX_DTYPES[self._dtype]})

    def declare_cache(self, layer: int, group: Group) -> None:
        """Declare the layer's KV inputs (before any node reads their shape)."""
        for kind in KINDS:
            self.writer.input(contract.past(layer, kind), kv_dims(self._config, "batch", self.capacity), self._dtype)

    def _updated_cache(self, layer: int, kind: Kind, update: str, rows: RowGroup, path: str) -> str:
        """What attention reads of the cache: all of it."""
        w = self.writer
        name = w.output(contract.present(layer, kind), kv_dims(self._config, "batch", self.capacity), self._dtype)
        inputs = [contract.past(layer, kind), update, rows.write_indices]
        return w.op("TensorScatter", inputs, f"{path}/{kind}_cache", output=name, attrs={"axis": -2, "mode": "linear"})


class StandardRows(Rows):
    """Rectangular rows: [batch, rows] outside, [batch * rows, hidden] inside."""

    def __init__(self, writer: GraphWriter, spec: GraphSpec, dialect: StandardDialect | None = None) -> None:
        self.dialect = dialect or StandardDialect(writer, spec.config, spec.dtype)
        super().__init__(writer, spec, self.dialect)

    def declare_tokens(self, rows: str) -> None:
        for name in (contract.INPUT_IDS, contract.POSITION_IDS):
            self.writer.input(name, ["batch", rows], "int64")

    def embedding_table(self) -> str:
        fmt = self.writer.block_format(TABLE)
        if fmt is None:
            return super().embedding_table()
        return dequantised_table(self.writer, self.spec.dtype, EMBED, fmt, "/model/embed_tokens/table")

    def declare_late_rows(self) -> None:
        self.writer.input(contract.LATE_ROWS, ["batch", "late_len"], "int64")

    def declare_thought(self) -> str:
        thought = self.writer.input(
            contract.THOUGHT, ["batch", "late_len", self.spec.config.hidden_size], self.spec.dtype
        )
        return self.flat(thought, "/model/thought")

    def add_window_group(self, group: Group, layer: int) -> None:
        self.dialect.add_group(group, contract.POSITION_IDS, layer)

    def add_late_group(self, layer: int) -> None:
        positions = self.writer.op(
            "GatherElements", [contract.POSITION_IDS, contract.LATE_ROWS], "/late_rows/positions", attrs={"axis": 1}
        )
        self.dialect.add_group("late", positions, layer)

    def select_late(self, x: str, path: str) -> str:
        return self._select(x, contract.INPUT_IDS, contract.LATE_ROWS, path)

    def declare_logit_rows(self) -> None:
        self.writer.input(contract.LOGIT_ROWS, ["batch", "num_logits"], "int64")

    def select_logits(self, x: str, path: str) -> str:
        return self._select(x, contract.GATE_HIDDEN, contract.LOGIT_ROWS, path)

    def _select(self, x: str, like: str, rows: str, path: str) -> str:
        """Rows of x, which is [batch * n, width] for ``like`` [batch, n], by indices [batch, m] -> [batch * m, width]."""
        w = self.writer
        outer = w.op("Shape", [like], f"{path}/outer")
        width = w.op("Shape", [x], f"{path}/width", attrs={"start": 1})
        batch = w.op("Concat", [outer, width], f"{path}/batch_shape", attrs={"axis": 0})
        flat = w.op("Concat", [w.constant([-1], "int64"), width], f"{path}/flat_shape", attrs={"axis": 0})
        index = w.op("Unsqueeze", [rows, w.constant([-1], "int64")], f"{path}/index")
        taken = w.op("GatherND", [w.op("Reshape", [x, batch], f"{path}/batch"), index], path, attrs={"batch_dims": 1})
        return w.op("Reshape", [taken, flat], f"{path}/flat")

    def gate(self, hidden: str, thought: str) -> str:
        return self.gated(hidden, thought, ["batch", "late_len"])

    def write_thought(self, x: str) -> None:
        self._write_rows(
            x,
            contract.LATE_ROWS,
            contract.THOUGHT,
            ["batch", "late_len", self.spec.config.hidden_size],
            self.spec.dtype,
        )

    def write_logits(self, x: str) -> None:
        self._write_rows(
            x, contract.LOGIT_ROWS, contract.LOGITS, ["batch", "num_logits", self.spec.config.vocab_size], "float32"
        )

    def _write_rows(self, x: str, like: str, name: str, dims: Sequence[int | str], dtype: str) -> None:
        w, path = self.writer, f"/{name}"
        shape = w.op(
            "Concat",
            [w.op("Shape", [like], f"{path}/shape"), w.constant([int(dims[-1])], "int64")],
            f"{path}/shape",
            attrs={"axis": 0},
        )
        w.op("Reshape", [x, shape], path, output=w.output(name, dims, dtype))
