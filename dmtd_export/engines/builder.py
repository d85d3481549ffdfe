"""One engine graph -> one engine file: parse, read back, build in a thread, stream the plan to disk.

The build runs in a thread of its own so that the main thread can take Ctrl-C (the library is then told to stop at its next
step, and nothing is kept) and watch the memory. The library's own messages are kept for the error line.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dmtd_export.engines.library import Library, configure
from dmtd_export.engines.memory import anonymous_bytes
from dmtd_export.engines.network_check import NetworkFacts, check_network, prepare_attention
from dmtd_export.engines.plan import Target
from dmtd_export.engines.progress import Steps, make_monitor
from dmtd_export.errors import ExportError
from dmtd_export.graphs.engine import EngineGraph
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.engine_record import ProfileInfo
from dmtd_runtime.errors import BackendError

SAMPLE_S = 0.005
SETTLE_S = 10.0  # that the library's threads get to end after a build that failed
OWN_MESSAGES = 200  # of the library's, kept
_SCRATCH = re.compile(r"^Max Scratch Memory: (\d+) bytes")
_TACTIC = re.compile(r"Chose Runner Type: (\S+) Tactic: (\S+)")
_WEIGHTS = re.compile(r"^Total Weights Memory: (\d+) bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """What was written, and what the build said of it."""

    bytes: int
    sha256: str
    weight_bytes: int
    scratch_bytes: int | None
    peak_bytes: int  # anonymous memory above what the process had before
    seconds: float
    tactics: tuple[str, ...]
    facts: NetworkFacts


@dataclass(slots=True)
class _Messages:
    """What the library has said; numbers that it tells only its log."""

    problems: list[str] = field(default_factory=list)
    scratch_bytes: int | None = None
    weight_bytes: int | None = None
    tactics: dict[str, int] = field(default_factory=dict)  # how often each was chosen

    def take(self, severity: int, worst: int, text: str) -> None:
        if found := _SCRATCH.match(text):
            self.scratch_bytes = max(self.scratch_bytes or 0, int(found[1]))
        elif found := _WEIGHTS.match(text):
            self.weight_bytes = int(found[1])
        elif found := _TACTIC.search(text):
            name = f"{found[1]} {found[2]}"
            self.tactics[name] = self.tactics.get(name, 0) + 1
        # Without a driver every error is followed by one about the driver, which says nothing of its cause.
        elif severity <= worst and "cudaError" not in text and len(self.problems) < OWN_MESSAGES:
            self.problems.append(" ".join(text.split()))

    def first(self) -> str:
        return self.problems[0][:400] if self.problems else "it gives no reason"


def build_engine(
    library: Library,
    target: Target,
    graph: EngineGraph,
    profiles: tuple[ProfileInfo, ...],
    *,
    weights: Path,
    dtype: str,
    output: Path,
    timing_cache: Path | None,
    on_steps: Callable[[int, int], None],
) -> BuiltEngine:
    """Build ``graph``, which reads the file ``weights``, into the file ``output``.

    Raises:
        ExportError: the parser refuses the graph, what it made of it is wrong, or the build fails.
        BackendError: the library finds no usable device.
        OSError: the file cannot be written.
        KeyboardInterrupt: Ctrl-C; the library has ended its work.
    """
    steps, made = Steps(on_steps), list[BuiltEngine]()
    threads, before = _native_threads(), anonymous_bytes()

    def work() -> None:
        made.append(
            _build(
                library,
                target,
                graph,
                profiles,
                steps,
                weights=weights,
                dtype=dtype,
                output=output,
                timing_cache=timing_cache,
            )
        )

    try:
        peak = _run(work, steps)
    except BaseException as error:
        # The library logs through Python, from threads of its own that outlive a build that was stopped, and when its objects go.
        # Both must be over before the interpreter is on its way out, which aborts the process.
        traceback.clear_frames(error.__traceback__)
        deadline = time.monotonic() + SETTLE_S
        while _native_threads() > threads and time.monotonic() < deadline:
            time.sleep(SAMPLE_S)
        raise
    return replace(made[0], peak_bytes=max(0, peak - before))


def _build(
    library: Library,
    target: Target,
    graph: EngineGraph,
    profiles: tuple[ProfileInfo, ...],
    steps: Steps,
    *,
    weights: Path,
    dtype: str,
    output: Path,
    timing_cache: Path | None,
) -> BuiltEngine:
    """Everything that calls the library: never in the main thread, or Ctrl-C would be raised in a callback, and lost there."""
    module, messages, started = library.module, _Messages(), time.perf_counter()
    logger = _make_logger(module, messages)
    builder, network = _new_network(module, logger, library)
    # The parser finds the weights beside this path; it holds references into what it maps until the build is done.
    parser = module.OnnxParser(network, logger)
    _parse(parser, graph, weights, library, messages)
    facts = check_network(module, network, graph, dtype)
    prepare_attention(module, network)
    monitor = make_monitor(module, steps)
    config = builder.create_builder_config()
    config.progress_monitor = monitor
    cache = configure(library, config, target, timing_cache)
    if not graph.aliases:
        # Graphs that choose tokens find NaN by x - x, which the builder would otherwise take for 0.
        config.set_flag(module.BuilderFlag.STRICT_NANS)
    for profile in profiles:
        _add_profile(builder, config, profile, messages)
    writer = _make_writer(module, output)
    built = not steps.cancelled.is_set() and builder.build_serialized_network_to_stream(network, config, writer)
    writer.finish()
    if not built:
        raise ExportError(f"{library.backend} {library.version} cannot build {graph.name}: {messages.first()}")
    if cache is not None and timing_cache is not None:
        _save(timing_cache, bytes(config.get_timing_cache().serialize()))
    return BuiltEngine(
        bytes=writer.count,
        sha256=writer.digest.hexdigest(),
        weight_bytes=facts.constant_bytes if messages.weight_bytes is None else messages.weight_bytes,
        scratch_bytes=messages.scratch_bytes,
        peak_bytes=0,  # known when the thread is over
        seconds=round(time.perf_counter() - started, 3),
        tactics=tuple(f"{count} x {name}" for name, count in messages.tactics.items()),
        facts=facts,
    )


def _native_threads() -> int:
    """Threads of this process, the libraries' own included; 0 where the system does not tell."""
    try:
        return len(os.listdir("/proc/self/task"))  # noqa: PTH208 - names are enough
    except OSError:
        return 0


def _new_network(module: Any, logger: Any, library: Library) -> tuple[Any, Any]:
    try:
        builder = module.Builder(logger)
        network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    except (TypeError, RuntimeError, AttributeError) as error:
        raise BackendError(
            f"{library.backend} {library.version} cannot start here ({str(error).splitlines()[0]}): no usable GPU or driver; "
            "see `dmtd doctor`, or build without a GPU with: --backend tensorrt-rtx"
        ) from error
    return builder, network


def _parse(parser: Any, graph: EngineGraph, weights: Path, library: Library, messages: _Messages) -> None:
    place = weights.parent / contract.graph_file(graph.name, contract.STANDARD)
    if not parser.parse(graph.model.SerializeToString(), str(place)):
        reason = parser.get_error(0).desc() if parser.num_errors else messages.first()
        raise ExportError(
            f"{library.backend} {library.version} cannot parse {graph.name}: {reason}; install the version that "
            f"`dmtd doctor` names, or run the bundle with --backend onnxruntime"
        )


def _add_profile(builder: Any, config: Any, profile: ProfileInfo, messages: _Messages) -> None:
    made = builder.create_optimization_profile()
    for name, shape in profile.inputs.items():
        made.set_shape(name, shape.min, shape.opt, shape.max)
    index = config.add_optimization_profile(made)
    if index != profile.index:
        raise ExportError(f"profile {profile.name} was refused: {messages.first()}")


def _run(work: Callable[[], None], steps: Steps) -> int:
    """Run ``work`` in a thread to its end, whatever happens; returns the highest anonymous memory seen meanwhile."""
    failure: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            failure.append(error)

    peak, interrupted = anonymous_bytes(), False
    thread = threading.Thread(target=guarded, name="dmtd-build", daemon=True)
    thread.start()
    running = True
    while running:
        try:
            while running := thread.is_alive():
                thread.join(SAMPLE_S)
                peak = max(peak, anonymous_bytes())
        except KeyboardInterrupt:
            steps.cancelled.set()
            interrupted = True
    if interrupted:
        raise KeyboardInterrupt
    if failure:
        raise failure[0]
    return peak


def _save(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(content)
    temporary.replace(path)


def _make_logger(module: Any, messages: _Messages) -> Any:
    worst = int(module.ILogger.ERROR)

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            messages.take(int(severity), worst, msg)

    return Logger()


def _make_writer(module: Any, path: Path) -> Any:
    """An IStreamWriter of the library that writes and hashes; ``finish`` raises what went wrong in a callback."""

    class Writer(module.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IStreamWriter.__init__(self)
            self.count = 0
            self.digest = hashlib.sha256()
            self._file = path.open("wb")
            self._error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error
                return 0
            self.digest.update(data)
            self.count += len(data)
            return len(data)

        def finish(self) -> None:
            try:
                self._file.close()
            except OSError as error:
                self._error = self._error or error
            if self._error is not None:
                raise self._error

    return Writer()
