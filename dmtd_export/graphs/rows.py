"""What the rows of every dialect share; each dialect's own stand in its file. ``build`` says in what order they are used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dmtd_export.graphs.layers import DialectWriter
from dmtd_export.graphs.writer import GraphWriter
from dmtd_models.config.model import DmtdSpec, ModelConfig
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import BlockFormat, WeightInfo

EMBED, LM_HEAD = "model.embed_tokens", "lm_head"
TABLE = f"{EMBED}.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSpec:
    """What to build: model, split, types of computation and of caches, the tensors of the weights file and which are in blocks.

    ``kv_dtype``: ``dtype``, or int8 in ONNX Runtime's own dialect, with scales among the tensors.
    """

    config: ModelConfig
    dmtd: DmtdSpec
    dtype: str
    kv_dtype: str
    weights: Mapping[str, WeightInfo]
    quantised: Mapping[str, BlockFormat] = field(default_factory=dict)


class Rows:
    """What both layouts share: gates, and the way of activations to and from their outer shape.

    ``leading``: the dimensions of activations before rows and width.
    """

    def __init__(
        self, writer: GraphWriter, spec: GraphSpec, dialect: DialectWriter, leading: tuple[int, ...] = ()
    ) -> None:
        self.writer = writer
        self.spec = spec
        self.leading = leading
        self._products = dialect

    def embed(self, ids: str = contract.INPUT_IDS) -> str:
        """Rows of the embedding table [..., rows, hidden] for ids of any shape."""
        embedded = self.writer.op("Gather", [self.embedding_table(), ids], "/model/embed_tokens")
        return self.flat(embedded, "/model/embed_tokens")

    def embedding_table(self) -> str:
        return self.writer.weight(TABLE)

    def lm_head(self, x: str) -> str:
        return self._products.linear(x, (head_module(self.spec.config),), "/lm_head")

    def flat(self, x: str, path: str) -> str:
        """[..., hidden] -> [*leading, rows, hidden]."""
        shape = self.writer.constant([*self.leading, -1, self.spec.config.hidden_size], "int64")
        return self.writer.op("Reshape", [x, shape], f"{path}/rows")

    def gated(self, hidden: str, thought: str, dims: Sequence[int | str]) -> str:
        """u = select(gate_hidden, hidden) + select(gate_thought, thought); a select, because 0 * NaN is NaN."""
        w, zero = self.writer, self.writer.constant(0.0, self.spec.dtype)
        column = w.constant([*self.leading, -1, 1], "int64")
        parts = []
        for gate, x in ((contract.GATE_HIDDEN, hidden), (contract.GATE_THOUGHT, thought)):
            w.input(gate, dims, "bool")
            mask = w.op("Reshape", [gate, column], f"/model/{gate}/column")
            parts.append(w.op("Where", [mask, x, zero], f"/model/{gate}"))
        return w.op("Add", parts, "/model/decode/input")


def head_module(config: ModelConfig) -> str:
    """Whose weights lm_head multiplies by."""
    return EMBED if config.tie_word_embeddings else LM_HEAD
