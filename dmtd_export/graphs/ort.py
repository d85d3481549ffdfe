"""Attention in ONNX Runtime's own dialect: GroupQueryAttention, KV updated in place.

GroupQueryAttention takes either one new row for each of several sequences or several new rows for one sequence. D needs no
more: it takes one row a sequence in decoding, and prompts one by one. T's refill is several rows for several sequences, and
must still read T's weights once. So T (and E where it runs with T) takes **packed** rows, the windows of all slots one
behind another, and a graph for ``slots`` sequences gives each slot an attention node of its own in every layer; all else
runs over the rows of all slots together. Windows of different lengths need no padding, and a slot's attention is the very
computation it would be alone.

Positions are not an input: GroupQueryAttention derives them from the committed lengths, and rows are always contiguous.

Caches are of the model's type, or int8 with a scale for each channel: rows are rounded as they are written, after rotary
positions, and every row attends to what the cache then holds, its own new rows too. So no row depends on how a prompt is cut.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from onnx import NodeProto

from dmtd_export.graphs.layers import COS, KINDS, SIN, State, kv_dims, layer_products, qk_norm_weights, qkv_modules
from dmtd_export.graphs.linear import gathered_blocks, linear, nbits_product, shared_factors, takes_any_rank
from dmtd_export.graphs.rows import EMBED, TABLE, GraphSpec, Rows, head_module
from dmtd_export.graphs.writer import GraphWriter
from dmtd_models.config.model import ModelConfig
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.contract import Group
from dmtd_runtime.bundle.manifest import TensorInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedGroup:
    """Values shared by all layers over packed rows; lists have one entry a slot."""

    seqlens_k: list[str]  # int32 [1]
    total_len: list[str]  # int32 [1]
    slot_rows: list[str]  # int64 [slot_len.{slot}]; none where there is one slot


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchGroup:
    """Values shared by all layers over [batch, rows]."""

    seqlens_k: str  # int32 [batch]
    total_len: str  # int32 [1], the largest
    shape: str | None  # int64 [3]: batch, rows, width of q + k + v; None where rows come in it


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A part of the cycle graph: its nodes, which step of a cycle it is, and how it names what is written to caches."""

    nodes: list[NodeProto]
    step: int
    elsewhere: Collection[int]
    caches: dict[str, str] = field(default_factory=dict)  # by the outputs that they leave it as


class OrtDialect:
    """Writes norms and attention of the onnxruntime dialect into ``writer``; ``leading``: see :class:`Rows`."""

    def __init__(
        self, writer: GraphWriter, config: ModelConfig, dtype: str, kv_dtype: str, slots: int, leading: Sequence[int]
    ) -> None:
        self.writer = writer
        self._config = config
        self._dtype = dtype
        self._kv_dtype = kv_dtype
        self._slots = slots
        self._leading = leading
        self._qkv_width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self._packed: PackedGroup | None = None
        self._batch: BatchGroup | None = None
        self._branch: Branch | None = None  # of the cycle graph, that is being written

    def add_packed_group(self) -> None:
        """Declare the lengths, and the packed rows, of the slots of the thinking group."""
        w, slots = self.writer, self._slots
        seqlens = w.input(contract.seqlens_k("thinking"), [slots], "int32")
        totals = [w.input(contract.total_sequence_length("thinking", s), [1], "int32") for s in self._slot_names()]
        if slots == 1:
            self._packed = PackedGroup(seqlens_k=[seqlens], total_len=totals, slot_rows=[])
            return
        w.input(contract.KEPT_ROWS, ["window_len"], "int64")
        split = {"axis": 0, "num_outputs": slots}
        self._packed = PackedGroup(
            seqlens_k=w.node("Split", [seqlens], "/thinking_rows/seqlens_k", outputs=slots, attrs=split),
            total_len=totals,
            slot_rows=[w.input(contract.slot_rows(s), [contract.slot_len(s)], "int64") for s in range(slots)],
        )

    def add_batch_group(self, like: str, *, several: bool) -> None:
        """Declare the lengths of the late group, whose rows have the outer shape of ``like`` [batch, rows].

        ``several``: whether there may be more than one sequence.
        """
        w, path, shape = self.writer, "/late_batch", None
        seqlens = w.input(contract.seqlens_k("late"), ["batch"], "int32")
        total = w.input(contract.total_sequence_length("late"), [1], "int32")
        if several or not self._leading:
            outer = w.op("Shape", [like], f"{path}/outer")
            shape = w.op("Concat", [outer, w.constant([self._qkv_width], "int64")], f"{path}/shape", attrs={"axis": 0})
        self._batch = BatchGroup(seqlens_k=seqlens, total_len=total, shape=shape)

    @contextlib.contextmanager
    def branch(self, path: str, step: int = 0, elsewhere: Collection[int] = ()) -> Iterator[Branch]:
        """Inside, nodes are written into a branch, in which the late group stands ``step`` rows further.

        Its caches are those of the step before, but of layers that wrote them ``elsewhere``: by the names of slots, to the
        same memory.
        """
        w, group = self.writer, self._batch
        with w.branch(path) as nodes:
            self._branch = Branch(nodes=nodes, step=step, elsewhere=elsewhere)
            if step:
                assert group, "the late group is declared before it goes on"
                further = w.constant([step], "int32")
                seqlens_k = w.op("Add", [group.seqlens_k, further], "/seqlens_k")
                self._batch = replace(
                    group, seqlens_k=seqlens_k, total_len=w.op("Add", [group.total_len, further], "/total_len")
                )
            try:
                yield self._branch
            finally:
                self._branch, self._batch = None, group

    def norm(self, x: str, weight: str, path: str, into: tuple[str, ...] = ()) -> str:
        attrs = {"axis": -1, "epsilon": self._config.rms_norm_eps}
        return self.writer.op("RMSNormalization", [x, self._norm_weight(weight, into)], path, attrs=attrs)

    def add_norm(self, state: State, weight: str, path: str, into: tuple[str, ...]) -> tuple[str, str]:
        if state.delta is None:
            return self.norm(state.residual, weight, path, into), state.residual
        normed, _, _, residual = self.writer.node(
            "SkipSimplifiedLayerNormalization",
            [state.residual, state.delta, self._norm_weight(weight, into)],
            path,
            outputs=[f"{path}/output", "", "", f"{path}/residual"],
            contrib=True,
            attrs={"epsilon": self._config.rms_norm_eps},
        )
        return normed, residual

    def _norm_weight(self, weight: str, into: tuple[str, ...]) -> str:
        """A norm's weight, with the factors that the product behind it wants of its inputs: sessions fold the two."""
        w = self.writer
        stored, factors = w.weight(weight), shared_factors(w, into)
        return w.once("Mul", [stored, factors], f"/stored/{weight}/factors", {}) if factors else stored

    def declare_cache(self, layer: int, group: Group) -> None:
        """Declare the layer's KV inputs and outputs: of the whole batch, or one pair a slot."""
        self.declare_past(layer, group)
        for info in self.caches(layer, group):
            self.writer.output(info.name, info.dims, info.dtype)

    def declare_past(self, layer: int, group: Group) -> None:
        """Declare the layer's KV inputs alone."""
        for info in self.caches(layer, group):
            self.writer.input(contract.past_of(info.name), info.dims, info.dtype)

    def caches(self, layer: int, group: Group, step: int = 0) -> list[TensorInfo]:
        """What a layer writes: of the whole batch, or one pair a slot."""
        packed = group == "thinking"
        dims = kv_dims(self._config, 1 if packed else "batch")
        return [
            TensorInfo(name=contract.present(layer, kind, slot, step=step), dims=dims, dtype=self._kv_dtype)
            for slot in (self._slot_names() if packed else [None])
            for kind in KINDS
        ]

    def linear(self, x: str, modules: tuple[str, ...], path: str, *, normed: bool = False) -> str:
        normed = normed and shared_factors(self.writer, modules) is not None
        return linear(self.writer, x, modules, path, partial(nbits_product, self.writer, self._dtype, factored=normed))

    def attention(self, x: str, layer: int, group: Group, path: str) -> str:
        w, config = self.writer, self._config
        qkv = self.linear(x, qkv_modules(layer), f"{path}/qkv_proj", normed=True)
        qkv = self._normed_qkv(qkv, layer, path)
        if group == "thinking":
            attended, reshapes = self._packed_attention(qkv, layer, path), not self._leading
        else:
            rows = self._batch
            assert rows, "the late group is declared before its layers"
            if reshapes := rows.shape is not None:
                qkv = w.op("Reshape", [qkv, rows.shape], f"{path}/qkv")
            attended = self._attend(qkv, layer, None, rows.seqlens_k, rows.total_len, path)
        if not reshapes:
            return attended
        shape = w.constant([*self._leading, -1, config.num_heads * config.head_dim], "int64")
        return w.op("Reshape", [attended, shape], f"{path}/rows")

    def _packed_attention(self, qkv: str, layer: int, path: str) -> str:
        """[..., rows, q + k + v] -> [1, rows, heads * head_dim], one attention node a slot."""
        w, rows = self.writer, self._packed
        assert rows, "the thinking group is declared before its layers"
        if not self._leading:
            qkv = w.op("Unsqueeze", [qkv, w.constant([0], "int64")], f"{path}/qkv")
        if self._slots == 1:
            return self._attend(qkv, layer, None, rows.seqlens_k[0], rows.total_len[0], path)
        # Gathered and not split: what a Split of uneven parts copies to a GPU in every run cannot stand in a captured graph.
        done = []
        for slot, own in enumerate(rows.slot_rows):
            part = w.op("Gather", [qkv, own], f"{path}/slot.{slot}", attrs={"axis": 1})
            lengths = rows.seqlens_k[slot], rows.total_len[slot]
            done.append(self._attend(part, layer, slot, *lengths, f"{path}/slot.{slot}"))
        attended = w.op("Concat", done, f"{path}/slots", attrs={"axis": 1})
        return w.op("Gather", [attended, contract.KEPT_ROWS], f"{path}/packed", attrs={"axis": 1})

    def _normed_qkv(self, qkv: str, layer: int, path: str) -> str:
        """Apply per-head norms to q and k: GroupQueryAttention's own are not implemented on the CPU."""
        norms = qk_norm_weights(self.writer, layer)
        if not norms:
            return qkv
        w, config = self.writer, self._config
        sizes = [count * config.head_dim for count in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
        q, k, v = w.node("Split", [qkv, w.constant(sizes, "int64")], f"{path}/qkv", outputs=3, attrs={"axis": -1})
        normed = []
        for kind, x, size in (("q", q, sizes[0]), ("k", k, sizes[1])):
            heads = w.constant([*self._leading, -1, size // config.head_dim, config.head_dim], "int64")
            x = self.norm(w.op("Reshape", [x, heads], f"{path}/{kind}_heads"), norms[kind], f"{path}/{kind}_norm")
            normed.append(w.op("Reshape", [x, w.constant([*self._leading, -1, size], "int64")], f"{path}/{kind}_merge"))
        return w.op("Concat", [*normed, v], f"{path}/qkv_normed", attrs={"axis": -1})

    def _attend(self, qkv: str, layer: int, slot: int | None, seqlens_k: str, total_len: str, path: str) -> str:
        w, config = self.writer, self._config
        branch, step = self._branch, 0 if self._branch is None else self._branch.step
        kv = [contract.past(layer, kind, slot) for kind in KINDS]
        if branch is not None and step and layer not in branch.elsewhere:
            kv = [contract.present(layer, kind, step=step - 1) for kind in KINDS]
        caches = [contract.present(layer, kind, slot, step=step) for kind in KINDS]
        out = [f"{path}/attended", *(caches if branch is None else (f"{path}/{kind}" for kind in KINDS))]
        inputs = [qkv, "", "", *kv, seqlens_k, total_len, w.weight(COS), w.weight(SIN)]
        attrs: dict[str, int | str] = {
            "num_heads": config.num_heads,
            "kv_num_heads": config.num_kv_heads,
            "do_rotary": 1,
        }
        if self._kv_dtype == "int8":
            inputs += ["", "", "", *(w.weight(contract.kv_scale(layer, kind)) for kind in KINDS)]
            attrs |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        attended, *written = w.node("GroupQueryAttention", inputs, path, outputs=out, contrib=True, attrs=attrs)
        if branch is not None:
            branch.caches.update(zip(caches, written, strict=True))
        return attended

    def _slot_names(self) -> list[int | None]:
        return [None] if self._slots == 1 else list(range(self._slots))


class OrtRows(Rows):
    """The onnxruntime dialect: packed window rows [1, window_len], late rows [batch, late_len]; row indices are flat."""

    def __init__(self, writer: GraphWriter, spec: GraphSpec, slots: int) -> None:
        products = itertools.chain.from_iterable(map(layer_products, range(spec.config.num_layers)))
        leading = (1,) if takes_any_rank(writer, spec.dtype, (*products, head_module(spec.config))) else ()
        self.dialect = OrtDialect(writer, spec.config, spec.dtype, spec.kv_dtype, slots, leading)
        self.num_slots = slots
        super().__init__(writer, spec, self.dialect, leading)

    def declare_tokens(self, rows: str) -> None:
        self.writer.input(contract.INPUT_IDS, ["batch" if rows == "late_len" else 1, rows], "int64")

    def embed(self, ids: str = contract.INPUT_IDS) -> str:
        path, fmt = "/model/embed_tokens", self.writer.block_format(TABLE)
        if fmt is None:
            return super().embed(ids)
        return self.flat(gathered_blocks(self.writer, self.spec.dtype, EMBED, fmt, ids, path), path)

    def declare_late_rows(self) -> None:
        self.writer.input(contract.LATE_ROWS, ["batch", "late_len"], "int64")

    def declare_thought(self) -> str:
        dims: list[int | str] = ["batch", "late_len", self.spec.config.hidden_size]
        return self.flat(self.writer.input(contract.THOUGHT, dims, self.spec.dtype), "/model/thought")

    def add_window_group(self, group: Group, layer: int) -> None:
        if group == "late":
            self.dialect.add_batch_group(contract.INPUT_IDS, several=True)
        else:
            self.dialect.add_packed_group()

    def add_late_group(self, layer: int) -> None:
        self.dialect.add_batch_group(contract.LATE_ROWS, several=self.num_slots > 1)

    def select_late(self, x: str, path: str) -> str:
        flat = self.writer.op("Reshape", [contract.LATE_ROWS, self.writer.constant([-1], "int64")], f"{path}/index")
        return self.writer.op("Gather", [x, flat], path, attrs={"axis": len(self.leading)})

    def declare_logit_rows(self) -> None:
        self.writer.input(contract.LOGIT_ROWS, ["num_logits"], "int64")

    def select_logits(self, x: str, path: str) -> str:
        return self.writer.op("Gather", [x, contract.LOGIT_ROWS], path, attrs={"axis": len(self.leading)})

    def gate(self, hidden: str, thought: str) -> str:
        return self.gated(hidden, thought, ["batch", "late_len"])

    def write_thought(self, x: str, name: str = contract.THOUGHT) -> None:
        w, width = self.writer, self.spec.config.hidden_size
        outer = w.op("Shape", [contract.LATE_ROWS], "/thought/outer")
        shape = w.op("Concat", [outer, w.constant([width], "int64")], "/thought/shape", attrs={"axis": 0})
        w.op(
            "Reshape",
            [x, shape],
            "/thought",
            output=w.output(name, ["batch", "late_len", width], self.spec.dtype),
        )

    def likeliest(self, logits: str) -> str:
        """Ids [1, batch] of the largest logits [1, batch, vocab] of rows, of equals the lowest."""
        return self.writer.op("ArgMax", [logits], "/likeliest", attrs={"axis": -1, "keepdims": 0})

    def write_logits(self, x: str) -> None:
        dims: list[int | str] = [1, "num_logits", self.spec.config.vocab_size]
        self.outer(x, "/logits", self.writer.output(contract.LOGITS, dims, "float32"))

    def outer(self, x: str, path: str, output: str | None = None) -> str:
        """[..., rows, width] -> [1, rows, width]; ``x`` itself where it is that and no output."""
        w = self.writer
        if not self.leading:
            return w.op("Unsqueeze", [x, w.constant([0], "int64")], path, output=output)
        return x if output is None else w.op("Identity", [x], path, output=output)
