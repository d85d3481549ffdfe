"""A chat as SmolLM2's own template and tokenizer write it, and as the runtime will at inference."""

import json

import pytest

from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.data.chat import TextTokenizer
from dmtd_models.data.read_data import ReadOptions, read_training_data
from dmtd_runtime.text.chat_template import ChatTemplate
from study import smollm2

PROMPT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is 12 + 5?<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint(smollm2.fetch_smollm2(smollm2.default_cache_dir()))


def test_a_chat_of_smollm2(checkpoint, tmp_path):
    chat = [{"role": "user", "content": "What is 12 + 5?"}, {"role": "assistant", "content": "It is 17."}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat}))
    tokenizer = TextTokenizer.of_checkpoint(checkpoint)
    [row] = read_training_data(str(tmp_path / "a.jsonl"), tokenizer, ReadOptions(), tmp_path).dataset
    prompt, answer = row["input_ids"][: row["prompt_len"]], row["input_ids"][row["prompt_len"] :]
    assert tokenizer.tokenizer.decode(prompt, skip_special_tokens=False) == PROMPT
    assert [tokenizer.tokenizer.id_to_token(number) for number in answer] == [
        "It",
        "Ġis",
        "Ġ",
        "1",
        "7",
        ".",
        "<|im_end|>",
    ]
    assert tokenizer.special_ids >= {0, 1, 2}


def test_the_runtime_renders_the_same(checkpoint, tmp_path):
    for name, content in checkpoint.assets().items():
        (tmp_path / name).write_bytes(content)
    theirs = ChatTemplate.from_directory(tmp_path)
    ours = TextTokenizer.of_checkpoint(checkpoint)
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "a\n b "}]
    for messages in (chat, chat[1:], [*chat, {"role": "assistant", "content": " x "}, chat[1]]):
        for opened in (True, False):
            rendered = theirs.render(messages, add_generation_prompt=opened)
            assert ours.render(messages, add_generation_prompt=opened) == rendered
