"""What the generation loop needs of a backend: slots with KV caches, and one call that runs a step of several slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, Protocol

import numpy as np

from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.engine_record import ENGINE_BACKENDS
from dmtd_runtime.bundle.engine_record import FullPass as FullPass
from dmtd_runtime.cycle import Step
from dmtd_runtime.errors import RequestError
from dmtd_runtime.machine.hardware import MAX_THREADS
from dmtd_runtime.sampling.sampler import Sampler

Array = np.ndarray[Any, np.dtype[Any]]
BackendName = Literal["onnxruntime", "tensorrt", "tensorrt-rtx", "simulator"]  # ENGINE_BACKENDS and the bundle's graphs
PREFILL_ROUNDING = (16, 32, 64, 128, contract.MIN_WINDOW)

OF_THE_BACKEND_ALONE = ("prepack", "kernels")  # of the options below: no option of LLM's


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendOptions:
    """How to run a bundle.

    ``max_num_seqs`` sequences at a time, each with room for ``max_model_len`` tokens. A full pass is ``staged`` (thinking, then
    late_decode: T, D and lm_head in memory once) or ``fused`` (one graph; its weights come on top of late_decode's). By default
    the cycle graph runs all on the CPU, weights in memory once; elsewhere staged, which reads encoding layers twice, or fused
    where the split has any. ``plain``: whoever runs steps asks for no late ones; one sequence on the CPU then has the fused
    graph by itself.
    """

    backend: BackendName = "onnxruntime"
    device: Literal["cpu", "cuda"] = "cpu"
    device_id: int = 0
    dialect: Literal["standard", "onnxruntime"] | None = None  # None: onnxruntime where the bundle has it
    full_pass: FullPass | None = None  # None: the cycle graph on the CPU; fused for encoding layers; else staged
    max_num_seqs: int = 1
    max_model_len: int | None = None  # None: see model_len; of engines, what they were built for
    cuda_graphs: bool = True  # capture and replay: whole cycles of engines, steps of ONNX Runtime on CUDA
    plain: bool = False
    warm_up: bool = False  # opening runs every shape that generation can meet once, so that no sequence waits for it
    threads: int | None = None  # None: one for each core this process may use
    prepack: bool = True  # False: weights stay in the page cache, slower; for models that hardly fit into memory
    kernels: bool = True  # False: ONNX Runtime's own products over blocks, where there are others (``ort/kernels``)

    @property
    def runs_engines(self) -> bool:
        """Whether the backend runs what `dmtd build` made, rather than the bundle's own graphs."""
        return self.backend != "onnxruntime"

    def model_len(self, limit: int) -> int:
        """Tokens of a sequence of a bundle that takes ``limit``: all, but on a GPU, which commits its caches whole, 4096."""
        return self.max_model_len or (limit if self.device == "cpu" else min(limit, contract.DEVICE_MODEL_LEN))

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[str | None, ...]] = {
            "backend": ("onnxruntime", *ENGINE_BACKENDS),
            "device": ("cpu", "cuda"),
            "dialect": (None, *contract.DIALECTS),
            "full_pass": (None, "staged", "fused"),
        }
        for name, values in allowed.items():
            if (value := getattr(self, name)) not in values:
                raise RequestError(f"got {value!r}, expected one of {', '.join(map(str, values))}", param=name)
        for name in ("cuda_graphs", "plain", "warm_up", "prepack", "kernels"):
            if not isinstance(flag := getattr(self, name), bool):
                raise RequestError(f"got {flag!r}, expected True or False", param=name)
        for name in ("max_num_seqs", "max_model_len", "threads"):
            if (count := getattr(self, name)) is not None and (
                not isinstance(count, Integral) or isinstance(count, bool)
            ):
                raise RequestError(f"got {count!r}, expected a whole number", param=name)
        for name, most in (("max_num_seqs", self.max_num_seqs), ("threads", self.threads)):
            if most is not None and most < 1:
                raise RequestError(f"got {most}, expected at least 1", param=name)
        if self.threads is not None and self.threads > MAX_THREADS:
            raise RequestError(f"got {self.threads}, expected at most {MAX_THREADS}", param="threads")
        if self.dialect is not None and self.runs_engines:
            raise RequestError(
                f"got {self.dialect!r} with the backend {self.backend}, which runs engines; leave the dialect out",
                param="dialect",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotStep:
    """A step of the sequence in ``slot``; ``ids`` are the tokens of its window, or of its late rows in a late step."""

    slot: int
    step: Step
    ids: Sequence[int]

    @property
    def late_ids(self) -> Sequence[int]:
        return self.ids[len(self.ids) - len(self.step.late) :]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutput:
    """What a run gives for each row asked for, in the order of the steps; valid until the next call.

    ``logits`` are float32 [n, vocab]; ``tokens``, where the backend was to choose, int64 [n], NOT_FINITE where it could not. Of
    a cycle ``tokens`` are [steps, slots], and ``confidence`` float32 the same: the probability of each row's likeliest token;
    None of cycles that do not run ahead.
    """

    logits: Array | None = None
    tokens: Array | None = None
    confidence: Array | None = None


Rows = Literal["last", "all"]


class StepwiseBackend:
    """The part of the protocol that a backend lacks which has no device to run ahead."""

    runs_cycles = runs_ahead = False

    def warm_up(self) -> None: ...

    def start_cycle(self, slots: Sequence[SlotCycle], committed: Sequence[int], *, follows: bool = False) -> None:
        raise NotImplementedError("this backend runs step by step")

    def finish_cycle(self) -> RunOutput:
        raise NotImplementedError("this backend runs step by step")


def rounded_rows(rows: int) -> int:
    """What a prompt's chunk is padded to: few shapes, so few bindings and buffers, whatever lengths prompts have."""
    return next((size for size in PREFILL_ROUNDING if size >= rows), rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotCycle:
    """A whole cycle of the sequence in ``slot``.

    ``ids`` are the tokens of the first step's window; every later step feeds what the step before it chose. The sampler says
    how to choose, and is told of the tokens by whoever asked for the cycle; ``unseen`` of them are still under way to it.
    """

    slot: int
    steps: Sequence[Step]
    ids: Sequence[int]
    sampler: Sampler
    unseen: int = 0


@dataclass(slots=True)
class RunStats:
    """Counts since the backend was made; times are of the sessions alone."""

    full_passes: int = 0
    prefill_passes: int = 0  # of the full passes, those over prompt rows
    late_steps: int = 0
    refill_rows: int = 0
    session_seconds: float = 0.0
    cycles: int = 0  # that ran whole on a device, without the host
    host_seconds: float = 0.0  # of them, that the device had nothing to do


class Backend(Protocol):
    """One open bundle on one device. Not thread-safe: one engine drives it."""

    slots: int
    max_model_len: int
    capacity: int
    max_rows: int
    full_pass: FullPass | None  # None: in one graph with all else
    stats: RunStats
    gives_all_rows: bool  # run takes rows="all"
    runs_cycles: bool  # start_cycle and finish_cycle work; elsewhere nobody calls them
    # Whether cycles run beside the host, by all rules of the samplers. Elsewhere they run as they are started, none follows
    # another, tokens are the likeliest ones and how sure they are is not told.
    runs_ahead: bool

    def run(
        self, steps: Sequence[SlotStep], committed: Sequence[int], *, choose: bool = False, rows: Rows = "last"
    ) -> RunOutput:
        """Run one step for each of the named slots.

        Args:
            steps: what each slot does: late steps, or full ones and then chunks of prompts, both in the order of their slots.
                Where the backend can, prompts go through T together with the heads, so that its weights are read once.
            committed: committed rows of every slot, 0 for a free one: padding is written behind them.
            choose: give the arg-max of each row instead of its logits, which then stay where they are.
            rows: of each step that wants logits the last row, or all its late rows.

        Raises:
            BackendError: the backend failed, or it has no logits but of last rows.
        """
        ...

    def warm_up(self) -> None:
        """Run every shape that generation can meet once, before the first sequence: kernels that a library compiles or chooses
        at a shape's first run, and graphs to be captured, then keep no sequence waiting. Slots and caches are as before.
        """
        ...

    def start_cycle(self, slots: Sequence[SlotCycle], committed: Sequence[int], *, follows: bool = False) -> None:
        """Enqueue one cycle of the named slots, and return without waiting for it; ``committed`` as for :meth:`run`.

        With ``follows`` it goes on where the cycle before it, of the same slots, ends: ``ids`` are not read, the device has
        them. At most two cycles may be under way.
        """
        ...

    def finish_cycle(self) -> RunOutput:
        """Wait for the earliest cycle under way: the tokens it chose, [steps, slots] in the order of its slots, and how surely.

        Of a backend that does not run ahead they may be fewer steps, where all sequences end.

        A negative token is one of sampler.NOT_FINITE and NO_CHOICE.
        """
        ...

    def clear(self, slot: int, rows: int) -> None:
        """Zero a slot's caches, of which ``rows`` rows are committed: they may hold NaN."""
        ...

    def move(self, source: int, target: int, rows: int) -> None:
        """Copy the first ``rows`` rows of slot ``source`` over those of slot ``target``."""
        ...

    def read_rows(self, slot: int, rows: range) -> list[Array]:
        """Copies in host memory of committed rows of a slot, ``rows.step`` at a time, each of its own memory.

        Each is [2 * layers, kv_heads, rows.step, head_dim], key and value in turn. bfloat16 is uint16 here: values are moved,
        never computed with.
        """
        ...

    def write_rows(self, slot: int, first: int, values: Array) -> None:
        """Put one of what :meth:`read_rows` gave into a slot, from row ``first`` on."""
        ...

    def close(self) -> None:
        """Free sessions and caches."""
        ...
