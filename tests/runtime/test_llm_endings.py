"""How requests end before they are done: abort, deadline, close, Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from runtime_support import TinyBundle, TinyBundles

from dmtd_runtime import LLM, AbortedError, SamplingParams

pytestmark = pytest.mark.timeout(60)

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def bundle(tiny: TinyBundles) -> TinyBundle:
    return tiny.get()


@pytest.fixture(scope="module")
def llm(bundle: TinyBundle) -> Iterator[LLM]:
    with LLM(bundle.directory, max_num_seqs=4, threads=1) as llm:
        yield llm


def test_abort_while_running(llm: LLM, bundle: TinyBundle) -> None:
    stream = llm.stream([1, 2], ENDLESS, request_id="x")
    got = [next(stream)]
    assert llm.abort("x")
    got += list(stream)
    assert got[-1].finish_reason == "abort"
    token_ids = [token for delta in got for token in delta.token_ids]
    assert 0 < len(token_ids) < 200
    assert token_ids == bundle.greedy_tokens([1, 2], len(token_ids))
    assert not llm.abort("x")
    assert not llm.abort("never heard of")


def test_abort_while_waiting(bundle: TinyBundle) -> None:
    with LLM(bundle.directory, threads=1) as llm, llm.stream([1], ENDLESS) as running:
        next(running)
        waiting = llm.stream([2], ENDLESS, request_id="waits")
        assert llm.abort("waits")
        assert [(delta.token_ids, delta.finish_reason) for delta in waiting] == [((), "abort")]


def test_abort_of_several_sequences_half_of_them_waiting(bundle: TinyBundle) -> None:
    with LLM(bundle.directory, max_num_seqs=2, threads=1) as llm:
        stream = llm.stream([1], SamplingParams(temperature=1, n=5, ignore_eos=True), request_id="x")
        next(stream)
        llm.abort("x")
        ends = [delta.index for delta in stream if delta.finish_reason == "abort"]
        assert sorted(ends) == [0, 1, 2, 3, 4]


def test_a_deadline_while_running(llm: LLM, bundle: TinyBundle) -> None:
    [output] = llm.generate([4, 5], ENDLESS, timeout_s=0.02)
    [one] = output.outputs
    assert one.finish_reason in ("deadline", "length")  # a very quick machine may finish 250 tokens
    assert one.token_ids == bundle.greedy_tokens([4, 5], len(one.token_ids))


def test_a_deadline_while_waiting_ends_before_the_running_batch(bundle: TinyBundle) -> None:
    with LLM(bundle.directory, threads=1) as llm, llm.stream([1], ENDLESS) as running:
        slow_down(llm, 0.01)
        next(running)
        start = time.monotonic()
        [late] = llm.generate([2], ENDLESS, timeout_s=0.1)
        assert time.monotonic() - start < 1.0
        assert (late.outputs[0].token_ids, late.outputs[0].finish_reason) == ([], "deadline")
        assert next(running).finish_reason is None


def slow_down(llm: LLM, seconds: float) -> None:
    """Make every step of the real backend take longer."""
    run = llm._engine._backend.run

    def slow(*args, **options):
        time.sleep(seconds)
        return run(*args, **options)

    llm._engine._backend.run = slow


def test_close_ends_running_and_waiting_requests(bundle: TinyBundle) -> None:
    llm = LLM(bundle.directory, threads=1)
    slow_down(llm, 0.005)
    with ThreadPoolExecutor(3) as pool:
        results = [pool.submit(llm.generate, [i], ENDLESS) for i in (1, 2, 3)]
        stream = llm.stream([4], ENDLESS)
        while llm.stats.late_steps < 3:
            time.sleep(0.001)
        llm.close()
        outputs = [result.result(timeout=10)[0].outputs[0] for result in results]
    assert {output.finish_reason for output in outputs} == {"abort"}
    assert list(stream)[-1].finish_reason == "abort"


def test_after_close(bundle: TinyBundle) -> None:
    llm = LLM(bundle.directory, threads=1)
    llm.close()
    llm.close()
    for call in (lambda: llm.generate([1], GREEDY), lambda: llm.stream([1], GREEDY)):
        with pytest.raises(AbortedError, match="closed; open the bundle again"):
            call()
    assert llm._requests == {}
    assert not llm.abort("request-0")


def test_ctrl_c_cancels(bundle: TinyBundle) -> None:
    with LLM(bundle.directory, threads=1) as llm:
        slow_down(llm, 0.01)
        main = threading.main_thread().ident
        assert main is not None
        timer = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))
        timer.start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            llm.generate([1], ENDLESS)
        timer.join()
        assert time.monotonic() - start < 2
        assert llm._requests == {}
        assert len(llm.generate([2], GREEDY)[0].outputs[0].token_ids) == 12
