"""The torch reference against transformers' own classes, for every family and option; streamed = held in memory."""

import numpy as np
import pytest
import torch
import transformers

from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.checkpoints.tensors import tensor_shapes
from dmtd_models.config.model import Rope, SplitOptions, resolve_dmtd
from dmtd_models.reference.dmtd import DmtdModel, StreamedModel
from dmtd_models.reference.oracle import teacher_forced
from dmtd_models.reference.testing import write_tiny_checkpoint

CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
LINEAR = Rope(theta=10000.0, kind="linear", factor=3.0)
LLAMA3 = Rope(
    theta=500000.0,
    kind="llama3",
    factor=8.0,
    original_max_positions=64,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
)
YARN = Rope(
    theta=1000000.0, kind="yarn", factor=4.0, original_max_positions=64, beta_fast=32.0, beta_slow=1.0, truncate=True
)
YARN_MSCALE = Rope(
    theta=10000.0,
    kind="yarn",
    factor=8.0,
    original_max_positions=32,
    beta_fast=16.0,
    beta_slow=2.0,
    mscale=0.7,
    mscale_all_dim=0.4,
    truncate=False,
)
YARN_FACTOR = Rope(
    theta=10000.0,
    kind="yarn",
    factor=2.0,
    original_max_positions=128,
    beta_fast=32.0,
    beta_slow=1.0,
    attention_factor=1.3,
)
CASES = [
    *[(family, {"rope": rope, "tie": tie}) for family in CLASSES for rope, tie in ((None, True), (LINEAR, False))],
    *[(family, {"rope": rope}) for family in CLASSES for rope in (LLAMA3, YARN)],
    ("llama", {"rope": YARN_MSCALE}),
    ("llama", {"rope": YARN_FACTOR}),
    ("llama", {"qkv_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"qkv_bias": True, "mlp_bias": True, "tie": True, "kv_heads": 4}),
    ("qwen3", {"qkv_bias": True}),
    ("qwen2", {"kv_heads": 1}),
    ("qwen3", {"kv_heads": 4, "head_dim": 32}),
    ("qwen3", {"heads": 6, "kv_heads": 3, "head_dim": 8, "hidden_size": 40, "intermediate_size": 56, "layers": 2}),
    ("llama", {"dtype": "bfloat16", "shards": 3}),
    ("qwen2", {"dtype": "float16"}),
    ("qwen3", {"dtype": "float64", "tie": True}),
]
TOKENS = [(13 * i * i + 7 * i + 3) % 128 for i in range(50)]


def describe(case):
    family, options = case
    shown = {k: (v.kind if isinstance(v, Rope) else v) for k, v in options.items()}
    return f"{family} {shown}"


def load(directory, cls=DmtdModel, dtype=torch.float64, **split):
    checkpoint = open_checkpoint(directory)
    spec = resolve_dmtd(
        checkpoint.config, checkpoint.dmtd, SplitOptions(**split or {"decoding_layers": 1, "cycle_length": 4})
    )
    make = cls.from_reader if cls is DmtdModel else cls
    return make(checkpoint.config, spec, checkpoint.read, dtype)


@pytest.mark.parametrize("case", CASES, ids=describe)
def test_plain_logits_agree_with_transformers(tmp_path, case):
    family, options = case
    directory = write_tiny_checkpoint(tmp_path, family=family, **options)
    for dtype, margin in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        theirs = getattr(transformers, CLASSES[family]).from_pretrained(directory, dtype=dtype).eval()
        with torch.no_grad():
            expected = theirs(torch.tensor([TOKENS])).logits[0]
        got = teacher_forced(load(directory, dtype=dtype), TOKENS, len(TOKENS), plain=True)
        assert got.dtype == dtype
        worst = float((got - expected).abs().max())
        assert worst <= margin, f"{worst} over {margin}"  # logits are at most about 10, so this is relative as well
        assert expected.abs().max() > 1


def test_every_rope_gives_other_logits(tmp_path):
    """Otherwise the comparison above could not tell them apart."""
    seen = []
    for number, rope in enumerate((None, LINEAR, LLAMA3, YARN, YARN_MSCALE, YARN_FACTOR)):
        directory = write_tiny_checkpoint(tmp_path / str(number), family="llama", rope=rope)
        seen.append(teacher_forced(load(directory), TOKENS, 50, plain=True))
    for i, one in enumerate(seen):
        for other in seen[:i]:
            assert (one - other).abs().max() > 1e-2 * one.abs().max()


@pytest.mark.parametrize("family", list(CLASSES))
def test_every_tensor_matters(tmp_path, family):
    """Each tensor a little changed moves the logits far beyond any margin: none is read from the wrong place."""
    directory = write_tiny_checkpoint(
        tmp_path, family=family, layers=3, qkv_bias=family != "qwen2", mlp_bias=family == "llama"
    )
    checkpoint = open_checkpoint(directory)
    spec = resolve_dmtd(checkpoint.config, None, SplitOptions(decoding_layers=1, encoding_layers=1, cycle_length=2))

    def logits(changed):
        def read(name):
            array = np.array(checkpoint.read(name))
            if name == changed:
                array[TOKENS[0] % len(array)] += 0.25
            return array

        model = DmtdModel.from_reader(checkpoint.config, spec, read, torch.float32)
        return teacher_forced(model, TOKENS[:12], 4)

    base = logits(None)
    for name in tensor_shapes(checkpoint.config):
        moved = float((logits(name) - base).abs().max() / base.abs().max())
        # A key's bias shifts all scores of a query alike but for the rotation, so it acts least.
        assert moved > 4e-4, name


def test_caches_and_thought_are_those_of_transformers(tmp_path):
    directory = write_tiny_checkpoint(tmp_path, family="qwen3")
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    ids = torch.tensor([TOKENS[:20], TOKENS[20:40]])
    with torch.no_grad():
        expected = theirs(ids, use_cache=True, output_hidden_states=True)
        model = load(directory, encoding_layers=1, decoding_layers=1, cycle_length=4)
        ones = torch.ones(2, 20, dtype=torch.long)
        got = model(ids, torch.arange(20).expand(2, 20), 0 * ones, ones)
    assert [key.shape for key in got.keys] == [(2, 2, 20, 16)] * 4
    for layer in range(4):
        cached = expected.past_key_values.layers[layer]
        torch.testing.assert_close(got.keys[layer], cached.keys, rtol=0, atol=1e-9)
        torch.testing.assert_close(got.values[layer], cached.values, rtol=0, atol=1e-9)
    torch.testing.assert_close(got.hidden, expected.hidden_states[1], rtol=0, atol=1e-9)
    torch.testing.assert_close(got.thought, expected.hidden_states[3], rtol=0, atol=1e-9)
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("tie", "dtype"), [(True, "float32"), (False, "bfloat16")])
def test_streamed_model_is_the_same_function(tmp_path, tie, dtype):
    fields = {"num_encoding_layers": 1, "num_thinking_layers": 2, "num_decoding_layers": 1, "mtp_horizon": 3}
    directory = write_tiny_checkpoint(tmp_path, family="qwen3", tie=tie, dtype=dtype, dmtd=fields)
    held, streamed = (load(directory, cls, torch.float32, cycle_length=3) for cls in (DmtdModel, StreamedModel))
    assert torch.equal(teacher_forced(held, TOKENS, 5), teacher_forced(streamed, TOKENS, 5))


def test_streamed_model_reads_one_layer_at_a_time(tmp_path):
    checkpoint = open_checkpoint(write_tiny_checkpoint(tmp_path, family="llama", layers=3))
    spec = resolve_dmtd(checkpoint.config, None, SplitOptions(decoding_layers=1, cycle_length=2))
    read = []
    model = StreamedModel(
        checkpoint.config, spec, lambda name: read.append(name) or checkpoint.read(name), torch.float32
    )
    assert read == []
    teacher_forced(model, TOKENS, 5)
    layers = [name.split(".")[2] for name in read if name.startswith("model.layers.")]
    assert layers == sorted(layers)
    assert len(read) == len(set(read)) == len(checkpoint.names())


def test_a_row_switched_off_may_be_nan(tmp_path):
    checkpoint = open_checkpoint(write_tiny_checkpoint(tmp_path, family="llama"))
    spec = resolve_dmtd(checkpoint.config, None, SplitOptions(decoding_layers=1, cycle_length=4))

    def read(name):
        array = np.array(checkpoint.read(name))
        return np.full_like(array, np.nan) if name.startswith("model.layers.1.mlp") else array

    model = DmtdModel.from_reader(checkpoint.config, spec, read, torch.float32)
    ones = torch.ones(1, 8, dtype=torch.bool)
    got = model(torch.tensor([TOKENS[:8]]), torch.arange(8)[None], ones, ~ones)
    assert got.thought.isnan().all()
    assert got.logits.isfinite().all()


@pytest.mark.parametrize("tie", [True, False])
def test_state_dict_has_hugging_faces_names_and_trains(tmp_path, tie):
    directory = write_tiny_checkpoint(tmp_path, family="qwen2", tie=tie)
    model = load(directory, dtype=torch.float32)
    theirs = transformers.Qwen2ForCausalLM.from_pretrained(directory)
    names = set(theirs.state_dict()) - ({"lm_head.weight"} if tie else set())
    assert set(model.state_dict()) == names
    ones = torch.ones(1, 8, dtype=torch.bool)
    logits = model(torch.tensor([TOKENS[:8]]), torch.arange(8)[None], ones, ones).logits
    torch.nn.functional.cross_entropy(logits[0], torch.tensor(TOKENS[1:9])).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_half_precision_runs_and_stays_close(tmp_path):
    directory = write_tiny_checkpoint(tmp_path, family="qwen3", dtype="bfloat16")
    exact = teacher_forced(load(directory, dtype=torch.float32), TOKENS, 10)
    half = teacher_forced(load(directory, dtype=torch.bfloat16), TOKENS, 10)
    assert half.dtype == torch.bfloat16
    # bfloat16 has 8 bits; a few dozen roundings in a row.
    assert (half.float() - exact).abs().max() < 0.15 * exact.abs().max()
