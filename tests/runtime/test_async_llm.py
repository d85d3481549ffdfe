"""AsyncLLM: the tokens of LLM, thousands of streams without a thread, and ends that cost nobody else anything."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from runtime_support import ENDLESS, GREEDY, TinyBundle, held, random_prompt, wait_until

from dmtd_runtime import LLM, AbortedError, AsyncLLM, BackendError, Delta, QueueFullError, RequestError, SamplingParams
from dmtd_runtime.async_llm import LONG_PROMPT, AsyncStream, _EventLoop, _Reader

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def llm(bundle: TinyBundle) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(bundle.directory, max_num_seqs=8, max_num_partial_prefills=8, threads=1)
    yield llm
    asyncio.run(llm.close())


async def until(condition: Any) -> None:
    """Patiently, while the event loop goes on."""
    await asyncio.to_thread(wait_until, condition)


async def tokens_of(stream: AsyncStream) -> list[int]:
    return [token_id async for delta in stream for token_id in delta.token_ids]


def test_tokens_text_and_metrics_are_those_of_llm(llm: AsyncLLM, bundle: TinyBundle) -> None:
    params = SamplingParams(temperature=1, seed=3, n=2, max_tokens=20, ignore_eos=True, logprobs=1)
    conversation = [{"role": "user", "content": "Hi"}]
    with LLM(bundle.directory, threads=1) as alone:
        [whole], [answer] = alone.generate("Once upon", params), alone.chat(conversation, GREEDY)

    async def main() -> None:
        deltas: list[Delta] = []
        async with llm.generate("Once upon", params, request_id="mine") as stream:
            async for delta in stream:
                deltas.append(delta)
            output = await stream.result()
        assert output.outputs == whole.outputs
        assert {delta.request_id for delta in deltas} == {"mine"} == {output.request_id}
        for one in whole.outputs:
            mine = [delta for delta in deltas if delta.index == one.index]
            assert "".join(delta.text for delta in mine) == one.text
            assert [token_id for delta in mine for token_id in delta.token_ids] == one.token_ids
            assert [entry for delta in mine for entry in delta.logprobs] == one.logprobs
            assert [delta.finish_reason for delta in mine if delta.finish_reason] == ["length"]
        assert 0 <= output.metrics.queued_s <= output.metrics.first_token_s <= output.metrics.finished_s
        chatted = await llm.chat(conversation, GREEDY).result()
        assert (chatted.prompt, chatted.outputs) == (answer.prompt, answer.outputs)

    asyncio.run(main())


def test_two_thousand_streams_in_one_event_loop_need_no_thread(llm: AsyncLLM, bundle: TinyBundle) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    prompts = [random_prompt(seed, 3) for seed in range(8)]
    want = [bundle.greedy_tokens(prompt, 1) for prompt in prompts]
    threads: set[int] = set()

    async def one(number: int) -> list[int]:
        found = await tokens_of(llm.generate(prompts[number % 8], params))
        threads.add(threading.active_count())
        return found

    async def main() -> None:
        before = threading.active_count()
        found = await asyncio.gather(*(one(number) for number in range(2000)))
        assert found == want * 250
        assert threads == {before}

    asyncio.run(main())
    assert llm._requests == {}


def test_an_event_loop_is_woken_once_a_step(bundle: TinyBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        loop, calls = asyncio.get_running_loop(), []
        real = loop.call_soon_threadsafe

        def counted(callback: Any, *args: Any, **options: Any) -> Any:
            if threading.current_thread() is llm._worker._thread:
                calls.append(llm.stats.full_passes + llm.stats.late_steps)
            return real(callback, *args, **options)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        async with AsyncLLM(bundle.directory, max_num_seqs=8, threads=1) as llm:
            found = await asyncio.gather(*(tokens_of(llm.generate([n + 1], GREEDY)) for n in range(8)))
            assert found == [bundle.greedy_tokens([n + 1], 12) for n in range(8)]
        assert calls == sorted(set(calls)), "twice between the same two steps"

    asyncio.run(main())


@pytest.mark.parametrize("way", ["break", "aclose", "with", "cancel", "drop"])
def test_leaving_a_stream_frees_its_slot(bundle: TinyBundle, way: str) -> None:
    async def main() -> None:
        async with AsyncLLM(bundle.directory, max_num_seqs=1, threads=1) as llm:
            with held(llm, after=8):
                stream = llm.generate([1, 2], ENDLESS)
                # One piece: the first may hold all that was made before the worker was held.
                async for _ in stream:
                    break
                if way == "aclose":
                    await stream.aclose()
                elif way == "with":
                    async with stream:
                        pass
                elif way == "cancel":
                    task = asyncio.ensure_future(tokens_of(stream))
                    await asyncio.sleep(0)
                    task.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await task
                    del task
                del stream
                gc.collect()
                assert llm._requests == {}
            # The only slot is free again long before the first request's 250 tokens would have been made.
            steps = llm.stats.full_passes + llm.stats.late_steps
            assert len(await tokens_of(llm.generate([3], GREEDY))) == 12
            assert llm.stats.full_passes + llm.stats.late_steps - steps < 100

    asyncio.run(main())


def test_a_slow_reader_gets_one_large_piece(llm: AsyncLLM, bundle: TinyBundle) -> None:
    async def main() -> None:
        async with llm.generate("ab", GREEDY) as stream:
            await stream.start()
            request = llm._requests[stream.request_id]
            await until(lambda: request.finished)
            pieces = [delta async for delta in stream]
            output = await stream.result()
        [piece] = pieces
        [one] = output.outputs
        assert one.token_ids == bundle.greedy_tokens(output.prompt_token_ids, 12)
        assert (list(piece.token_ids), piece.text, piece.finish_reason) == (one.token_ids, one.text, "length")

    asyncio.run(main())


def test_abort_and_deadline(llm: AsyncLLM) -> None:
    async def main() -> None:
        with held(llm, after=4):
            stream = llm.generate([1, 2], ENDLESS, request_id="x")
            assert not llm.abort("x"), "it has not started"
            assert stream.request_id is None
            await anext(stream)
            assert stream.request_id == "x"
            assert llm.abort("x")
            with pytest.raises(RequestError, match="request_id: 'x' is in use"):
                await llm.generate([1], GREEDY, request_id="x").start()
        assert [delta.finish_reason async for delta in stream][-1] == "abort"
        assert not llm.abort("x")
        late = await llm.generate([1, 2], ENDLESS, timeout_s=1e-9).result()
        assert late.outputs[0].finish_reason == "deadline"

    asyncio.run(main())


def test_errors_are_raised_when_a_stream_starts(llm: AsyncLLM) -> None:
    async def main() -> None:
        for stream in (llm.generate([259], GREEDY), llm.generate([1], GREEDY, priority=1.5)):  # type: ignore[arg-type]
            with pytest.raises(RequestError):
                await anext(stream)
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
        closed = llm.generate([1], GREEDY)
        await closed.aclose()
        with pytest.raises(AbortedError, match="closed before it was started"):
            await closed.start()
        # A prompt that is long is looked at in a thread; what it raises comes back.
        for long in ("a" * (LONG_PROMPT + 1), [1] * (LONG_PROMPT + 1)):
            with pytest.raises(RequestError, match=f"got {LONG_PROMPT + 1} tokens, expected at most 255"):
                await llm.generate(long, GREEDY).start()
        with pytest.raises(RequestError, match="expected at most 255"):
            await llm.chat([{"role": "user", "content": "a" * LONG_PROMPT}], GREEDY).start()

    asyncio.run(main())
    assert llm._requests == {}


def test_a_full_queue_refuses_and_loses_nothing(bundle: TinyBundle) -> None:
    async def main() -> None:
        async with AsyncLLM(
            bundle.directory, max_num_seqs=1, threads=1, max_num_queued_reqs=2, max_num_queued_tokens=9
        ) as llm:
            with held(llm, after=4):
                running = llm.generate([1], GREEDY)
                await anext(running)
                first = llm.generate([2, 3, 4], GREEDY)
                await first.start()
                with pytest.raises(QueueFullError, match="got 3 waiting sequences with 5 prompt tokens"):
                    await llm.generate([5], SamplingParams(n=2)).start()
                with pytest.raises(
                    QueueFullError, match=r"got 2 waiting sequences with 10 prompt tokens, .* 9 \(max_num"
                ):
                    await llm.generate([5] * 7, GREEDY).start()
                second = llm.generate([5] * 6, GREEDY)
                await second.start()
                counts = llm.snapshot()
                assert (counts.running, counts.waiting, counts.waiting_prompt_tokens) == (1, 2, 9)
            assert await tokens_of(first) == bundle.greedy_tokens([2, 3, 4], 12)
            assert await tokens_of(second) == bundle.greedy_tokens([5] * 6, 12)
            await until(lambda: llm.snapshot().running == 0)
            counts = llm.snapshot()
            assert (counts.waiting, counts.prompt_tokens, counts.generation_tokens) == (0, 10, 36)

    asyncio.run(main())


def test_priority_and_salt_reach_the_sequences(bundle: TinyBundle) -> None:
    async def main() -> None:
        async with AsyncLLM(bundle.directory, max_num_seqs=1, threads=1) as llm:
            with held(llm, after=4):
                running = llm.generate([1], GREEDY)
                await anext(running)
                late = llm.generate([2], GREEDY, priority=1, cache_salt="mine")
                soon = llm.generate([3], GREEDY, priority=-1)
                names = [(await stream.start()).request_id for stream in (late, soon)]
                [one], [other] = (llm._requests[name].sequences for name in names)
            await asyncio.gather(late.result(), soon.result())
            assert (one.priority, one.cache_salt, other.priority, other.cache_salt) == (1, "mine", -1, None)
            assert other.started < one.started, "lower goes first"

    asyncio.run(main())


def test_cached_tokens_are_told(bundle: TinyBundle) -> None:
    prompt = random_prompt(1, 50)
    with LLM(bundle.directory, threads=1) as llm:
        [first], [again] = llm.generate(prompt, GREEDY), llm.generate(prompt, GREEDY)
        [salted] = llm.generate(prompt, GREEDY, cache_salt="mine")
        [two] = llm.generate(prompt, SamplingParams(seed=1, n=2, max_tokens=2, ignore_eos=True))
    assert first.metrics.cached_tokens == salted.metrics.cached_tokens == 0
    assert again.metrics.cached_tokens == two.metrics.cached_tokens == 48, "three blocks of 16"
    assert again.outputs == first.outputs
    with LLM(bundle.directory, threads=1, prefix_cache_bytes=0) as llm:
        assert [llm.generate(prompt, GREEDY)[0].metrics.cached_tokens for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("is_told", [False, True])
def test_an_event_loop_that_is_closed_hurts_nobody(
    bundle: TinyBundle, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither one that was about to ring, nor one that was not."""
    llm = AsyncLLM(bundle.directory, max_num_seqs=2, threads=1)
    with held(llm, after=4) as hold:
        loop, kept = asyncio.new_event_loop(), llm.generate([1, 2], ENDLESS)
        loop.run_until_complete(kept.start())
        request = llm._requests[kept.request_id]
        hold.wait()
        if not is_told:
            loop.run_until_complete(anext(kept))
        loop.close()
        with caplog.at_level(logging.WARNING):
            hold.release()
            wait_until(lambda: request.finished)
    assert "an event loop was closed in the middle of 1 streams" in caplog.text
    assert len(request.result().outputs[0].token_ids) < 20
    assert llm._requests == {}
    assert asyncio.run(tokens_of(llm.generate([3], GREEDY))) == bundle.greedy_tokens([3], 12)
    asyncio.run(llm.close())


def test_who_waits_for_a_first_token_is_woken_first() -> None:
    woken, readers = list[int](), [_Reader(), _Reader(), _Reader()]

    async def main() -> None:
        told = _EventLoop(asyncio.get_running_loop())

        async def read(number: int) -> None:
            while True:
                await readers[number].bell.wait()
                readers[number].bell.clear()
                woken.append(number)

        tasks = [asyncio.ensure_future(read(number)) for number in range(3)]
        for once in ([0, 1], [0, 1, 2], [0, 2, 1]):
            for number in once:
                told.tell(readers[number])
            wanted = len(woken) + len(once)
            told.flush()
            while len(woken) < wanted:
                await asyncio.sleep(0)
        for task in tasks:
            task.cancel()

    asyncio.run(main())
    assert woken == [1, 0, 2, 0, 1, 0, 2, 1]


def test_event_loops_of_several_threads_share_batches(llm: AsyncLLM, bundle: TinyBundle) -> None:
    def one(number: int) -> list[int]:
        return asyncio.run(tokens_of(llm.generate([number], GREEDY)))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(1, 9))) == [bundle.greedy_tokens([n], 12) for n in range(1, 9)]
    wait_until(lambda: llm.snapshot().running == 0)
    asyncio.run(tokens_of(llm.generate([1], GREEDY)))
    wait_until(lambda: len(llm._loops._loops) <= 1)


def test_a_reader_that_cannot_be_told_ends_alone(llm: AsyncLLM, bundle: TinyBundle) -> None:
    async def main() -> None:
        deaf = llm._request([1, 2], ENDLESS)

        def fail() -> None:
            raise OSError("gone")

        deaf.notify = fail
        llm._start([deaf])
        assert await tokens_of(llm.generate([3], GREEDY)) == bundle.greedy_tokens([3], 12)
        await until(lambda: deaf.finished)
        assert deaf.result().outputs[0].finish_reason == "abort"
        llm._forget([deaf])

    asyncio.run(main())


def test_close_ends_streams_and_a_failure_reaches_all(bundle: TinyBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with AsyncLLM(bundle.directory, max_num_seqs=1, threads=1) as llm:
            with held(llm, after=4):
                streams = [llm.generate([number], ENDLESS) for number in (1, 2)]
                for stream in streams:
                    await stream.start()
                await llm.close()
            assert [(await stream.result()).outputs[0].finish_reason for stream in streams] == ["abort", "abort"]
            with pytest.raises(AbortedError, match="closed; open the bundle again"):
                await llm.generate([1], GREEDY).start()
            await llm.close()
            assert (llm.snapshot().running, llm.snapshot().waiting) == (0, 0)
        async with AsyncLLM(bundle.directory, max_num_seqs=1, threads=1) as llm:
            monkeypatch.setattr(llm._worker._backend, "run", broken)
            monkeypatch.setattr(llm._worker._backend, "start_cycle", broken)
            for result in await asyncio.gather(
                *(llm.generate([number], GREEDY).result() for number in (1, 2)), return_exceptions=True
            ):
                assert isinstance(result, BackendError)
                assert "out of memory" in str(result)
            with pytest.raises(BackendError, match="stopped earlier"):
                await llm.generate([1], GREEDY).start()

    def broken(*_: Any, **__: Any) -> Any:
        raise BackendError("out of memory")

    asyncio.run(main())


def test_an_async_llm_that_is_dropped_ends_its_thread(bundle: TinyBundle) -> None:
    llm = AsyncLLM(bundle.directory, max_num_seqs=1, threads=1)
    asyncio.run(tokens_of(llm.generate([1, 2], GREEDY)))
    thread = llm._worker._thread
    del llm
    gc.collect()
    thread.join(120)
    assert not thread.is_alive()
