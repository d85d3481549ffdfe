"""How a run ends before its time: memory that runs out, Ctrl-C, a request to terminate. Stands around ``run``'s training."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import torch

from dmtd_models.errors import ModelError
from dmtd_models.finetune.trainer import Guard


@contextlib.contextmanager
def named_memory_errors() -> Iterator[None]:
    """Say what to lower where memory ran out, on whatever device."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's error of a GPU is a RuntimeError, that of a CPU has no class
        text = str(error)
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in text:
            raise
        raise ModelError(
            f"training: out of memory ({text.splitlines()[0] if text else 'no details'}); lower --tokens-per-step "
            "(and raise --accumulate) or give --gradient-checkpointing, with another -o if a state was saved"
        ) from error


@contextlib.contextmanager
def ending_with_a_state(guard: Guard) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the run, in all its processes, after the step at work, its state saved.

    A second Ctrl-C ends it at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, _frame: object) -> None:
        guard.stop_signal = number
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if guard.stop_signal == signal.SIGTERM:
        raise SystemExit(128 + guard.stop_signal)
    if guard.stopped or guard.stop_signal is not None:
        raise KeyboardInterrupt
