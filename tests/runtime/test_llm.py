"""LLM as its users see it: generate, stream, chat, limits, threads."""

from __future__ import annotations

import gc
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from bundles import with_files
from runtime_support import END_OF_TURN, ENDLESS, GREEDY, TinyBundle, held, random_prompt, tokenizer_of

from dmtd_models.reference import oracle
from dmtd_runtime import LLM, Delta, DmtdError, RequestError, SamplingParams
from dmtd_runtime.text.tokenizer import TextStream

pytestmark = pytest.mark.timeout(300)


# Prompts and answers


def test_a_list_of_prompts_is_answered_in_order(llm: LLM, bundle: TinyBundle) -> None:
    prompts = [random_prompt(i, 1 + 3 * i) for i in range(7)]  # more than fit into a batch
    outputs = llm.generate(prompts, GREEDY)
    assert [output.prompt_token_ids for output in outputs] == prompts
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.prompt is None
        [one] = output.outputs
        assert one.token_ids == bundle.greedy_tokens(prompt, 12)
        assert (one.index, one.finish_reason, one.stop_reason, one.logprobs) == (0, "length", None, None)
        assert one.text == tokenizer_of(bundle.directory).decode(one.token_ids)


def test_one_prompt_as_text_or_as_ids(llm: LLM) -> None:
    [as_text] = llm.generate("Hello, world", GREEDY)
    assert as_text.prompt == "Hello, world"
    [as_ids] = llm.generate(as_text.prompt_token_ids, GREEDY)
    assert as_ids.prompt is None
    assert as_ids.outputs[0].token_ids == as_text.outputs[0].token_ids
    mixed = llm.generate(["Hello, world", as_text.prompt_token_ids], GREEDY)
    assert [output.outputs[0].text for output in mixed] == [as_text.outputs[0].text] * 2


def test_plain_mode_is_the_plain_model(bundle: TinyBundle) -> None:
    prompt = random_prompt(5, 9)
    with LLM(bundle.directory, plain=True, threads=1) as llm:
        assert llm.generate(prompt, GREEDY)[0].outputs[0].token_ids == bundle.greedy_tokens(prompt, 12, plain=True)
    assert bundle.greedy_tokens(prompt, 12, plain=True) != bundle.greedy_tokens(prompt, 12)


def test_one_set_of_options_a_prompt(llm: LLM, bundle: TinyBundle) -> None:
    prompts = [random_prompt(i, 4) for i in range(3)]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 5, 3)]
    outputs = llm.generate(prompts, params)
    assert [output.outputs[0].token_ids for output in outputs] == [
        bundle.greedy_tokens(prompt, n) for prompt, n in zip(prompts, (1, 5, 3), strict=True)
    ]
    with pytest.raises(RequestError, match="got 2 for 3 prompts"):
        llm.generate(prompts, params[:2])


def test_chat_renders_the_bundles_template(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "Hi"}]
    assert llm.has_chat_template
    rendered = llm.render_chat(conversation)
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    [answer] = llm.chat(conversation, GREEDY)
    assert answer.prompt == rendered
    # The markers became single special tokens.
    assert answer.prompt_token_ids.count(257) == 2
    assert answer.prompt_token_ids.count(END_OF_TURN) == 1
    two = llm.chat([conversation, [{"role": "user", "content": "Bye"}]], GREEDY)
    assert two[0].outputs == [answer.outputs[0]]
    streamed = "".join(delta.text for delta in llm.stream_chat(conversation, GREEDY))
    assert streamed == answer.outputs[0].text


def test_defaults_come_from_the_bundles_generation_config(bundle: TinyBundle, tmp_path: Path) -> None:
    content = b'{"do_sample": false, "temperature": 0.3, "max_new_tokens": 3}'
    copy = with_files(bundle.directory, tmp_path / "bundle", {"generation_config.json": content})
    with LLM(copy, threads=1) as llm:
        assert llm.default_params.greedy
        tokens = llm.generate([1, 2, 3])[0].outputs[0].token_ids
    assert tokens == bundle.greedy_tokens([1, 2, 3], len(tokens))


# What a tokenizer and the files beside it say


@pytest.fixture(scope="module")
def with_pad(bundle: TinyBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose tokenizer has a token more than the model has rows: "[PAD]", id 259."""
    core = tokenizers.Tokenizer.from_file(str(bundle.directory / "tokenizer.json"))
    assert (core.add_tokens(["[PAD]"]), core.token_to_id("[PAD]")) == (1, bundle.manifest.model.vocab_size)
    files = {"tokenizer.json": core.to_str().encode()}
    return with_files(bundle.directory, tmp_path_factory.mktemp("pad") / "bundle", files)


def test_a_token_that_the_model_has_no_row_for_is_refused_before_anything_starts(
    with_pad: Path, bundle: TinyBundle
) -> None:
    messages = [{"role": "user", "content": "hi [PAD]"}]
    with LLM(with_pad, max_num_seqs=2, threads=1) as llm:
        neighbour = llm.stream([1, 2, 3], GREEDY)
        for ask in (
            lambda: llm.generate(["hi", "hi [PAD]"], GREEDY),
            lambda: llm.stream("hi [PAD]", GREEDY),
            lambda: llm.chat(messages, GREEDY),
            lambda: llm.stream_chat(messages, GREEDY),
        ):
            with pytest.raises(RequestError, match=r"prompt: got '\[PAD\]', token id 259 .* from 0 to 258"):
                ask()
        assert [i for piece in neighbour for i in piece.token_ids] == bundle.greedy_tokens([1, 2, 3], 12)
        assert len(llm.generate("hi", GREEDY)[0].outputs[0].token_ids) == 12


def test_the_end_ids_of_generation_config_count_without_a_tokenizer(bundle: TinyBundle, tmp_path: Path) -> None:
    tokens = bundle.greedy_tokens([1, 2, 3], 12)
    end = next(token for token in tokens[1:] if token != END_OF_TURN)
    content = json.dumps({"eos_token_id": [END_OF_TURN, end]}).encode()
    files = {"generation_config.json": content, "tokenizer.json": None}
    copy = with_files(bundle.directory, tmp_path / "bundle", files)
    with LLM(copy, threads=1) as llm:
        assert llm.tokenizer is None
        [output] = llm.generate([1, 2, 3], SamplingParams(temperature=0, max_tokens=12))
    assert output.outputs[0].token_ids == tokens[: tokens.index(end) + 1]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", end)


def test_what_fails_in_one_request_ends_that_one_alone(
    llm: LLM, bundle: TinyBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text that cannot be made is a bug; it takes neither the neighbours nor the worker along."""
    push = TextStream.push
    failing = llm._request([9, 8, 7], GREEDY)
    stream = failing.sequences[0].stops._text

    def broken(self: TextStream, token_id: int) -> str:
        if self is stream:
            raise OverflowError("no such character")
        return push(self, token_id)

    monkeypatch.setattr(TextStream, "push", broken)
    neighbour = llm.stream([1, 2, 3], GREEDY)
    with pytest.raises(DmtdError, match="the sequence failed at token 4: OverflowError: no such character"):
        llm._finish([failing])
    assert [i for piece in neighbour for i in piece.token_ids] == bundle.greedy_tokens([1, 2, 3], 12)


# Options


def test_n_sequences_with_a_seed_are_reproducible(llm: LLM, bundle: TinyBundle) -> None:
    params = SamplingParams(temperature=1, n=3, seed=7, max_tokens=10, ignore_eos=True)
    [first] = llm.generate([5, 6], params)
    assert [one.index for one in first.outputs] == [0, 1, 2]
    tokens = [one.token_ids for one in first.outputs]
    assert len({tuple(ids) for ids in tokens}) == 3
    [again] = llm.generate([5, 6], params)
    assert [one.token_ids for one in again.outputs] == tokens
    [other] = llm.generate([5, 6], SamplingParams(temperature=1, n=3, seed=8, max_tokens=10, ignore_eos=True))
    assert [one.token_ids for one in other.outputs] != tokens
    # Neighbours, and the place in the batch, change nothing.
    *_, crowded = llm.generate([[9], [8, 8], [5, 6]], params)
    assert [one.token_ids for one in crowded.outputs] == tokens
    with LLM(bundle.directory, threads=1) as alone:
        [single] = alone.generate([5, 6], params)
    assert [one.token_ids for one in single.outputs] == tokens


def test_without_a_seed_each_call_draws_its_own(llm: LLM) -> None:
    params = SamplingParams(temperature=1, max_tokens=12, ignore_eos=True)
    drawn = {tuple(llm.generate([5, 6], params)[0].outputs[0].token_ids) for _ in range(4)}
    assert len(drawn) == 4


def test_logprobs_are_the_references(llm: LLM, bundle: TinyBundle) -> None:
    prompt = random_prompt(1, 5)
    [output] = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=6, logprobs=3, ignore_eos=True))
    want = bundle.greedy(prompt, 6).logits.log_softmax(-1)
    [one] = output.outputs
    assert len(one.logprobs) == 6
    for row, entry, token_id in zip(want, one.logprobs, one.token_ids, strict=True):
        assert entry.token_id == token_id
        assert entry.logprob == pytest.approx(float(row.max()), abs=1e-4)
        assert [top for top, _ in entry.top] == row.topk(3).indices.tolist()
    assert one.cumulative_logprob == pytest.approx(float(want.max(-1).values.sum()), abs=1e-3)


def test_ends(llm: LLM, bundle: TinyBundle) -> None:
    prompt = random_prompt(2, 6)
    tokens = bundle.greedy_tokens(prompt, 12)
    at = next(i for i in range(4, 12) if tokens[i] not in tokens[:i])

    def run(**options: object):
        return llm.generate(prompt, SamplingParams(temperature=0, **options))[0].outputs[0]

    stopped = run(stop_token_ids=[tokens[at]], ignore_eos=True, max_tokens=12)
    assert (stopped.token_ids, stopped.finish_reason, stopped.stop_reason) == (tokens[: at + 1], "stop", tokens[at])
    assert stopped.text == tokenizer_of(bundle.directory).decode(tokens[:at])
    later = run(stop_token_ids=[tokens[at]], ignore_eos=True, max_tokens=12, min_tokens=at + 1)
    assert later.token_ids[:at] == tokens[:at]
    assert later.token_ids[at] != tokens[at], "a stop id is masked for min_tokens"
    # The model's own end of sequence, made likely at the third token by a bias.
    bias = {END_OF_TURN: 100.0}
    assert run(max_tokens=9, min_tokens=2, logit_bias=bias).token_ids == [*tokens[:2], END_OF_TURN]
    assert run(max_tokens=9, min_tokens=2, logit_bias=bias).finish_reason == "stop"
    assert run(max_tokens=9, logit_bias=bias, ignore_eos=True).token_ids == [END_OF_TURN] * 9


def test_the_room_of_the_model_length(bundle: TinyBundle) -> None:
    with LLM(bundle.directory, max_model_len=20, threads=1) as llm:
        [last] = llm.generate([7] * 19, ENDLESS)
        assert (len(last.outputs[0].token_ids), last.outputs[0].finish_reason) == (1, "length")
        [more] = llm.generate([7] * 15, ENDLESS)
        assert more.outputs[0].token_ids == bundle.greedy_tokens([7] * 15, 5)
        with pytest.raises(RequestError, match="got 20 tokens, expected at most 19"):
            llm.generate([7] * 20, ENDLESS)


# Streams


def joined(deltas: list[Delta], index: int = 0) -> tuple[str, list[int]]:
    mine = [delta for delta in deltas if delta.index == index]
    return "".join(delta.text for delta in mine), [i for delta in mine for i in delta.token_ids]


def test_a_stream_adds_up_to_what_generate_gives(llm: LLM) -> None:
    params = SamplingParams(temperature=1, seed=3, n=2, max_tokens=20, ignore_eos=True, logprobs=1)
    [whole] = llm.generate("Once upon", params)
    stream = llm.stream("Once upon", params, request_id="mine")
    assert stream.request_id == "mine"
    deltas = list(stream)
    assert {delta.request_id for delta in deltas} == {"mine"}
    assert stream.result().outputs == whole.outputs
    for index, one in enumerate(whole.outputs):
        assert joined(deltas, index) == (one.text, one.token_ids)
        mine = [delta for delta in deltas if delta.index == index]
        assert [entry for delta in mine for entry in delta.logprobs] == one.logprobs
        assert {delta.finish_reason for delta in mine[:-1]} <= {None}
        assert mine[-1].finish_reason == "length"


def test_a_stream_never_shows_a_part_of_its_stop_string(llm: LLM, bundle: TinyBundle) -> None:
    # The model speaks in two letters only, so that stop strings nearly match often.
    a, b = tokenizer_of(bundle.directory).encode("ab", add_special_tokens=False)
    found = 0
    for seed in range(12):
        free = SamplingParams(temperature=2, seed=seed, max_tokens=40, logit_bias={a: 100, b: 100}, ignore_eos=True)
        text = llm.generate([1], free)[0].outputs[0].text
        assert set(text) <= {"a", "b"}
        for stop in ("abab", "bbb", "aabb"):
            params = SamplingParams(
                temperature=2, seed=seed, max_tokens=40, logit_bias={a: 100, b: 100}, ignore_eos=True, stop=stop
            )
            deltas = list(llm.stream([1], params))
            shown = "".join(delta.text for delta in deltas)
            assert shown == text.partition(stop)[0]
            assert shown == llm.generate([1], params)[0].outputs[0].text
            # What was handed out at any time was a beginning of the final text: nothing had to be taken back.
            found += stop in text
            assert deltas[-1].finish_reason == ("stop" if stop in text else "length")
            assert deltas[-1].stop_reason == (stop if stop in text else None)
    assert found >= 10, "the stop strings were hardly ever met"


def test_a_stream_comes_piece_by_piece(llm: LLM) -> None:
    """The first piece is there long before the last one is made."""
    with held(llm, after=8), llm.stream([1, 2], ENDLESS) as stream:
        next(stream)
        assert len(llm._requests) == 1
        assert not llm._requests[stream.request_id].finished


@pytest.mark.parametrize("way", ["close", "with", "drop", "break"])
def test_leaving_a_stream_early_frees_its_slot(bundle: TinyBundle, way: str) -> None:
    with LLM(bundle.directory, threads=1) as llm:
        with held(llm, after=8) as hold:
            # One piece: the first may hold all that was made before the worker was held, and then no second one comes.
            stream = llm.stream([1, 2], ENDLESS)
            if way == "with":
                with stream:
                    next(stream)
            elif way == "break":
                for _ in stream:
                    break
            else:
                next(stream)
            if way == "close":
                stream.close()
                hold.release()
                assert [delta.finish_reason for delta in stream][-1] == "abort"
            del stream
            gc.collect()
            assert llm._requests == {}
        # The only slot is free again long before the first request's 250 tokens would have been made.
        steps = llm.stats.full_passes + llm.stats.late_steps
        llm.generate([3], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
        assert llm.stats.full_passes + llm.stats.late_steps - steps < 100


# Threads


def test_eight_threads_get_what_one_thread_gets(bundle: TinyBundle) -> None:
    jobs = [
        (random_prompt(i, 1 + i % 17), SamplingParams(temperature=i % 2, seed=i, max_tokens=3 + i % 9, ignore_eos=True))
        for i in range(48)
    ]
    with LLM(bundle.directory, threads=1) as alone:
        want = [alone.generate(prompt, params)[0].outputs[0] for prompt, params in jobs]
    with LLM(bundle.directory, max_num_seqs=8, threads=1) as llm, ThreadPoolExecutor(8) as pool:

        def one(job):
            prompt, params = job
            if params.seed % 3:
                return llm.generate(prompt, params)[0].outputs[0].token_ids
            return joined(list(llm.stream(prompt, params)))[1]

        got = list(pool.map(one, jobs))
    assert got == [output.token_ids for output in want]


def test_metrics(llm: LLM) -> None:
    [output] = llm.generate([1, 2, 3], GREEDY)
    metrics = output.metrics
    assert 0 <= metrics.queued_s <= metrics.first_token_s <= metrics.finished_s


@pytest.mark.parametrize("prompt", [[np.int64(3), np.int64(4)], np.array([3, 4])])
def test_numpy_integers_are_token_ids(llm: LLM, prompt: Any) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    [output], [plain] = llm.generate(prompt, params), llm.generate([3, 4], params)
    assert output.outputs[0].token_ids == plain.outputs[0].token_ids
    assert output.prompt_token_ids == [3, 4]


def test_a_name_given_by_the_user_does_not_collide_with_the_engines_own(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    taken = [llm.stream([1, 2], params, request_id=f"request-{number}") for number in range(40)]
    assert llm.generate([1, 2], params)[0].outputs[0].finish_reason == "length"
    for stream in taken:
        stream.close()


@pytest.mark.parametrize("score_from", [None, 4])
def test_log_probabilities_of_the_prompts_own_tokens(bundle: TinyBundle, score_from: int | None) -> None:
    ids = random_prompt(3, 11)
    with LLM(bundle.directory) as llm:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
        [output] = llm.generate([ids], params, score_from=score_from)
        [again] = llm.generate([ids], SamplingParams(temperature=0, max_tokens=1))
        with pytest.raises(RequestError, match=r"^score_from: got 11, expected 1 to 10"):
            llm.generate([ids], params, score_from=11)
    assert again.prompt_logprobs is None
    reference = bundle.reference(4, ("prompt", "thinking"))
    want = oracle.teacher_forced(reference, ids, score_from or len(ids)).log_softmax(-1)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    for row, token_id, entry in zip(want[:-1], ids[1:], output.prompt_logprobs[1:], strict=True):
        assert entry is not None
        assert (entry.token_id, entry.logprob) == (token_id, pytest.approx(float(row[token_id]), abs=1e-4))
        assert entry.top[0] == (int(row.argmax()), pytest.approx(float(row.max()), abs=1e-4))
