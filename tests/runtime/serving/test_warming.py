"""The worker warms its backend up in the thread that runs it: ONNX Runtime keeps captured graphs for each thread."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence

import pytest
from worker_support import CYCLE

from dmtd_runtime import BackendError
from dmtd_runtime.backends.base import Array, RunStats, SlotStep, StepwiseBackend
from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.serving.worker import Worker

pytestmark = pytest.mark.timeout(300)

PLAN = CyclePlan(cycle=CYCLE)


class Warming(StepwiseBackend):
    """A backend that runs nothing, and warms up as it is told."""

    slots = max_rows = capacity = max_model_len = 1

    def __init__(self, warming: Callable[[], None]) -> None:
        self.stats = RunStats()
        self.closed = 0
        self._warming = warming

    def warm_up(self) -> None:
        self._warming()

    def run(self, steps: Sequence[SlotStep], *, greedy: bool = False) -> Array:
        raise AssertionError("nothing is submitted")

    def reset(self, slot: int, *, clear: bool = False) -> None: ...

    def move(self, source: int, target: int) -> bool:
        return False

    def close(self) -> None:
        self.closed += 1


def test_it_warms_up_in_its_own_thread_before_it_is_there() -> None:
    threads: list[threading.Thread] = []

    def warm_up() -> None:
        time.sleep(0.05)
        threads.append(threading.current_thread())

    for asked in (False, True):
        backend = Warming(warm_up)
        worker = Worker(backend, PLAN, warm_up=asked)
        assert threads == ([worker._thread] if asked else [])
        worker.close()
        assert backend.closed == 1


@pytest.mark.parametrize("error", [BackendError("no memory"), ValueError("no memory")])
def test_what_fails_in_it_is_raised_and_the_backend_closed(error: Exception) -> None:
    def fail() -> None:
        raise error

    backend = Warming(fail)
    with pytest.raises(BackendError, match="no memory"):
        Worker(backend, PLAN, warm_up=True)
    assert backend.closed == 1


def test_ctrl_c_within_it_closes_the_backend() -> None:
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.05)

    backend = Warming(interrupt)
    with pytest.raises(KeyboardInterrupt):
        Worker(backend, PLAN, warm_up=True)
    assert backend.closed == 1
