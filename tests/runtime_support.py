"""Tiny bundles with the reference that they were exported from, and the generation loop with its logits in the open.

Shared by tests/runtime. A cycle length and a convention are only numbers in the manifest, no graph depends on them: one
bundle a (family, encoding layers) serves them all, through :meth:`TinyBundle.manifest_for`.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import ExportOptions
from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.config.model import DmtdSpec, ModelConfig, SplitOptions, resolve_dmtd
from dmtd_models.reference import oracle
from dmtd_models.reference.dmtd import DmtdModel, Forward
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime import LLM, AsyncLLM
from dmtd_runtime.backends.base import Backend, BackendOptions
from dmtd_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from dmtd_runtime.bundle.contract import CYCLE
from dmtd_runtime.bundle.manifest import CycleInfo, FileInfo, Manifest
from dmtd_runtime.cycle import CyclePlan, StepKind
from dmtd_runtime.sampling.params import SamplingParams
from dmtd_runtime.sampling.sampler import Choice, Sampler
from dmtd_runtime.sampling.stops import StopRules
from dmtd_runtime.serving.loop import run_batch
from dmtd_runtime.serving.sequence import SequenceRun, TokenEvent
from dmtd_runtime.text.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, ignore_eos=True)
MARGIN = 2e-5  # of the largest |logit|, float32
VOCAB_SIZE = 259
LAYERS, DECODING_LAYERS = 5, 2
MAX_BATCH = 8
MAX_OPEN_BACKENDS = 48
END_OF_TURN = 258  # the tiny tokenizer's <|im_end|>
CONVENTIONS: tuple[tuple[Any, Any], ...] = (("absolute", "cyclical"), ("prompt", "thinking"), ("prompt", "sum"))

Array = np.ndarray[Any, np.dtype[Any]]
Dialect = Literal["standard", "onnxruntime"]
FullPass = Literal["staged", "fused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The PyTorch model under another cycle length or convention; what the oracle takes."""

    model: DmtdModel
    config: ModelConfig
    spec: DmtdSpec

    def __call__(self, input_ids: Tensor, positions: Tensor, gate_hidden: Tensor, gate_thought: Tensor) -> Forward:
        forward: Forward = self.model(input_ids, positions, gate_hidden, gate_thought)
        return forward


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyBundle:
    """An exported random checkpoint and its reference in float32."""

    directory: Path
    manifest: Manifest
    model: DmtdModel

    def cycle(self, tau: int, convention: tuple[Any, Any]) -> CycleInfo:
        origin, prompt_input = convention
        return replace(self.manifest.cycle, cycle_length=tau, cycle_origin=origin, prompt_input=prompt_input)

    def reference(self, tau: int, convention: tuple[Any, Any]) -> Reference:
        origin, prompt_input = convention
        spec = replace(self.model.spec, cycle_length=tau, cycle_origin=origin, prompt_input=prompt_input)
        return Reference(model=self.model, config=self.model.config, spec=spec)

    def greedy(self, prompt: Sequence[int], count: int, *, plain: bool = False) -> oracle.OracleRun:
        """What the oracle decodes by full recomputation under the bundle's own cycle length and convention."""
        cycle = self.manifest.cycle
        reference = self.reference(cycle.cycle_length, (cycle.cycle_origin, cycle.prompt_input))
        return oracle.greedy(reference, list(prompt), count, plain)

    def greedy_tokens(self, prompt: Sequence[int], count: int, *, plain: bool = False) -> list[int]:
        return list(self.greedy(prompt, count, plain=plain).token_ids)


class TinyBundles:
    """Bundles and open backends, made when first asked for and kept."""

    def __init__(self, root: Path, make: Callable[[Path, str, int], TinyBundle] | None = None) -> None:
        """``make``: :func:`make_bundle`, or another way from a directory, a family and how many encoding layers."""
        self._root, self._make = root, make or make_bundle
        self._bundles: dict[tuple[str, int], TinyBundle] = {}
        self._backends: dict[tuple[Any, ...], OnnxRuntimeBackend] = {}

    def get(self, family: str = "qwen3", encoding_layers: int = 0) -> TinyBundle:
        key = (family, encoding_layers)
        if key not in self._bundles:
            self._bundles[key] = self._make(self._root / f"{family}-{encoding_layers}", family, encoding_layers)
        return self._bundles[key]

    def backend(
        self,
        family: str = "qwen3",
        encoding_layers: int = 0,
        *,
        dialect: Dialect = "onnxruntime",
        full_pass: FullPass | None = "staged",
        slots: int = 1,
        max_rows: int | None = None,
    ) -> OnnxRuntimeBackend:
        """A backend of one thread; ``max_rows`` cuts prompts into small chunks."""
        key = (family, encoding_layers, dialect, full_pass, slots)
        if key not in self._backends:
            if len(self._backends) == MAX_OPEN_BACKENDS:
                self._backends.pop(next(iter(self._backends))).close()
            bundle = self.get(family, encoding_layers)
            options = BackendOptions(dialect=dialect, full_pass=full_pass, max_num_seqs=slots, threads=1)
            self._backends[key] = OnnxRuntimeBackend(bundle.directory, bundle.manifest, options)
        backend = self._backends[key] = self._backends.pop(key)  # the one used last stands last
        backend.max_rows = max_rows or self.get(family, encoding_layers).manifest.model.max_window
        return backend

    def close(self) -> None:
        for backend in self._backends.values():
            backend.close()


def make_bundle(
    root: Path,
    family: str = "qwen3",
    encoding_layers: int = 0,
    *,
    layers: int = LAYERS,
    decoding_layers: int = DECODING_LAYERS,
    max_positions: int = 256,
    tokenizer: bool = True,
) -> TinyBundle:
    """Write a random checkpoint, export it, and load the reference."""
    torch.set_num_threads(1)
    source = write_tiny_checkpoint(
        root / "model", family=family, layers=layers, tokenizer=tokenizer, max_positions=max_positions
    )
    split = SplitOptions(
        encoding_layers=encoding_layers,
        decoding_layers=decoding_layers,
        cycle_length=4,
        cycle_origin="prompt",
        prompt_input="thinking",
    )
    manifest = export_bundle(source, root / "bundle", ExportOptions(split=split, max_num_seqs=MAX_BATCH))
    with open_checkpoint(source) as checkpoint:
        spec = resolve_dmtd(checkpoint.config, checkpoint.dmtd, split)
        model = DmtdModel.from_reader(checkpoint.config, spec, checkpoint.read, torch.float32)
    return TinyBundle(directory=root / "bundle", manifest=manifest, model=model)


def poisoned_bundle(root: Path, token_id: int = 255) -> tuple[Path, Manifest]:
    """A bundle, cycle length 3, in which one token has a NaN embedding."""
    source = write_tiny_checkpoint(root / "model", layers=LAYERS, tokenizer=True)
    options = ExportOptions(split=SplitOptions(decoding_layers=DECODING_LAYERS, cycle_length=3))
    manifest = export_bundle(source, root / "bundle", options)
    data = root / "bundle" / "model.onnx.data"
    info = manifest.weights["model.embed_tokens.weight"]
    embedding = np.memmap(data, np.float32, "r+", offset=info.offset, shape=info.shape)
    embedding[token_id] = np.nan
    embedding.flush()
    record = FileInfo(bytes=data.stat().st_size, sha256=hashlib.sha256(data.read_bytes()).hexdigest())
    manifest = replace(manifest, files={**manifest.files, data.name: record})
    (root / "bundle" / "manifest.json").write_text(manifest.to_json())
    return root / "bundle", manifest


@cache
def tokenizer_of(directory: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer is not None
    return tokenizer


class RecordingSampler(Sampler):
    """Keeps a copy of every row of logits that it chose from: of all tokens, unless ``records`` is taken back."""

    records = True

    def __init__(
        self, params: SamplingParams, *, vocab_size: int, prompt_ids: Sequence[int], sequence: int = 0
    ) -> None:
        super().__init__(params, vocab_size=vocab_size, prompt_ids=prompt_ids, seed=0, sequence=sequence)
        self.rows: list[Array] = []

    @property
    def needs_logits(self) -> bool:
        return self.records or super().needs_logits

    def choose(self, logits: Array) -> Choice:
        self.rows.append(logits.copy())
        return super().choose(logits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What became of one sequence of :func:`run_prompts`."""

    token_ids: list[int]
    logits: Array  # [steps, vocab]
    text: str
    finish_reason: str | None
    stop_reason: str | int | None
    error: Exception | None
    heads: tuple[int, ...] = ()
    late_steps: int = 0
    dropped: int = 0


class CountingRun(SequenceRun):
    """Remembers the positions that were heads."""

    __slots__ = ("heads",)

    def count(self, kind: StepKind) -> None:
        if kind == "full":
            self.heads = (*getattr(self, "heads", ()), len(self.ids) - 1)
        super().count(kind)


def run_prompts(
    backend: OnnxRuntimeBackend,
    plan: CyclePlan,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    directory: Path | None = None,
) -> list[Ran]:
    """Run prompts as one static batch in the caller's thread. ``directory`` of the bundle: its tokenizer makes text."""
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    events: list[list[TokenEvent]] = [[] for _ in prompts]
    tokenizer = tokenizer_of(directory) if directory else None
    vocab_size = backend._manifest.model.vocab_size
    samplers = [
        RecordingSampler(p, vocab_size=vocab_size, prompt_ids=ids) for p, ids in zip(each, prompts, strict=True)
    ]
    sequences = [
        CountingRun(
            ids=list(ids),
            sampler=sampler,
            stops=StopRules(p, eos_token_ids=(), text=tokenizer.text_stream() if tokenizer else None),
            on_event=told.append,
            min_confidence=p.min_confidence,
        )
        for ids, p, sampler, told in zip(prompts, each, samplers, events, strict=True)
    ]
    run_batch(backend, plan, sequences)
    return [
        Ran(
            token_ids=[event.choice.token_id for event in told if event.choice],
            logits=np.stack(sampler.rows),
            text="".join(event.text for event in told),
            finish_reason=told[-1].finish_reason,
            stop_reason=told[-1].stop_reason,
            error=told[-1].error,
            heads=getattr(sequence, "heads", ()),
            late_steps=sequence.late_steps,
            dropped=sequence.dropped_tokens,
        )
        for told, sampler, sequence in zip(events, samplers, sequences, strict=True)
    ]


def without_cycle(manifest: Manifest) -> Manifest:
    """As bundles were before they had cycle graphs."""
    return replace(manifest, graphs=tuple(graph for graph in manifest.graphs if graph.name != CYCLE))


def random_prompt(seed: int, length: int, vocab_size: int = 256) -> list[int]:
    """Seeded ids; with the tiny tokenizer 0 to 255 are the bytes, none of them special."""
    ids: list[int] = np.random.default_rng([seed, length]).integers(0, vocab_size, length).tolist()
    return ids


class Held:
    """The engine of an LLM stops before a step until it is let go: tests then act in the middle of an answer.

    ``with held(llm, after=3) as hold``: three steps run, and no more until the block ends, :meth:`release` is called,
    the LLM is being closed or ``until`` holds.
    """

    def __init__(self) -> None:
        self._released = threading.Event()
        self._reached = threading.Event()
        self.steps = 0

    def release(self) -> None:
        self._released.set()

    def wait(self) -> None:
        """Until the worker stands still."""
        assert self._reached.wait(120), "the worker never came to that step"

    def _stand(self, go_on: Callable[[], bool]) -> None:
        self._reached.set()
        wait_until(lambda: self._released.is_set() or go_on())


@contextmanager
def held(llm: LLM | AsyncLLM, *, after: int, until: Callable[[], bool] = lambda: False) -> Iterator[Held]:
    hold, backend = Held(), llm._worker._backend
    run, runs_cycles = backend.run, backend.runs_cycles

    def step(*arguments: Any, **options: Any) -> Any:
        if hold.steps >= after:
            hold._stand(lambda: llm._worker.is_closing() or until())
        hold.steps += 1
        return run(*arguments, **options)

    backend.run = step  # type: ignore[method-assign]
    backend.runs_cycles = runs_cycles and backend.runs_ahead  # on the host they would pass by here
    try:
        yield hold
    finally:
        hold.release()
        backend.run, backend.runs_cycles = run, runs_cycles  # type: ignore[method-assign]


def wait_until(condition: Callable[[], bool]) -> None:
    """Patiently: a loaded machine is no failure."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.001)


def growth(marks: Sequence[int]) -> int:
    """How much memory grew over the rounds that ``marks`` were taken after, as a leak does: in most rounds, not at once.

    The two largest steps do not count: an allocator takes a few megabytes at a time, in whatever round it comes to that.
    """
    steps = sorted(late - early for early, late in pairwise(marks))
    return sum(steps[:-2])


def private_bytes() -> int:
    """Anonymous resident memory of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def sequence_of(prompt: Sequence[int], params: SamplingParams, told: list[TokenEvent]) -> SequenceRun:
    sampler = Sampler(params, vocab_size=VOCAB_SIZE, prompt_ids=prompt, seed=7)
    return SequenceRun(ids=list(prompt), sampler=sampler, stops=StopRules(params), on_event=told.append)


def tokens_of(
    backend: Backend, plan: CyclePlan, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
) -> list[list[int]]:
    told = list[TokenEvent]()
    sequences = [sequence_of(prompt, own, told) for prompt, own in zip(prompts, params, strict=True)]
    run_batch(backend, plan, sequences)
    assert all(event.error is None for event in told)
    return [one.ids[len(prompt) :] for one, prompt in zip(sequences, prompts, strict=True)]
