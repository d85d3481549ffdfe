"""What ONNX Runtime's CUDA provider asks of CUDA when it runs a bundle: the real wheel over stand-ins of NVIDIA's libraries.

The stand-ins answer what a driver would, so whatever is illegal fails; kernels do nothing, so no number is looked at.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable

import pytest
from cuda_host.cases import Case
from cuda_host.trace import ALLOCATIONS, Opened, listed

pytestmark = pytest.mark.cuda_host

Ran = tuple[list[Opened], subprocess.CompletedProcess[str]]
MOST_MEMORY = 1.2  # of bundle and caches


def expect_none(things: Iterable[object], limit: int = 8) -> None:
    """No assert, which would print every one of some hundred thousand calls."""
    things = list(things)
    if things:
        pytest.fail(f"{len(things)} of these:{listed(things, limit)}", pytrace=False)


def test_it_runs(ran: Ran, case: Case) -> None:
    opened, done = ran
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-2000:]}"
    failures = [f"{o.name}: {o.failure}" for o in opened if o.failure]
    expect_none(failures)
    assert len(opened) == len(case.modes), f"opened {len(opened)} times, expected {len(case.modes)}"
    for o in opened:
        kinds = {"prefill", "full"} if o.plain else {"prefill", "full", "late"}
        assert {step.kind for step in o.warm_steps()} == kinds, o.name


def test_a_driver_would_refuse_nothing(ran: Ran) -> None:
    """No empty or too large grid, nothing illegal within a capture, no copy beside its memory, no wrong handle; and what a
    copy still reads is not written, which a driver would not see either."""
    refused = [call for o in ran[0] for call in o.calls if call.error]
    expect_none(refused)


def test_float32_is_never_rounded_to_tf32(ran: Ran) -> None:
    rounded = [call for o in ran[0] for call in o.calls if call.is_tf32]
    expect_none(rounded)


def test_cudnn_computes_nothing(ran: Ran) -> None:
    """The choice of a token needs no library of 400 MB, and a user without it no longer fails at the first token."""
    called = [call for o in ran[0] for call in o.calls if call.name.startswith("cudnn")]
    expect_none(called)


def test_the_host_waits_once_a_token(ran: Ran) -> None:
    """Prompts may run one by one, each with its own token, behind the sequences that stand at a head."""
    waiting = []
    for opened in ran[0]:
        for step in opened.warm_steps():
            allowed = step.prompts + (step.prompts < step.sequences)
            if len(step.waits) > allowed:
                what = f"{opened.name}, {step.choice}, {step.kind} of {step.sequences}"
                waiting.append(f"{what}: {len(step.waits)} waits:{listed(step.waits, 4)}")
    expect_none(waiting, 4)


def test_after_warming_up_nothing_is_allocated_or_captured(ran: Ran) -> None:
    late = [
        call
        for opened in ran[0]
        for step in opened.warm_steps()
        for call in step.calls
        if call.name in (*ALLOCATIONS, "cudaStreamBeginCapture", "cudaGraphInstantiate")
    ]
    expect_none(late)


def test_all_work_of_a_step_goes_to_one_stream(ran: Ran) -> None:
    """Nothing orders the legacy stream with a non-blocking one, nor two of those with each other."""
    for opened in ran[0]:
        work = [call for step in opened.warm_steps() for call in step.calls if call.is_launch or call.is_copy]
        streams = {call.stream for call in work if call.stream is not None}
        legacy = [call for call in work if call.stream == 0]
        expect_none(legacy)
        assert len(streams) <= 1, f"{opened.name}: streams {sorted(streams)}"


def test_graphs_are_captured_only_where_asked_for(ran: Ran) -> None:
    for opened in ran[0]:
        replays = [call for call in opened.calls if call.name == "cudaGraphLaunch"]
        expect_none(replays if not opened.cuda_graphs else ())


def test_memory_is_that_of_bundle_and_caches(ran: Ran, case: Case) -> None:
    """And of what the standard dialect's attention and products over blocks write out."""
    if not case.judges_memory:
        pytest.skip("too small a bundle: what a session needs in any case outweighs it")
    assert all(opened.weight_bytes and opened.kv_bytes for opened in ran[0]), "a bundle was not opened"
    expect_none(
        f"{opened.name}: {opened.peak_bytes / 1e6:.1f} MB allocated, {opened.needed_bytes / 1e6:.1f} MB needed, "
        f"{opened.copied_bytes / 1e6:.1f} MB copied"
        for opened in ran[0]
        if opened.peak_bytes > MOST_MEMORY * opened.needed_bytes + opened.copied_bytes
    )
