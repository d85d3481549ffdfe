"""A tokenizer whose every byte is a token, with ChatML's marks and template."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dmtd_models.data.chat import TextTokenizer

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCAB_SIZE = 259


def assets(template=TEMPLATE):
    vocabulary = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>", "<s>")])
    files = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps({"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}}).encode(),
    }
    return files | ({"chat_template.jinja": template.encode()} if template else {})


@pytest.fixture
def make_tokenizer():
    """Makes a ``TextTokenizer`` with a template; None: without."""

    def make(template=TEMPLATE, vocab_size=VOCAB_SIZE):
        return TextTokenizer(assets(template), vocab_size=vocab_size)

    return make


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer()
