"""Reads a trace: which calls belong to which step, and what they amount to. What is right and wrong, the tests say."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchCooperativeKernel", "cudaLaunchKernelExC", "cudaMemsetAsync")
BLOCKING = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "cudaMemcpyFromSymbol",
)
ALLOCATIONS = ("cudaMalloc", "cudaHostAlloc", "cudaMallocHost")
RELEASES = ("cudaFree", "cudaFreeHost")
# Of cuBLAS: the type float32, its own arithmetic for it, TF32's, and the handle's mode that turns one into the other.
FLOAT32, COMPUTE_32F, COMPUTE_32F_FAST_TF32, TF32_MODE = "0", "68", "77", "3"


@dataclass(frozen=True, eq=False)
class Call:
    """A record of the stand-ins; ``graph`` is the file of the graph that a session was running. Equal records are one object."""

    name: str
    error: int
    stream: int | None
    captured: bool
    num_bytes: int
    words: str
    graph: str

    @cached_property
    def is_launch(self) -> bool:
        """Work for the device: a kernel, a product, a fill."""
        return self.name in LAUNCHES or self.name.startswith(("cublasGemm", "cublasSgemm", "cublasLtMatmul", "cudnn"))

    @cached_property
    def is_copy(self) -> bool:
        return self.name.startswith("cudaMemcpy")

    @cached_property
    def waits(self) -> bool:
        """Whether the host stands until the device has done: pageable memory makes an asynchronous copy one that does."""
        if self.captured:
            return False
        pageable = self.name.startswith("cudaMemcpy") and "host" in self.words.split(" to ")
        return self.name in (*BLOCKING, *RELEASES) or pageable

    @cached_property
    def is_tf32(self) -> bool:
        """A product of float32 values that are rounded to TF32."""
        if "types" not in self.words:
            return "tf32" in self.words.lower() and self.is_launch
        numbers = self.words.split()
        types = numbers[numbers.index("types") + 1 :][:2]
        compute, mode = numbers[numbers.index("compute") + 1], numbers[numbers.index("mode") + 1]
        rounds = compute == COMPUTE_32F_FAST_TF32 or (compute == COMPUTE_32F and mode == TF32_MODE)
        return types == [FLOAT32, FLOAT32] and rounds

    def __str__(self) -> str:
        error = f" = error {self.error}" if self.error else ""
        captured = ", captured" if self.captured else ""
        size = f" {self.num_bytes} bytes" if self.num_bytes else ""
        where = f" in {self.graph}" if self.graph else ""
        return f"{self.name}{error}{where}:{size} {self.words[:160]} (stream {self.stream}{captured})"


@cache
def _call(record: str, graph: str) -> Call | None:
    """None where the record was cut off, as by a crash."""
    columns = record.split("\t", 5)
    if len(columns) < 6:
        return None
    name, error, stream, captured, num_bytes, words = columns
    number = None if stream == "-" else int(stream)
    return Call(name, int(error), number, captured == "1", int(num_bytes), words, graph)


@dataclass(slots=True)
class Step:
    """A step of the backend, with everything up to the next one."""

    kind: str  # prefill, full or late
    sequences: int
    prompts: int  # of the sequences, those whose prompts are read
    tokens: int
    choice: str
    warm: bool
    calls: list[Call] = field(default_factory=list)

    @property
    def launches(self) -> int:
        return sum(call.is_launch and not call.captured for call in self.calls)

    @property
    def waits(self) -> list[Call]:
        return [call for call in self.calls if call.waits]


@dataclass(slots=True)
class Opened:
    """A bundle from opening to closing; ``calls`` are all of them, those of steps too."""

    cuda_graphs: bool
    plain: bool
    kv_bytes: int = 0
    weight_bytes: int = 0
    copied_bytes: int = 0  # of the standard dialect's attention, and of products over blocks
    peak_bytes: int = 0  # of the device's memory, above what was allocated before
    failure: str | None = None
    calls: list[Call] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{'graphs' if self.cuda_graphs else 'no graphs'}, {'plain' if self.plain else 'DMTD'}"

    @property
    def needed_bytes(self) -> int:
        return self.kv_bytes + self.weight_bytes

    def warm_steps(self, *kinds: str) -> Iterator[Step]:
        return (step for step in self.steps if step.warm and (not kinds or step.kind in kinds))


def read_trace(path: Path) -> list[Opened]:
    """Every opening of a case. A trace that ends early, as after a crash, is read as far as it goes."""
    opened: list[Opened] = []
    graph, phase, live_bytes, base_bytes = "", {"choice": "", "warm": False}, 0, 0
    step: Step | None = None
    with path.open() as lines:
        for line in lines:
            call = _call(line.rstrip("\n"), graph)
            if call is None:
                continue
            if call.name == "mark":
                facts: dict[str, Any] = json.loads(call.words)
                mark = facts.pop("mark")
                if mark == "open":
                    opened.append(Opened(**facts))
                    step, base_bytes = None, live_bytes
                elif mark == "needs":
                    for name, num_bytes in facts.items():
                        setattr(opened[-1], name, num_bytes)
                elif mark == "phase":
                    phase, step = facts, None
                elif mark == "step":
                    step = Step(**facts, **phase)
                    opened[-1].steps.append(step)
                elif mark == "failed":
                    opened[-1].failure = facts["error"]
                graph = facts["file"] if mark == "graph" else ""
                continue
            if not call.error and call.name in ("cudaMalloc", "cudaMallocFromPoolAsync"):
                live_bytes += call.num_bytes
            elif not call.error and call.name in ("cudaFree", "cudaFreeAsync"):
                live_bytes -= call.num_bytes
            if opened:
                opened[-1].peak_bytes = max(opened[-1].peak_bytes, live_bytes - base_bytes)
                opened[-1].calls.append(call)
            if step:
                step.calls.append(call)
    return opened


def listed(things: Iterable[object], limit: int = 8) -> str:
    """The first different ones, for a test's message."""
    different = list(dict.fromkeys(map(str, dict.fromkeys(things))))
    more = [f"... {len(different) - limit} more"] if len(different) > limit else []
    return "\n  ".join(["", *different[:limit], *more])
