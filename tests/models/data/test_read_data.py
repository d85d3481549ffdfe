"""A user's data: every form it may have, what is cut, dropped and counted, and one clear line for whatever is wrong."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from dmtd_models.data import read_data
from dmtd_models.data.errors import DataError
from dmtd_models.data.read_data import ReadOptions, read_training_data
from dmtd_models.finetune.data import read_run_text

ASK = {"role": "user", "content": "Hi?"}
ANSWER = {"role": "assistant", "content": "Yes."}
CHAT = {"messages": [ASK, ANSWER]}
PROMPT_TEXT = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
# Each byte is a token and so is each mark: <|im_start|>, user, line feed, Hi?, <|im_end|>, line feed, ...
PROMPT_LEN = 1 + 4 + 1 + 3 + 1 + 1 + 1 + 9 + 1


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def read(tokenizer, tmp_path):
    def read(source, tokenizer=tokenizer, **options):
        return read_training_data(source, tokenizer, ReadOptions(**options), tmp_path / "cache")

    return read


def text_of(tokenizer, row):
    return tokenizer.tokenizer.decode(row["input_ids"], skip_special_tokens=False)


def test_a_chat(read, tokenizer, tmp_path):
    data = read(lines(tmp_path / "a.jsonl", CHAT))
    assert data.dataset.features["input_ids"].feature.dtype == "int32"
    [row] = data.dataset
    assert text_of(tokenizer, row) == PROMPT_TEXT + "Yes.<|im_end|>"
    assert row["prompt_len"] == PROMPT_LEN
    counts = data.counts
    assert (counts.form, counts.records, counts.examples, counts.tokens) == ("messages", 1, 1, PROMPT_LEN + 5)
    assert (counts.answer_tokens, counts.cut_answers, counts.dropped_prompts) == (5, 0, 0)
    assert counts.summary() == f"1 record, 1 example, {PROMPT_LEN + 5} tokens (5 answer)"


def test_several_turns(read, tokenizer, tmp_path):
    more = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    system = {"role": "system", "content": "Be kind."}
    source = lines(tmp_path / "a.jsonl", {"messages": [system, ASK, ANSWER, *more, {"role": "user", "content": "Bye"}]})
    head = "<|im_start|>system\nBe kind.<|im_end|>\n" + PROMPT_TEXT
    second = head + "Yes.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    rows = list(read(source).dataset)
    assert [text_of(tokenizer, row) for row in rows] == [head + "Yes.<|im_end|>", second + "So.<|im_end|>"]
    prompts = [
        tokenizer.tokenizer.decode(row["input_ids"][: row["prompt_len"]], skip_special_tokens=False) for row in rows
    ]
    assert prompts == [head, second]

    [whole] = read(source, cycle_origin="absolute").dataset
    assert text_of(tokenizer, whole) == second + "So.<|im_end|>"
    assert tokenizer.tokenizer.decode(whole["input_ids"][: whole["prompt_len"]], skip_special_tokens=False) == head


def test_documents_are_cut_into_pieces(read, tmp_path):
    data = read(lines(tmp_path / "a.jsonl", {"text": "abcdefgh" * 2 + "x"}, {"text": "short"}), max_length=8)
    assert [len(row["input_ids"]) for row in data.dataset] == [8, 8, 5]
    assert set(data.dataset["prompt_len"]) == {0}
    assert list(data.dataset["document"]) == [0, 0, 1]
    counts = data.counts
    assert (counts.records, counts.examples, counts.cut_texts, counts.dropped_short) == (2, 3, 1, 1)
    assert "1 document cut into pieces" in counts.summary()


def test_long_chats_are_cut_or_dropped(read, tmp_path):
    asked = {"messages": [{"role": "user", "content": "x" * 30}, ANSWER]}
    data = read(lines(tmp_path / "a.jsonl", CHAT, asked), max_length=PROMPT_LEN + 2)
    [row] = data.dataset
    assert (len(row["input_ids"]), row["prompt_len"]) == (PROMPT_LEN + 2, PROMPT_LEN)
    assert (data.counts.cut_answers, data.counts.dropped_prompts) == (1, 1)
    # A prompt that leaves no room for a token of the answer is dropped as well.
    with pytest.raises(
        DataError,
        match=r"none of 1 record gives an example of at most \d+ tokens \(1 prompt too long.*raise --max-length",
    ):
        read(lines(tmp_path / "b.jsonl", CHAT), max_length=PROMPT_LEN)


def test_tokens(read, tmp_path):
    record = {"prompt_ids": [1, 2, 3], "answer_ids": [4, 5], "kind": "self"}
    [row] = read(lines(tmp_path / "a.jsonl", record)).dataset
    assert row == {"input_ids": [1, 2, 3, 4, 5], "prompt_len": 3, "document": 0}


def test_what_is_held_out_shares_no_document_with_what_is_trained_on(tokenizer, tmp_path):
    """Pieces of one text are near each other: a model that has seen some knows more of the others than of a new text."""
    texts = [{"text": f"{number:03} " + f"{number % 7}" * 36} for number in range(60)]
    chats = [{"messages": [{"role": "user", "content": f"{100 + n}?"}, ANSWER] * 2} for n in range(60)]
    sources = [lines(tmp_path / "texts.jsonl", *texts), lines(tmp_path / "chats.jsonl", *chats)]
    options = ReadOptions(max_length=60)
    for given in (sources[:1], sources):
        text = read_run_text(given, (), tokenizer, options, tmp_path / "cache", seed=4)
        held, trained = ({(row["source"], row["document"]) for row in part} for part in (text.held_out, text.train))
        assert len(held) == int(0.02 * 60 * len(given)) and not held & trained
        assert len(held) + len(trained) == 60 * len(given)
    few = [lines(tmp_path / "few.jsonl", *({"text": f"{number}" * 600} for number in range(6)))]
    text = read_run_text(few, (), tokenizer, options, tmp_path / "cache")
    assert (len(text.train), len(text.held_out)) == (60, 0), "60 pieces of 6 documents"


def test_a_template_in_tokenizer_config(tmp_path, make_tokenizer):
    from dmtd_models.data.chat import TextTokenizer

    files = {"tokenizer.json": make_tokenizer().tokenizer.to_str().encode()}
    config = {
        "chat_template": [{"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"}],
        "bos_token": "<s>",
    }
    made = TextTokenizer(files | {"tokenizer_config.json": json.dumps(config).encode()}, vocab_size=300)
    assert made.render([ASK], add_generation_prompt=True) == "<s>Hi?"


@pytest.mark.parametrize("form", ["jsonl", "json", "json lines", "parquet", "folder", "saved", "saved dict"])
def test_files(read, tmp_path, form):
    records = [{"text": f"document {number}"} for number in range(5)]
    path = tmp_path / "data"
    if form == "jsonl":
        path = tmp_path / "a.jsonl"
        lines(path, *records)
    elif form == "json":
        path = tmp_path / "a.json"
        path.write_text("\ufeff " + json.dumps(records, indent=1))
    elif form == "json lines":
        path = tmp_path / "a.json"
        lines(path, *records)
    elif form == "parquet":
        path = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif form == "folder":
        (path / "data").mkdir(parents=True)
        (path / "README.md").write_text("no data")
        (path / "data" / "train_info.json").write_text('{"options": {}}')
        lines(path / "data" / "train-0.jsonl", *records[:2])
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records[2:]), path / "data" / "train-1.parquet")
        lines(path / "data" / "test-0.jsonl", {"text": "never trained on"})
    elif form == "saved":
        datasets.Dataset.from_list(records).save_to_disk(path)
    else:
        both = {"train": datasets.Dataset.from_list(records), "test": datasets.Dataset.from_list([{"text": "no"}])}
        datasets.DatasetDict(both).save_to_disk(path)
    data = read(str(path))
    assert [bytes(row["input_ids"][-1:])[0] - data.dataset[0]["input_ids"][-1] for row in data.dataset] == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert data.counts.records == 5


def test_chats_in_parquet(read, tmp_path):
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"text": None, "messages": [ASK, ANSWER]}]), tmp_path / "a.parquet"
    )
    assert read(str(tmp_path / "a.parquet")).dataset[0]["prompt_len"] == PROMPT_LEN


def test_text_parts_of_content(read, tokenizer, tmp_path):
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "?"}]
    source = lines(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": parts}, ANSWER]})
    assert "user\nHi\n?<|im_end|>" in text_of(tokenizer, read(source).dataset[0])


def test_the_cache_knows_its_source(read, tmp_path, make_tokenizer, monkeypatch):
    path = tmp_path / "a.jsonl"
    first = read(lines(path, CHAT))
    with monkeypatch.context() as patch:
        patch.setattr(read_data, "_write", None)  # a second call must not come to it
        assert read(str(path)).counts == first.counts
    assert read(str(path), max_length=PROMPT_LEN + 2).counts.cut_answers == 1
    other = make_tokenizer(
        "{{ messages[0].content }}" + "{% if messages|length > 1 %}{{ messages[1].content }}{% endif %}"
    )
    assert read(str(path), tokenizer=other).counts.tokens == len("Hi?Yes.")
    lines(path, CHAT, CHAT)
    assert read(str(path)).counts.records == 2
    assert not list((tmp_path / "cache" / "tokenized").glob(".*"))


USER_ONLY = {"messages": [ASK]}
BAD_RECORDS = [
    ([CHAT, USER_ONLY], r"a\.jsonl:2: messages: got no assistant message, expected a chat with both sides"),
    ([{"messages": [ANSWER]}], r"a\.jsonl:1: messages: got no user message"),
    ([{"messages": [ANSWER, ASK]}], "an answer before any user message"),
    ([{"messages": []}], "got no user message"),
    ([{"messages": "Hi"}], "messages: got text, expected a list"),
    ([{"messages": ["Hi"]}], r"messages\[0\]: got text"),
    (
        [{"messages": [{"role": "bot", "content": "x"}]}],
        r'messages\[0\]\.role: got "bot", expected one of system, user',
    ),
    ([{"messages": [{"role": "user"}]}], r"messages\[0\]\.content: got null"),
    ([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], "a part that is not text"),
    ([{"messages": [ASK, {"role": "assistant", "content": " \n"}]}], r"messages\[1\]\.content: got empty text"),
    ([{"text": "fine"}, {"text": " "}], r"a\.jsonl:2: text: got empty text"),
    ([{"text": 5}], "text: got a number"),
    ([CHAT, {"text": "x y"}], r"a\.jsonl:2: got a record with `text` after records with `messages`"),
    ([{"text": "x", "messages": [ASK, ANSWER]}], "got `messages`, `text` in one record"),
    ([{"conversations": []}], "got `conversations`, expected one of `messages`, `text`"),
    ([{}], "got an empty object"),
    ([["a"]], r"a\.jsonl:1: got a list, expected a JSON object"),
    ([{"prompt_ids": [1]}], "got no answer_ids"),
    ([{"prompt_ids": [1], "answer_ids": []}], "answer_ids: got no tokens"),
    ([{"prompt_ids": [1], "answer_ids": [259]}], "answer_ids: got 259, expected ids from 0 to 258"),
    ([{"prompt_ids": [True], "answer_ids": [2]}], "prompt_ids: got true"),
    ([{"prompt_ids": "12", "answer_ids": [2]}], "prompt_ids: got text"),
    ([], r"no data: got 0 records"),
]


@pytest.mark.parametrize(("records", "says"), BAD_RECORDS, ids=range(len(BAD_RECORDS)))
def test_bad_records_are_one_clear_line(read, tmp_path, records, says):
    with pytest.raises(DataError, match=says) as caught:
        read(lines(tmp_path / "a.jsonl", *records))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    assert not list((tmp_path / "cache").rglob(".*"))


def test_malformed_lines_and_files(read, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(CHAT) + '\n\n{"messages": [\n')
    with pytest.raises(DataError, match=r"a\.jsonl:3: not JSON"):
        read(str(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xff\xfe"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl:1: not JSON"):
        read(str(tmp_path / "b.jsonl"))
    (tmp_path / "c.json").write_text('[{"text": "x"}')
    with pytest.raises(DataError, match=r"c\.json: not JSON"):
        read(str(tmp_path / "c.json"))
    (tmp_path / "d.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(DataError, match=r"d\.parquet: not a whole parquet file"):
        read(str(tmp_path / "d.parquet"))


def test_missing_and_empty_sources(read, tmp_path):
    with pytest.raises(DataError, match=r"no such file or directory; give a \.jsonl"):
        read(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data in this directory"):
        read(str(tmp_path / "empty"))
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"got a \.csv file, expected"):
        read(str(tmp_path / "a.csv"))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="not a whole saved dataset"):
        read(str(tmp_path / "saved"))


def test_splits_without_train(read, tmp_path):
    one = datasets.Dataset.from_list([{"text": "a b"}])
    datasets.DatasetDict({"dev": one, "test": one}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="got splits dev, test, expected one named train"):
        read(str(tmp_path / "saved"))


def test_templates_that_cannot_be_used(read, tmp_path, make_tokenizer):
    source = lines(tmp_path / "a.jsonl", CHAT)
    with pytest.raises(DataError, match=r"a\.jsonl:1: chat template: the checkpoint has none"):
        read(source, tokenizer=make_tokenizer(None))
    with pytest.raises(DataError, match=r"a\.jsonl:1: chat template: refuses this chat \(no users\)"):
        read(source, tokenizer=make_tokenizer("{{ raise_exception('no users') }}"))
    with pytest.raises(DataError, match="not the beginning of the rendered chat"):
        read(source, tokenizer=make_tokenizer("{{ messages|length }}{{ messages[0].content }}"))


def test_options_and_tokenizers_that_do_not_fit(read, tmp_path, make_tokenizer):
    from dmtd_models.data.chat import TextTokenizer

    with pytest.raises(DataError, match="max_length: got 4"):
        ReadOptions(max_length=4)
    with pytest.raises(DataError, match="expected ids below the model's 5"):
        read(lines(tmp_path / "a.jsonl", {"text": "xyz"}), tokenizer=make_tokenizer(vocab_size=5))
    with pytest.raises(DataError, match="tokenizer: an unknown pre-tokenizer; put"):
        TextTokenizer({}, vocab_size=5, problem="an unknown pre-tokenizer")
    with pytest.raises(DataError, match="tokenizer: cannot be read"):
        TextTokenizer({"tokenizer.json": b"{}"}, vocab_size=5)


def test_a_full_disk_is_one_line(read, tmp_path, monkeypatch):
    def full(path, examples):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(read_data, "_write_arrow", full)
    with pytest.raises(DataError, match=r"cannot be written.*No space left on device.*make room"):
        read(lines(tmp_path / "a.jsonl", CHAT))


@pytest.mark.parametrize(
    "record",
    [{"text": "half \ud83d of it"}, {"messages": [ASK, {"role": "assistant", "content": "half \ud83d of it"}]}],
)
def test_half_a_character(read, tmp_path, record):
    """JSON can write one half of a pair that stands for one character; no tokenizer takes it."""
    with pytest.raises(DataError, match=r"a.jsonl:2.*got half a character \('\\ud83d', the 6th\)"):
        read(lines(tmp_path / "a.jsonl", {**record, **({"text": "whole"} if "text" in record else CHAT)}, record))


def test_a_file_that_cannot_be_read(read, tmp_path):
    """Reading fails at the first byte, whoever asks: a link to memory that is not mapped."""
    (tmp_path / "a.jsonl").symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match=r"a.jsonl: cannot be read \(Input/output error\)"):
        read(str(tmp_path / "a.jsonl"))
