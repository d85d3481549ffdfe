"""What tools/gpu_check measures: shapes of models, cells of the matrix, and checkpoints of random weights."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

TOOLS = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Random weights in the shape of a model; SmolLM2 is the real one."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tie: bool = True


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="smollm2", layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, head_dim=64, vocab=49152),
        Shape(
            name="qwen3-0.6b",
            layers=28,
            hidden=1024,
            intermediate=3072,
            heads=16,
            kv_heads=8,
            head_dim=128,
            vocab=151936,
        ),
        Shape(
            name="qwen3-4b", layers=36, hidden=2560, intermediate=9728, heads=32, kv_heads=8, head_dim=128, vocab=151936
        ),
        Shape(
            name="tiny", layers=5, hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=16, vocab=259, tie=False
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """What is exported and built once for several cells."""

    shape: str
    dtype: str
    tau: int
    late: int

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.dtype}-tau{self.tau}-d{self.late}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One measurement."""

    bundle: Bundle
    way: str  # onnxruntime-cuda, or a flavour
    batch: int
    context: int

    @property
    def key(self) -> str:
        return f"{self.bundle.name}/{self.way}/batch{self.batch}/context{self.context}"


def matrix(ways: list[str], *, rehearse: bool, full: bool) -> list[Cell]:
    """The cells, the most telling ones first."""
    if rehearse:
        bundles, batches, contexts = [Bundle(shape="tiny", dtype="float32", tau=3, late=2)], [1, 2], [16]
    elif full:
        bundles = [
            Bundle(shape=shape, dtype=dtype, tau=tau, late=late)
            for shape in ("smollm2", "qwen3-0.6b", "qwen3-4b")
            for dtype in ("bfloat16", "float16")
            for tau in (4, 3, 2)
            for late in (8, 16)
        ]
        batches, contexts = [1, 2, 4, 8, 16, 32], [128, 1024, 4096]
    else:
        bundles = [Bundle(shape=shape, dtype="bfloat16", tau=4, late=8) for shape in ("smollm2", "qwen3-4b")]
        batches, contexts = [1, 8], [128, 1024]
    return [
        Cell(bundle=bundle, way=way, batch=batch, context=context)
        for bundle in bundles
        for way in ways
        for context in contexts
        for batch in batches
    ]


def weights_of(shape: Shape) -> int:
    attention = shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    return shape.layers * (attention + 3 * shape.hidden * shape.intermediate) + shape.vocab * shape.hidden


def write_shape(directory: Path, shape: Shape) -> None:
    """Random weights; those of 4B are tiled from a few, as tools/export_memory does it."""
    if shape.name == "qwen3-4b":
        loader = SourceFileLoader("export_memory", str(TOOLS / "export_memory"))
        spec = spec_from_loader("export_memory", loader)
        assert spec is not None
        module = module_from_spec(spec)
        loader.exec_module(module)
        module.write_checkpoint(directory, layers=shape.layers, scale=1)
        return
    from dmtd_models.testing import write_tiny_checkpoint

    write_tiny_checkpoint(
        directory,
        family="llama" if shape.name == "smollm2" else "qwen3",
        layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        tie=shape.tie,
        dtype="float32" if shape.name == "tiny" else "bfloat16",
        max_positions=96 if shape.name == "tiny" else 8192,
    )
