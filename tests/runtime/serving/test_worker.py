"""The worker: who runs when, what a failure of the backend or of one sequence does, and that nothing ever hangs."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from device_support import engine_backend, simulator_engines
from runtime_support import TinyBundle, poisoned_bundle, wait_until
from worker_support import CYCLE, VOCAB, Client, ScriptedBackend, made

from dmtd_runtime import LLM, AbortedError, BackendError, QueueFullError, RequestError, SamplingParams
from dmtd_runtime.backends.base import RunOutput, SlotStep
from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.sampling.sampler import Sampler
from dmtd_runtime.serving import sequence as sequence_module
from dmtd_runtime.serving.counts import STEP_TOKENS
from dmtd_runtime.serving.options import ServingOptions
from dmtd_runtime.serving.sequence import TokenEvent
from dmtd_runtime.serving.worker import Worker

pytestmark = pytest.mark.timeout(300)

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, ignore_eos=True)


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend()


@pytest.fixture
def worker(backend: ScriptedBackend) -> Iterator[Worker]:
    worker = made(backend)
    yield worker
    backend.gate.set()
    worker.close()
    assert not worker._thread.is_alive()


def test_batches_of_as_many_as_there_are_slots(worker: Worker, backend: ScriptedBackend) -> None:
    clients = [Client(first=i, tokens=3 + i) for i in range(5)]
    worker.submit([client.sequence for client in clients])
    for i, client in enumerate(clients):
        assert client.wait().end == "length"
        assert client.tokens == [(i + 1 + step) % VOCAB for step in range(3 + i)]
    assert max(len(steps) for steps in backend.asked) == 2
    assert all(client.sequence.started is not None for client in clients)
    # First come, first served: each pair ends before the next one starts.
    starts = [client.sequence.started for client in clients]
    assert starts == sorted(starts)


def test_the_queue_is_bounded_behind_the_free_slots(backend: ScriptedBackend) -> None:
    """Two slots and two places: the fifth is refused, whatever the worker has come to; who ends makes room."""
    backend.gate.clear()
    worker = made(backend, max_num_queued_reqs=2, max_num_queued_tokens=7)
    clients = [Client(first=i, tokens=2, prompt_len=3) for i in range(4)]
    for client in clients[:3]:
        worker.submit([client.sequence])
    for refused, numbers in ((2, "got 3 waiting sequences with 9 prompt tokens"), (1, None)):
        more = [Client(prompt_len=3).sequence for _ in range(refused)]
        if numbers is None:
            more[0].ids = more[0].ids * 2
            numbers = "got 2 waiting sequences with 9 prompt tokens"
        with pytest.raises(QueueFullError, match=numbers + r", expected at most 2 \(.*\) with 7 \("):
            worker.submit(more)
    worker.submit([clients[3].sequence])
    counts = worker.snapshot()
    assert counts.running + counts.waiting == 4
    backend.gate.set()
    assert [client.wait().end for client in clients] == ["length"] * 4
    with pytest.raises(RequestError, match="got 5 sequences at once, expected at most 4"):
        worker.submit([Client().sequence for _ in range(5)])
    last = [Client(first=i) for i in range(4)]
    worker.submit([client.sequence for client in last])
    assert [client.wait().end for client in last] == ["length"] * 4
    wait_until(lambda: worker.snapshot().running == 0)
    counts = worker.snapshot()
    assert (counts.waiting, counts.waiting_prompt_tokens) == (0, 0)
    assert (counts.prompt_tokens, counts.generation_tokens) == (4 * 3 + 4, 4 * 2 + 4 * 5)
    tokens = [sum(len(one.step.late) for one in steps) for steps in backend.asked]
    expected, _ = np.histogram(tokens, [0, *(end + 0.5 for end in STEP_TOKENS), np.inf])
    assert counts.step_tokens == tuple(expected)
    assert counts.step_tokens_sum == sum(tokens) == 4 * 3 + 4 + 4 * 1 + 4 * 4  # a prompt's pass gives the first token
    worker.close()


def test_after_every_step_and_at_the_end_the_worker_says_so(backend: ScriptedBackend) -> None:
    told: list[int] = []
    client = Client(tokens=6)
    worker = Worker(
        backend,
        CyclePlan(cycle=CYCLE),
        options=ServingOptions(prefix_cache_bytes=0),
        after_step=lambda: told.append(len(client.tokens)),
    )
    worker.submit([client.sequence])
    client.wait()
    worker.close()
    assert told[-2:] == [6, 6], "once more, behind the last step"
    assert sorted(set(told) - {0}) == [1, 2, 3, 4, 5, 6]


def test_slots_are_compact_and_in_order() -> None:
    backend = ScriptedBackend(slots=6)
    worker = made(backend)
    clients = [Client(first=i, tokens=tokens, prompt_len=1 + i) for i, tokens in enumerate((2, 9, 1, 5, 12, 3))]
    worker.submit([client.sequence for client in clients])
    for client in clients:
        client.wait()
    for steps in backend.asked:
        order = [(step.step.kind == "prefill", step.slot) for step in steps]
        assert order == sorted(set(order)), "heads by slot, then prompts by slot"
    # When all decode together, the slots in use have no gap.
    full = [[step.slot for step in steps] for steps in backend.asked if {step.step.kind for step in steps} == {"full"}]
    assert full
    assert all(slots == list(range(len(slots))) for slots in full)
    assert [client.tokens[-1] for client in clients] == [(i + n) % VOCAB for i, n in enumerate((2, 9, 1, 5, 12, 3))]
    worker.close()


def test_cancelling_between_two_steps(worker: Worker, backend: ScriptedBackend) -> None:
    backend.gate.clear()
    one, other = Client(tokens=1000), Client(first=3, tokens=6)
    worker.submit([one.sequence, other.sequence])
    one.reason = "abort"
    backend.gate.set()
    assert one.wait().end == "abort"
    assert other.wait().end == "length"
    assert other.tokens == [4, 5, 6, 7, 8, 9]


def test_a_cancelled_sequence_that_waits_ends_between_two_steps(worker: Worker, backend: ScriptedBackend) -> None:
    backend.gate.clear()
    running, waiting = [Client(tokens=1 << 19), Client(tokens=1 << 19)], Client()
    worker.submit([client.sequence for client in running])
    wait_until(lambda: running[1].sequence.started is not None)
    worker.submit([waiting.sequence])
    waiting.reason = "abort"
    backend.gate.set()
    assert (waiting.wait().end, waiting.tokens) == ("abort", [])
    assert not any(client.done.is_set() for client in running), "it had to wait for the batch"
    for client in running:
        client.reason = "abort"
    assert [client.wait().end for client in running] == ["abort", "abort"]


def test_a_panic_of_a_native_library_reaches_every_caller(worker: Worker, backend: ScriptedBackend) -> None:
    class Panic(BaseException):
        pass

    def run(steps: Sequence[SlotStep], committed: Sequence[int], **options: object) -> RunOutput:
        raise Panic("native code gave up")

    backend.run = run  # type: ignore[method-assign]
    client = Client()
    worker.submit([client.sequence])
    assert "Panic: native code gave up" in str(client.wait().end)
    with pytest.raises(BackendError, match="stopped earlier"):
        worker.submit([Client().sequence])


def test_a_finalizer_that_cancels_in_the_workers_own_thread_does_not_block_it() -> None:
    """As a dropped stream does whose reference cycle is collected while the worker tells its request of a token."""
    worker = made(ScriptedBackend(slots=1))
    first, waiting = Client(tokens=50), Client()
    told = first.sequence.on_event

    def tell(event: TokenEvent) -> None:
        told(event)
        waiting.reason = "abort"  # all that a finalizer does

    first.sequence.on_event = tell
    worker.submit([first.sequence, waiting.sequence])
    assert waiting.wait().end == "abort"
    assert first.wait().end == "length"
    worker.close()


def test_a_passed_deadline_ends_waiting_and_running_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(sequence_module, "time", clock)
    worker = made(ScriptedBackend(slots=1))
    running, waiting, patient = Client(tokens=1 << 20, deadline=20.0), Client(deadline=10.0), Client()
    worker.submit([client.sequence for client in (running, waiting, patient)])
    wait_until(lambda: running.tokens != [])
    clock.now = 15.0
    assert (waiting.wait().end, waiting.tokens) == ("deadline", [])
    assert not running.done.is_set(), "the waiting one had to wait for the batch"
    clock.now = 25.0
    assert running.wait().end == "deadline"
    assert patient.wait().end == "length"
    worker.close()


def test_a_failing_backend_ends_everything_with_its_error(worker: Worker, backend: ScriptedBackend) -> None:
    backend.fail_at = 4
    clients = [Client(tokens=100) for _ in range(5)]
    worker.submit([client.sequence for client in clients])
    for client in clients:
        assert isinstance(client.wait().end, BackendError)
        assert "the device is gone" in str(client.end)
    assert [len(client.tokens) > 0 for client in clients] == [True, True, False, False, False]
    wait_until(lambda: backend.closed == 1)
    with pytest.raises(BackendError, match="the worker stopped earlier: the device is gone; open the bundle again"):
        worker.submit([Client().sequence])


def test_a_bug_in_the_backend_is_an_error_with_its_name(
    worker: Worker, backend: ScriptedBackend, caplog: pytest.LogCaptureFixture
) -> None:
    def run(steps: Sequence[SlotStep], committed: Sequence[int], **options: object) -> RunOutput:
        raise ZeroDivisionError("a bug")

    backend.run = run  # type: ignore[method-assign]
    client = Client()
    worker.submit([client.sequence])
    assert "ZeroDivisionError: a bug" in str(client.wait().end)
    assert "Traceback" in caplog.text


def test_nan_ends_its_own_sequence_and_clears_its_slot(worker: Worker, backend: ScriptedBackend) -> None:
    backend.gate.clear()
    ill, healthy = Client(), Client(first=7)
    worker.submit([ill.sequence, healthy.sequence])
    backend.nan_slots = {0}
    backend.gate.set()
    assert isinstance(ill.wait().end, BackendError)
    backend.nan_slots = set()
    healthy.wait()
    assert set(backend.cleared) == {0}


def test_close_ends_what_runs_and_what_waits(backend: ScriptedBackend) -> None:
    worker = made(backend)
    clients = [Client(tokens=1 << 19) for _ in range(4)]
    worker.submit([client.sequence for client in clients])
    wait_until(lambda: clients[0].tokens != [])
    # The worker asks every running sequence whether to go on; a request answers for the worker.
    for client in clients[:2]:
        client.sequence.cancelled = lambda: "abort" if worker.is_closing() else None
    worker.close()
    assert [client.end for client in clients] == ["abort"] * 4
    assert backend.closed == 1
    worker.close()
    assert backend.closed == 1
    with pytest.raises(AbortedError):
        worker.submit([Client().sequence])


def test_close_from_an_event(backend: ScriptedBackend) -> None:
    """The worker's own thread may close it: it cannot wait for itself."""
    worker = made(backend)
    client = Client(tokens=3)
    take = client.sequence.on_event

    def close(event: TokenEvent) -> None:
        take(event)
        worker.close()

    client.sequence.on_event = close
    worker.submit([client.sequence])
    client.wait()
    worker._thread.join(120)
    assert not worker._thread.is_alive()


def test_submitting_from_many_threads_while_it_closes(backend: ScriptedBackend) -> None:
    """Every sequence that was taken ends; every other one was refused."""
    worker = made(backend)
    taken: list[Client] = []

    def submit(first: int) -> None:
        for _ in range(50):
            client = Client(first=first, tokens=2)
            try:
                worker.submit([client.sequence])
            except AbortedError:
                return
            taken.append(client)

    threads = [threading.Thread(target=submit, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(taken) > 8)
    worker.close()
    for thread in threads:
        thread.join()
    assert taken
    for client in taken:
        assert client.wait().end in ("length", "abort")


# With a model


def test_every_request_gets_the_error_of_a_backend_that_fails(
    bundle: TinyBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(bundle.directory, max_num_seqs=2, threads=1) as llm:
        backend, calls = llm._worker._backend, []
        run = backend.run

        def failing(steps: Sequence[SlotStep], *args: object, **options: object) -> RunOutput:
            calls.append(steps)
            if len(calls) > 20:
                raise BackendError("out of memory on the device")
            time.sleep(0.002)
            return run(steps, *args, **options)

        monkeypatch.setattr(backend, "run", failing)
        monkeypatch.setattr(backend, "runs_cycles", False)
        with ThreadPoolExecutor(5) as pool:
            results = [pool.submit(llm.generate, [i], ENDLESS) for i in range(1, 5)]
            stream = pool.submit(lambda: list(llm.stream([9], ENDLESS)))
            for result in [*results, stream]:
                with pytest.raises(BackendError, match="out of memory on the device"):
                    result.result(timeout=120)
        assert llm._requests == {}
        with pytest.raises(BackendError, match="stopped earlier"):
            llm.generate([1], GREEDY)


def test_over_engines_who_waits_hears_after_every_cycle(bundle: TinyBundle) -> None:
    """Many cycles are one step of the loop where nobody comes; streams and counts do not wait for its end."""
    backend = engine_backend(bundle.directory, bundle.manifest, simulator_engines(bundle.directory))
    plan, client = CyclePlan(cycle=bundle.manifest.cycle), Client(tokens=4 * CYCLE.cycle_length)
    client.sequence.sampler = Sampler(GREEDY, vocab_size=bundle.manifest.model.vocab_size, prompt_ids=[0], seed=0)
    told: list[tuple[int, int]] = []
    worker = Worker(
        backend,
        plan,
        after_step=lambda: told.append((len(client.tokens), worker.snapshot().generation_tokens)),
    )
    worker.submit([client.sequence])
    client.wait()
    worker.close()
    assert {tokens for tokens, _ in told} >= {1, 5, 9, 13, 16}
    assert all(tokens == counted for tokens, counted in told), "counts come before those who read them are woken"
    assert backend.stats.cycles >= 4


def test_nan_logits_fail_their_own_request(tmp_path: Path) -> None:
    """Token 255 has a NaN embedding; a neighbour and the next user of the slot see nothing of it."""
    directory, _ = poisoned_bundle(tmp_path)
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logit_bias={255: -100})
    with LLM(directory, max_num_seqs=3, threads=1) as llm:
        [want] = llm.generate([1, 2, 3], params)
        with ThreadPoolExecutor(3) as pool:
            for _ in range(5):
                good = pool.submit(llm.generate, [1, 2, 3], params)
                bad = [pool.submit(llm.generate, [4, 255, 5], params) for _ in range(2)]
                assert good.result(120)[0].outputs[0].token_ids == want.outputs[0].token_ids
                for result in bad:
                    with pytest.raises(BackendError, match="NaN"):
                        result.result(120)


def test_an_llm_that_is_dropped_ends_its_thread(bundle: TinyBundle) -> None:
    before = threading.active_count()
    llm = LLM(bundle.directory, threads=1)
    llm.generate([1, 2], GREEDY)
    thread, gone = llm._worker._thread, weakref.ref(llm)
    del llm
    gc.collect()
    assert gone() is None
    thread.join(120)
    assert not thread.is_alive()
    assert threading.active_count() == before


def test_a_forked_child_gets_an_error_and_does_not_wait(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmtd_runtime.serving.worker.os.getpid", lambda: -1)
    with pytest.raises(AbortedError, match="after forking"):
        worker.submit([Client().sequence])
