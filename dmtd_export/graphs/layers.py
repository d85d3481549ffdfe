"""The decoder layer in both dialects: what is written between two residual states.

Activations are ``[rows, hidden]`` everywhere but inside attention, so that every linear layer is one product over the weight as
it is stored (``[out, in]``), and q, k, v (gate, up) that stand one behind another in the weights file are read as one matrix.
In ONNX Runtime's own dialect they are ``[1, rows, hidden]`` where all products take that: attention takes and gives it.
A dialect supplies products (``linear``), the norm, the residual addition and the attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from dmtd_export.graphs.writer import GraphWriter
from dmtd_models.config.model import ModelConfig
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.contract import Group

COS, SIN = contract.ROTARY_TABLES
Keep = Callable[[str, str], str]  # (rows [..., n, width], node path) -> some of the rows [..., m, width]
KINDS = contract.KINDS


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The residual stream between layers: ``residual + delta`` (``delta`` None: just ``residual``)."""

    residual: str
    delta: str | None = None


class DialectWriter(Protocol):
    """What a dialect must write. Row groups: 'thinking' = rows of the window, 'late' = rows that enter D."""

    writer: GraphWriter

    def norm(self, x: str, weight: str, path: str) -> str:
        """RMSNorm over the last axis, accumulated in float32."""
        ...

    def add_norm(self, state: State, weight: str, path: str, into: tuple[str, ...]) -> tuple[str, str]:
        """(norm(residual + delta), residual + delta); the norm for the product with ``into``, which alone reads it."""
        ...

    def linear(self, x: str, modules: tuple[str, ...], path: str, *, normed: bool = False) -> str:
        """``x`` [..., in] times the stacked weights of ``modules``; see ``linear``. ``normed``: it is a norm made for them."""
        ...

    def attention(self, x: str, layer: int, group: Group, path: str) -> str:
        """QKV projections, norms, RoPE, KV update and attention: [..., hidden] -> [..., heads * head_dim]."""
        ...


def sum_state(writer: GraphWriter, state: State, path: str) -> str:
    """The residual stream as one tensor."""
    if state.delta is None:
        return state.residual
    return writer.op("Add", [state.residual, state.delta], path)


def decoder_layer(dialect: DialectWriter, state: State, layer: int, group: Group, keep: Keep | None = None) -> State:
    """Write one decoder layer over ``state``; node names keep the module path.

    ``keep`` selects the rows that go on after attention: in the last layer of a group the others are there for their
    keys and values alone, and need neither its output projection nor its MLP.
    """
    module, path = f"model.layers.{layer}", f"/model/layers.{layer}"
    x, residual = dialect.add_norm(
        state, f"{module}.input_layernorm.weight", f"{path}/input_layernorm", qkv_modules(layer)
    )
    attended = dialect.attention(x, layer, group, f"{path}/self_attn")
    if keep:
        attended, residual = keep(attended, f"{path}/keep/attended"), keep(residual, f"{path}/keep/residual")
    attended = dialect.linear(attended, (f"{module}.self_attn.o_proj",), f"{path}/self_attn/o_proj")
    x, residual = dialect.add_norm(
        State(residual=residual, delta=attended),
        f"{module}.post_attention_layernorm.weight",
        f"{path}/post_attention_layernorm",
        gate_up := (f"{module}.mlp.gate_proj", f"{module}.mlp.up_proj"),
    )
    return State(residual=residual, delta=mlp(dialect, x, gate_up, f"{module}.mlp.down_proj", path))


def qkv_modules(layer: int) -> tuple[str, ...]:
    return tuple(f"model.layers.{layer}.self_attn.{kind}_proj" for kind in "qkv")


def layer_products(layer: int) -> tuple[str, ...]:
    """The modules of a layer that are products."""
    module = f"model.layers.{layer}"
    return (
        *qkv_modules(layer),
        *(f"{module}.{name}_proj" for name in ("self_attn.o", "mlp.gate", "mlp.up", "mlp.down")),
    )


def mlp(dialect: DialectWriter, x: str, gate_up: tuple[str, ...], down: str, path: str) -> str:
    """down(silu(gate(x)) * up(x)), gate and up read as one matrix."""
    writer = dialect.writer
    both = dialect.linear(x, gate_up, f"{path}/mlp/gate_up_proj", normed=True)
    gate, up = writer.node("Split", [both], f"{path}/mlp", outputs=2, attrs={"axis": -1, "num_outputs": 2})
    activated = writer.op("Mul", [gate, writer.op("Sigmoid", [gate], f"{path}/mlp/act_fn")], f"{path}/mlp/act_fn")
    product = writer.op("Mul", [activated, up], f"{path}/mlp")
    return dialect.linear(product, (down,), f"{path}/mlp/down_proj")


def kv_dims(config: ModelConfig, batch: int | str, capacity: int | str = "capacity") -> tuple[int | str, ...]:
    """[batch, kv_heads, capacity, head_dim]."""
    return (batch, config.num_kv_heads, capacity, config.head_dim)


def qk_norm_weights(writer: GraphWriter, layer: int) -> Mapping[str, str]:
    """Names of the per-head norms of q and k, empty where the family has none."""
    names = {kind: f"model.layers.{layer}.self_attn.{kind}_norm.weight" for kind in ("q", "k")}
    return names if writer.has_weight(names["q"]) else {}
