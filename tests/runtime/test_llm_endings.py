"""How requests end before they are done: abort, deadline, close, Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from runtime_support import ENDLESS, GREEDY, TinyBundle, held, wait_until

from dmtd_runtime import LLM, AbortedError, SamplingParams
from dmtd_runtime.serving import sequence

pytestmark = pytest.mark.timeout(300)


def test_abort_while_running(llm: LLM, bundle: TinyBundle) -> None:
    with held(llm, after=8):
        stream = llm.stream([1, 2], ENDLESS, request_id="x")
        got = [next(stream)]
        assert llm.abort("x")
    got += list(stream)
    assert got[-1].finish_reason == "abort"
    token_ids = [token for delta in got for token in delta.token_ids]
    assert 0 < len(token_ids) <= 9
    assert token_ids == bundle.greedy_tokens([1, 2], len(token_ids))
    assert not llm.abort("x")
    assert not llm.abort("never heard of")


def test_abort_while_waiting(bundle: TinyBundle) -> None:
    with LLM(bundle.directory, threads=1) as llm, llm.stream([1], ENDLESS) as running:
        with held(llm, after=8):
            next(running)
            waiting = llm.stream([2], ENDLESS, request_id="waits")
            assert llm.abort("waits")
        assert [(delta.token_ids, delta.finish_reason) for delta in waiting] == [((), "abort")]


def test_abort_of_several_sequences_half_of_them_waiting(bundle: TinyBundle) -> None:
    with LLM(bundle.directory, max_num_seqs=2, threads=1) as llm:
        with held(llm, after=8):
            stream = llm.stream([1], SamplingParams(temperature=1, n=5, ignore_eos=True), request_id="x")
            next(stream)
            llm.abort("x")
        ends = [delta.index for delta in stream if delta.finish_reason == "abort"]
        assert sorted(ends) == [0, 1, 2, 3, 4]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Deadlines are held to the clock and ``ahead`` seconds more."""
    clock = SimpleNamespace(ahead=0.0, monotonic=lambda: time.monotonic() + clock.ahead)
    monkeypatch.setattr(sequence, "time", clock)
    return clock


def test_a_deadline_while_running(llm: LLM, bundle: TinyBundle, clock: SimpleNamespace) -> None:
    with ThreadPoolExecutor(1) as pool, held(llm, after=8) as hold:
        answer = pool.submit(llm.generate, [4, 5], ENDLESS, timeout_s=3600)
        hold.wait()
        clock.ahead = 7200
        hold.release()
        [output] = answer.result()
    [one] = output.outputs
    assert one.finish_reason == "deadline"
    assert 0 < len(one.token_ids) <= 9
    assert one.token_ids == bundle.greedy_tokens([4, 5], len(one.token_ids))


def test_a_deadline_while_waiting_ends_before_the_running_batch(bundle: TinyBundle, clock: SimpleNamespace) -> None:
    with LLM(bundle.directory, threads=1) as llm, held(llm, after=20) as until_late_ended, held(llm, after=4) as hold:
        running = llm.stream([1], ENDLESS)
        late = llm.stream([2], ENDLESS, timeout_s=3600)
        clock.ahead = 7200
        hold.release()
        assert [(delta.token_ids, delta.finish_reason) for delta in late] == [((), "deadline")]
        assert not llm._requests[running.request_id].finished
        until_late_ended.release()
        running.close()


def test_close_ends_running_and_waiting_requests(bundle: TinyBundle) -> None:
    llm = LLM(bundle.directory, threads=1)
    with ThreadPoolExecutor(3) as pool, held(llm, after=8):
        results = [pool.submit(llm.generate, [i], ENDLESS) for i in (1, 2, 3)]
        stream = llm.stream([4], ENDLESS)
        wait_until(lambda: len(llm._worker._loop.sequences) + len(llm._worker._incoming) == 4)
        llm.close()
        outputs = [result.result(timeout=60)[0].outputs[0] for result in results]
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
    main = threading.main_thread().ident
    assert main is not None
    with LLM(bundle.directory, threads=1) as llm:
        with held(llm, after=8) as hold:

            def interrupt() -> None:
                hold.wait()
                signal.pthread_kill(main, signal.SIGINT)

            thread = threading.Thread(target=interrupt)
            thread.start()
            # It does not wait for the model: the engine stands still.
            with pytest.raises(KeyboardInterrupt):
                llm.generate([1], ENDLESS)
            thread.join()
            assert llm._requests == {}
        assert len(llm.generate([2], GREEDY)[0].outputs[0].token_ids) == 12
