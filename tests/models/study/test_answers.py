"""The base model writing training text: cached decoding, drawing, documents, resumption. Tiny random models."""

import json
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer

from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.config.model import Rope, SplitOptions, resolve_dmtd
from dmtd_models.data.repetition import distinct_share
from dmtd_models.finetune.largest import largest
from dmtd_models.finetune.self_written import chat_frame
from dmtd_models.finetune.shards import AnswersError, ShardStore
from dmtd_models.reference.dmtd import DmtdModel
from dmtd_models.reference.oracle import greedy, teacher_forced
from dmtd_models.reference.testing import write_tiny_checkpoint
from study import answers
from study.answers import (
    AnswerOptions,
    Prompt,
    Style,
    choose,
    write_answers,
)
from study.decode import SlotDecoder

END, START = 258, 257  # of the tiny tokenizer
GREEDY = (Style(temperature=0.0),)


def load(path):
    with open_checkpoint(path) as checkpoint:
        spec = resolve_dmtd(checkpoint.config, checkpoint.dmtd, SplitOptions(decoding_layers=2, cycle_length=4))
        model = DmtdModel.from_reader(checkpoint.config, spec, checkpoint.read, torch.float32)
        return model, checkpoint.assets()


def encode_with(tokenizer):
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def render(question):
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed=5, tokenizer=True, max_positions=2048)
    model, assets = load(path)
    return model, Tokenizer.from_str(assets["tokenizer.json"].decode())


def options(**changes):
    given = {
        "answer_tokens": 200, "seed": 3, "slots": 3, "shard_documents": 4, "max_answer_len": 12,
        "min_distinct_4grams": 0.0, "min_distinct_tail": 0.0,
    }  # fmt: skip
    return AnswerOptions(**(given | changes))


def question_of(index):
    return Prompt(kind="template", question=f"What is {index}?")


def documents(directory):
    lines = [line for file in sorted(directory.glob("*.jsonl")) for line in file.read_text().splitlines()]
    return [json.loads(line) for line in lines]


# decode


@pytest.mark.parametrize(
    "form",
    [
        {"family": "qwen3"},
        {"family": "qwen2", "tie": True},
        {"family": "llama", "mlp_bias": True, "qkv_bias": True},
        {"family": "llama", "rope": Rope(kind="linear", theta=10000.0, factor=2.0), "kv_heads": 1},
    ],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_slots_of_any_length_get_the_logits_of_a_full_pass(tmp_path, form, groups):
    model, _ = load(write_tiny_checkpoint(tmp_path, layers=4, **form))
    vocab = model.config.vocab_size
    generator = torch.Generator().manual_seed(1)
    prefix = torch.randint(vocab, (5,), generator=generator).tolist()
    # Three documents in two slots; the second slot is emptied and used again. Windows grow past 64 and 128 and shrink.
    texts = [prefix + torch.randint(vocab, (n,), generator=generator).tolist() for n in (140, 20, 30)]
    expected = [teacher_forced(model, text, len(text), plain=True) for text in texts]
    decoder = SlotDecoder(model, slots=2, capacity=200, groups=groups)
    decoder.set_prefix(prefix)
    holds, places = [0, 1], [decoder.restart(0), decoder.restart(1)]
    assert places == [5, 5]
    compared = 0
    while holds[0] is not None or holds[1] is not None:
        if compared % 16 < 2:
            order = decoder.arrange(places)
            assert order == ([1, 0] if groups == 2 and places[0] > places[1] else [0, 1])
            holds, places = [holds[slot] for slot in order], [places[slot] for slot in order]
        fed = [0 if text is None else texts[text][place] for text, place in zip(holds, places, strict=True)]
        hidden = decoder.step(fed, places)
        logits, tokens = decoder.candidates(hidden, vocab)
        assert (logits.diff(dim=-1) <= 0).all()
        for slot, text in enumerate(holds):
            if text is None:
                continue
            ours = torch.empty(vocab).scatter_(0, tokens[slot], logits[slot])
            torch.testing.assert_close(ours, expected[text][places[slot]], atol=2e-4, rtol=0)
            compared += 1
            places[slot] += 1
            if places[slot] == len(texts[text]):
                holds[slot] = {0: None, 1: 2, 2: None}[text]
                places[slot] = decoder.restart(slot)
    assert compared == 140 + 20 + 30


def test_half_precision_candidates_are_exact_products(tmp_path):
    path = write_tiny_checkpoint(tmp_path, seed=2)
    with open_checkpoint(path) as checkpoint:
        spec = resolve_dmtd(checkpoint.config, checkpoint.dmtd, SplitOptions(decoding_layers=2, cycle_length=4))
        model = DmtdModel.from_reader(checkpoint.config, spec, checkpoint.read, torch.bfloat16)
    hidden = torch.randn(3, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits, tokens = SlotDecoder(model, slots=3, capacity=64).candidates(hidden, 10)
    every = hidden.double() @ model.lm_head.weight.detach().double().T
    torch.testing.assert_close(logits.double(), every.gather(1, tokens), atol=1e-4, rtol=0)
    assert (logits.diff(dim=-1) <= 0).all()
    assert torch.equal(tokens[:, 0], every.argmax(-1))


@pytest.mark.parametrize(("vocab", "count"), [(4096, 128), (4096, 256), (4097, 7), (64, 10)])
def test_largest_is_a_sort(vocab, count):
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(vocab))
    values, tokens = largest(logits, count)
    ordered = logits.sort(dim=-1, descending=True)
    assert torch.equal(values, ordered.values[:, :count])
    assert torch.equal(tokens, ordered.indices[:, :count])


# choose


def test_drawing_follows_the_probabilities():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    grid = [(i + 0.5) / 1000 for i in range(1000)]

    def counts(style):
        return Counter(choose(logits.expand(1000, -1), [style] * 1000, grid))

    assert counts(Style(temperature=1.0, top_p=1.0)) == {0: 500, 1: 300, 2: 150, 3: 50}
    # The smallest set of at least 0.75 is the first two: 0.5 and 0.3 of 0.8.
    assert counts(Style(temperature=1.0, top_p=0.75)) == {0: 625, 1: 375}
    assert counts(Style(temperature=0.0)) == {0: 1000}
    # Temperature 1/2 squares the shares: 0.25, 0.09, 0.0225, 0.0025 of 0.365.
    assert counts(Style(temperature=0.5, top_p=1.0)) == {0: 685, 1: 247, 2: 61, 3: 7}


def test_a_row_does_not_depend_on_the_others():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(20, 30, generator=generator).sort(dim=-1, descending=True).values
    uniforms = torch.rand(20, generator=generator).tolist()
    styles = [Style(temperature=t, top_p=p) for t, p in [(0.0, 1.0), (0.7, 0.9), (1.3, 0.5), (1.0, 1.0)]] * 5
    together = choose(logits, styles, uniforms)
    alone = [choose(logits[row : row + 1], [styles[row]], [uniforms[row]])[0] for row in range(20)]
    assert together == alone
    assert choose(logits[:1], [Style(temperature=1.0, top_p=0.9)], [0.9999999]) < [30]


def test_distinct_share():
    assert distinct_share([1, 2, 3]) == 1.0
    assert distinct_share([1, 2, 3, 4, 5]) == 1.0
    assert distinct_share([7] * 13) == 0.1
    assert distinct_share([1, 2] * 6) == pytest.approx(2 / 9)


# write_answers


def test_numbered_loops_are_loops(tiny, tmp_path):
    model, tokenizer = tiny
    chosen = options(max_answer_len=400, min_distinct_4grams=0.5, min_distinct_tail=0.3)
    frame = chat_frame(encode_with(tokenizer), render)
    store = ShardStore(tmp_path, seed=3, options={})
    writer = answers._Writer(model, tokenizer, render, frame, question_of, store, chosen, None)

    def is_loop(text):
        return writer._is_loop(tokenizer.encode(text).ids)

    counting = "".join(f"{n}. A\n" for n in range(100, 116))
    assert distinct_share(tokenizer.encode(counting).ids) > 0.5
    assert is_loop(counting)
    prose = (
        "The lighthouse keeper wrote a letter to his sister, who lived in the city and had not seen the sea for years."
    )
    assert not is_loop(prose)
    assert is_loop(prose + " And so on." * 12)  # the end of a good answer
    assert not is_loop("1, 2, 3")


def test_chat_frame(tiny):
    _, tokenizer = tiny
    frame = chat_frame(encode_with(tokenizer), render)
    assert tokenizer.decode(list(frame.before), skip_special_tokens=False) == "<|im_start|>user\n"
    assert tokenizer.decode(list(frame.after), skip_special_tokens=False) == "<|im_end|>\n<|im_start|>assistant\n"
    assert frame.after[0] == END
    with pytest.raises(AnswersError, match="got the question 2 times"):
        chat_frame(encode_with(tokenizer), lambda question: question + render(question))
    with pytest.raises(AnswersError, match="nothing around"):
        chat_frame(encode_with(tokenizer), lambda question: question)


def test_greedy_answers_are_those_of_full_recomputation(tiny, tmp_path):
    model, tokenizer = tiny
    chosen = options(answer_styles=GREEDY)
    report = write_answers(model, tokenizer, render, question_of, tmp_path, chosen)
    made = documents(tmp_path)
    assert len(made) == report.documents >= 16
    assert sum(len(document["answer_ids"]) for document in made) == report.answer_tokens >= 200
    for document in made:
        assert tokenizer.decode(document["prompt_ids"], skip_special_tokens=False) == render(
            f"What is {document['index']}?"
        )
        expected = greedy(model, document["prompt_ids"], 12, plain=True, stop_ids=[END]).token_ids
        assert tuple(document["answer_ids"]) == expected
        assert document["finish"] == ("stop" if expected[-1] == END else "length")
        assert document["kind"] == "template"


def test_self_asked_documents_are_whole_chats(tiny, tmp_path):
    model, tokenizer = tiny
    frame = chat_frame(encode_with(tokenizer), render)
    # A random model hardly ends a turn: long questions are cut, so allow many and make the end likelier.
    model.lm_head.weight.data[END] *= 4
    try:
        chosen = options(answer_tokens=60, max_question_len=40, question_style=Style(temperature=1.5, top_p=1.0))
        report = write_answers(model, tokenizer, render, lambda _: Prompt(kind="self", question=None), tmp_path, chosen)
    finally:
        model.lm_head.weight.data[END] /= 4
    made = documents(tmp_path)
    assert made
    assert report.dropped.get("question", 0) > 0
    questions = set()
    for document in made:
        prompt = tuple(document["prompt_ids"])
        assert prompt[: len(frame.before)] == frame.before
        assert prompt[-len(frame.after) :] == frame.after
        question = prompt[len(frame.before) : -len(frame.after)]
        assert 4 <= len(question) <= 40
        assert START not in question and END not in question
        questions.add(question)
        answer = document["answer_ids"]
        assert START not in answer and END not in answer[:-1]
        assert (document["finish"] == "stop") == (answer[-1] == END)
        assert 2 <= len(answer) <= 12
    assert len(questions) == len(made)


def test_a_stopped_run_goes_on_to_the_same_documents(tiny, tmp_path):
    model, tokenizer = tiny
    write_answers(model, tokenizer, render, question_of, tmp_path / "whole", options(answer_tokens=130))

    calls = []

    def stop(report):
        calls.append(report)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_answers(
            model, tokenizer, render, question_of, tmp_path / "cut", options(answer_tokens=130), progress=stop
        )
    assert len(documents(tmp_path / "cut")) == calls[-1].documents >= 8
    # A kill between a shard and its entry in the state leaves a shard that must be written anew.
    (tmp_path / "cut" / "answers-3-00002.jsonl").write_text("{}\n")
    report = write_answers(model, tokenizer, render, question_of, tmp_path / "cut", options(answer_tokens=130))
    whole = {document["index"]: document for document in documents(tmp_path / "whole")}
    cut = {document["index"]: document for document in documents(tmp_path / "cut")}
    assert len(cut) == report.documents == len(documents(tmp_path / "cut"))
    shared = whole.keys() & cut.keys()
    assert len(shared) >= len(whole) - 4
    assert all(whole[index] == cut[index] for index in shared)
    again = write_answers(model, tokenizer, render, question_of, tmp_path / "cut", options(answer_tokens=130))
    assert again == report


def test_other_options_on_resuming_are_refused(tiny, tmp_path):
    model, tokenizer = tiny
    write_answers(model, tokenizer, render, question_of, tmp_path, options(answer_tokens=10))
    with pytest.raises(AnswersError, match="other options"):
        write_answers(model, tokenizer, render, question_of, tmp_path, options(answer_tokens=90, max_answer_len=13))
    # More tokens or slots are no other documents, and another seed has its own files.
    write_answers(model, tokenizer, render, question_of, tmp_path, options(answer_tokens=90, slots=2))
    write_answers(model, tokenizer, render, question_of, tmp_path, options(answer_tokens=10, seed=4))


def test_repeated_questions_and_loops_are_dropped(tiny, tmp_path):
    model, tokenizer = tiny

    def prompts(index):
        return Prompt(kind="template", question=f"What is {index // 2}?")

    report = write_answers(model, tokenizer, render, prompts, tmp_path / "a", options(answer_tokens=100))
    made = documents(tmp_path / "a")
    assert len({tuple(document["prompt_ids"]) for document in made}) == len(made)
    assert report.dropped["repeated"] >= len(made) // 2

    # A model whose stream is the embedding alone says one word for ever.
    loop, _ = load(write_tiny_checkpoint(tmp_path / "model", seed=5, tokenizer=True, tie=True, max_positions=2048))
    for layer in loop.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    chosen = options(answer_tokens=1, answer_styles=GREEDY, min_distinct_4grams=0.5, max_answer_len=20)
    seen = []

    def bounded(index):
        seen.append(index)
        if index > 20:
            raise StopIteration
        return question_of(index)

    with pytest.raises(StopIteration):
        write_answers(loop, tokenizer, render, bounded, tmp_path / "b", chosen)
    assert documents(tmp_path / "b") == []


def test_a_model_without_an_end_token_is_refused(tiny, tmp_path):
    _, tokenizer = tiny
    path = write_tiny_checkpoint(tmp_path / "model", tokenizer=True)
    config = json.loads((path / "config.json").read_text())
    del config["eos_token_id"]
    (path / "config.json").write_text(json.dumps(config))
    model, _ = load(path)
    with pytest.raises(AnswersError, match="no end-of-sequence token"):
        write_answers(model, tokenizer, render, question_of, tmp_path / "out", options())


def test_options_that_no_run_could_honour_are_refused(tiny, tmp_path):
    model, tokenizer = tiny
    wrong = [
        ({"slots": 0}, "slots: got 0"),
        ({"answer_tokens": 0}, "answer_tokens: got 0"),
        ({"seed": -1}, "seed: got -1"),
        ({"min_question_len": 300}, "at least 300 and at most 200"),
        ({"answer_styles": ()}, "answer_styles: got none"),
    ]
    for changes, message in wrong:
        with pytest.raises(AnswersError, match=message):
            options(**changes)
    with pytest.raises(AnswersError, match="expected at most the model's 2048 positions"):
        write_answers(model, tokenizer, render, question_of, tmp_path, options(max_answer_len=4000))


def test_a_directory_that_cannot_be_used_is_one_line(tiny, tmp_path, monkeypatch):
    model, tokenizer = tiny
    (tmp_path / "file").write_text("")
    with pytest.raises(AnswersError, match="expected a directory to write into"):
        write_answers(model, tokenizer, render, question_of, tmp_path / "file", options())
    (tmp_path / ".answers-3.json").write_text("{")
    with pytest.raises(AnswersError, match="expected the state of a run"):
        write_answers(model, tokenizer, render, question_of, tmp_path, options())

    def full(self, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_text", full)
    with pytest.raises(AnswersError, match=r"No space left on device.*make room and run again"):
        write_answers(model, tokenizer, render, question_of, tmp_path / "new", options())
