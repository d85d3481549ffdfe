"""The search of training text for evaluation items: what is found, what is not, and how much it takes."""

import random
import time
import tracemalloc
from dataclasses import replace

import datasets
import pytest

from dmtd_models.data.errors import DataError
from dmtd_models.data.items import GenerationItem, MultipleChoiceItem, TextItem
from dmtd_models.data.overlap import (
    OverlapIndex,
    Probe,
    TrainingText,
    drop_leaks,
    probes_of,
    training_text,
    words_of,
)

FOX = "the quick brown fox jumps over the lazy dog and runs far away from here today"  # 16 words


def index(*texts, questions=(), **options):
    return OverlapIndex(
        [Probe(item=str(n), texts=(text,), questions=questions) for n, text in enumerate(texts)], **options
    )


def prompt_probes(task, prompts):
    return [Probe(item=f"{task}/{n}", texts=(text,), questions=(text,)) for n, text in enumerate(prompts)]


def prose(text, text_id="t"):
    return TrainingText(text_id=text_id, text=text)


def leaks_of(made, text):
    return list(made.scan([text]).leaks)


def leaked_items(report):
    return tuple(dict.fromkeys(leak.item for leak in report.leaks))


def test_words():
    assert words_of("Don't  STOP—it's café_9!") == ["don", "t", "stop", "it", "s", "café", "9"]
    assert words_of("cafe\u0301 Straße ﬁn") == ["café", "strasse", "fin"]


def test_a_run_of_thirteen_words_is_a_leak_and_of_twelve_is_none():
    words = FOX.split()
    found = leaks_of(index(FOX), prose("Once: " + ", ".join(words[2:15]).upper() + " -- and then."))
    [leak] = found
    assert (leak.item, leak.text_id, leak.rule) == ("0", "t", "n-gram")
    assert leak.excerpt == " ".join(words[2:15])
    assert leaks_of(index(FOX), prose("Once " + " ".join(words[2:14]) + " and")) == []
    assert leaks_of(index(FOX), prose(" ".join([*words[2:9], "more", *words[9:16]]))) == []
    assert leaks_of(index(FOX, ngram_words=3), prose("a lazy dog and"))[0].excerpt == "lazy dog and"


def test_a_shared_run_names_those_items_that_have_it():
    tail = "one two three four five six seven eight nine ten eleven twelve thirteen"
    made = index(FOX + " " + tail, "zero " + tail, FOX)
    assert [leak.item for leak in leaks_of(made, prose(tail))] == ["0", "1"]
    assert [leak.item for leak in leaks_of(made, prose(FOX))] == ["0", "2"]


def test_short_questions_match_whole_turns_only():
    made = OverlapIndex(prompt_probes("facts", ["What is the capital of France?", "Why?"]))
    report = made.scan(
        [
            TrainingText(text_id="a", text="x", questions=("What is the capital of France, and of Spain?",)),
            TrainingText(text_id="b", text="what is the capital of france", questions=()),
            TrainingText(text_id="c", text="x", questions=("what is the CAPITAL of France",)),
            TrainingText(text_id="d", text="x", questions=("what is the capital of France?", "...")),
        ]
    )
    [leak] = report.leaks
    assert (leak.item, leak.text_id, leak.rule) == ("facts/0", "c", "question")
    assert (report.num_items, report.num_texts, report.ngram_words) == (2, 4, 13)
    assert leaked_items(report) == ("facts/0",)
    assert report.leaking_texts == ("c", "d")


def test_a_report_keeps_the_first_leak():
    long = " ".join(f"w{number}" for number in range(112))  # 100 n-grams
    made = index(long, FOX, "never seen at all")
    report = made.scan(
        [prose("x y"), prose(" ".join(long.split()[:37])), prose(long.upper().partition(" W30 ")[0]), prose(FOX)]
    )
    assert [(leak.item, leak.text_id) for leak in report.leaks] == [("0", "t"), ("1", "t")]
    assert leaked_items(report) == ("0", "1")
    assert report.num_words == 2 + 37 + 30 + 16


def test_what_is_looked_for_of_items():
    choice = MultipleChoiceItem(task="h", item_id="1", prompt="A man", choices=(" runs.", " sits."), answer=0)
    framed = MultipleChoiceItem(
        task="h", item_id="6", prompt="Q: Why?\nA:", choices=(" So.",), answer=0, question="Why?"
    )
    asked = ({"role": "system", "content": "s"}, {"role": "user", "content": "Q?"})
    made = GenerationItem(task="g", item_id="2", messages=asked, max_new_tokens=1, score=len, chance=0)
    again = replace(made, item_id="5", rewordings=(({"role": "user", "content": "Please: Q?"},),))
    text = TextItem(source="s", text_id="4", text="words")
    assert list(probes_of([choice, framed, made, again, text])) == [
        Probe(item="h/1", texts=("A man runs.", "A man sits."), questions=("A man",)),
        Probe(item="h/6", texts=("Q: Why?\nA: So.",), questions=("Why?",)),
        Probe(item="g/2", texts=("Q?",), questions=("Q?",)),
        Probe(item="g/5", texts=("Q?", "Please: Q?"), questions=("Q?", "Please: Q?")),
        Probe(item="s/4", texts=("words",)),
    ]


def test_turns_of_a_tokenised_chat(tokenizer):
    chat = [{"role": "user", "content": "What is ice?"}, {"role": "assistant", "content": "Frozen\nwater."}]
    ids = tokenizer.encode_rendered(tokenizer.render(chat, add_generation_prompt=False))
    text = training_text("t", ids, tokenizer)
    assert "What is ice?" in text.questions
    assert "<|im" not in text.text
    made = OverlapIndex(prompt_probes("p", ["what is ice", "Frozen"]))
    assert [(leak.item, leak.rule) for leak in leaks_of(made, text)] == [("p/0", "question")]


def test_leaking_examples_are_dropped(tokenizer):
    def chat(question):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "Yes."}]
        return tokenizer.encode_rendered(tokenizer.render(messages, add_generation_prompt=False))

    texts = [
        *tokenizer.encode_texts(["some prose"]),
        chat("What is ice?"),
        chat("What is ice cream?"),
        chat("what is ICE"),
    ]
    data = datasets.Dataset.from_dict({"input_ids": texts, "prompt_len": [0, 5, 6, 7]})
    rest, report = drop_leaks(data, OverlapIndex(prompt_probes("p", ["What is ice?"])), tokenizer)
    assert rest["prompt_len"][:] == [0, 6]
    assert report.leaking_texts == ("1", "3")
    assert report.num_texts == 4


def test_nothing_to_look_for():
    assert leaks_of(OverlapIndex([]), prose(FOX)) == []
    assert index("short").scan([prose(FOX)]).leaks == ()
    assert leaks_of(index("?!", questions=("?!",)), TrainingText(text_id="t", text="", questions=("!",))) == []
    with pytest.raises(DataError, match="n-gram: got 0 words"):
        index(FOX, ngram_words=0)


def test_random_texts_against_plain_search():
    """Few different words, so that runs meet often: every run of 4 words, by comparing lists."""
    rng = random.Random(5)
    for _ in range(200):
        items = [[rng.choice("abc") for _ in range(rng.randrange(9))] for _ in range(4)]
        text = [rng.choice("abcd") for _ in range(30)]
        runs = [text[at : at + 4] for at in range(27)]
        expected = {
            str(n) for n, words in enumerate(items) if any(words[i : i + 4] in runs for i in range(len(words) - 3))
        }
        made = index(*(" ".join(words) for words in items), ngram_words=4)
        assert {leak.item for leak in leaks_of(made, prose(" ".join(text)))} == expected


def test_speed_and_memory():
    rng = random.Random(1)
    words = [f"{a}{b}" for a in "bcdfglmnprst" for b in ("a", "en", "ing", "or", "um", "est")]
    items = [" ".join(rng.choices(words, k=200)) for _ in range(200)]
    document = " ".join(rng.choices(words, k=20_000))
    made = index(*items)
    tracemalloc.start()
    made.scan(prose(document, str(number)) for number in range(2))
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    started = time.process_time()
    report = made.scan(prose(document, str(number)) for number in range(20))
    seconds = time.process_time() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert report.num_words == 400_000
    assert peak - before < 20 << 20  # of one document, not of twenty
    assert 20 * len(document) / seconds > 0.2e6  # bytes a second, traced; untraced some 10 MB
