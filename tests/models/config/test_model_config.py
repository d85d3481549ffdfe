"""config.json -> ModelConfig and DmtdSpec: published forms, defaults, refusals, options."""

import json

import pytest
import transformers

from dmtd_models.config.hf import to_hugging_face
from dmtd_models.config.model import DmtdSpec, Rope, SplitOptions, read_config, resolve_dmtd
from dmtd_models.errors import ConfigError
from dmtd_models.reference.rope import attention_factor

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
ORIGINAL = {"num_encoding_layers": 0, "num_thinking_layers": 28, "num_decoding_layers": 8, "mtp_horizon": 4}
PARALLEL = {
    "num_parallel_layers": 28,
    "num_sequential_layers": 8,
    "mtp_horizon": 4,
    "mask_token_id": 151660,
    "dmtd_history_mode": "real",
    "dmtd_block_attention": "none",
}
RELEASED = DmtdSpec(
    encoding_layers=0,
    thinking_layers=28,
    decoding_layers=8,
    cycle_length=4,
    cycle_origin="prompt",
    prompt_input="thinking",
    trained=True,
    convention_recorded=False,
)


def test_plain_qwen3_4b():
    model, dmtd = read_config(QWEN3)
    assert dmtd is None
    assert (model.family, model.num_layers, model.hidden_size, model.head_dim) == ("qwen3", 36, 2560, 128)
    assert (model.num_heads, model.num_kv_heads, model.intermediate_size) == (32, 8, 9728)
    assert model.rope == Rope(theta=1000000.0)
    assert (model.qk_norm, model.qkv_bias, model.o_bias, model.tie_word_embeddings) == (True, False, False, True)
    assert (model.dtype, model.bos_token_id, model.eos_token_ids) == ("bfloat16", 151643, (151645,))


@pytest.mark.parametrize(
    ("model_type", "architecture", "fields"),
    [
        ("mtpqwen3", "MTPQwen3ForCausalLM", ORIGINAL),
        ("dmtdqwen3", "DMTDQwen3ForCausalLM", PARALLEL),
        ("dmtdqwen3", "DMTDQwen3ForCausalLM", ORIGINAL),
        ("qwen3", "Qwen3ForCausalLM", ORIGINAL),
    ],
)
def test_published_fields_load_unmodified(model_type, architecture, fields):
    _, dmtd = read_config({**QWEN3, "model_type": model_type, "architectures": [architecture], **fields})
    assert dmtd == RELEASED


@pytest.mark.parametrize(("model_type", "family"), [("mtpllama", "llama"), ("mtpqwen2", "qwen2")])
def test_other_families_in_the_published_form(model_type, family):
    model, dmtd = read_config({**QWEN3, "architectures": None, "model_type": model_type, **ORIGINAL})
    assert model.family == family
    assert dmtd == RELEASED


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [
        ({"cycle_origin": "absolute", "prompt_input": "cyclical"}, ("absolute", "cyclical", True)),
        ({"cycle_origin": "absolute"}, ("absolute", "cyclical", True)),
        ({"prompt_input": "sum"}, ("prompt", "sum", True)),
        ({}, ("prompt", "thinking", False)),
    ],
)
def test_recorded_convention(recorded, expected):
    _, dmtd = read_config({**QWEN3, "model_type": "mtpqwen3", "architectures": None, **ORIGINAL, **recorded})
    assert (dmtd.cycle_origin, dmtd.prompt_input, dmtd.convention_recorded) == expected


@pytest.mark.parametrize("cls", ["LlamaConfig", "Qwen2Config", "Qwen3Config"])
def test_absent_keys_mean_what_transformers_means(cls):
    """Everything with a default left out; transformers' own class says what it stands for."""
    theirs = getattr(transformers, cls)()
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    ours, _ = read_config({"model_type": theirs.model_type, **{key: getattr(theirs, key) for key in sizes}})
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.rope == Rope(theta=theirs.rope_parameters["rope_theta"])
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert ours.qkv_bias == (cls == "Qwen2Config")


def test_both_spellings_of_rope_are_one():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    old, _ = read_config({**LLAMA, "rope_theta": 500000.0, "rope_scaling": scaling})
    legacy = {("type" if key == "rope_type" else key): value for key, value in scaling.items()}
    older, _ = read_config({**LLAMA, "rope_theta": 500000.0, "rope_scaling": legacy})
    new, _ = read_config({**LLAMA, "rope_parameters": {"rope_theta": 500000.0, **scaling}})
    assert old == older == new
    assert (new.rope.kind, new.rope.theta, new.rope.factor, new.rope.original_max_positions) == (
        "yarn",
        500000.0,
        4.0,
        32768,
    )
    assert (new.rope.beta_fast, new.rope.beta_slow, new.rope.truncate) == (32.0, 1.0, True)


def test_what_transformers_ignores_of_rope_is_ignored():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    published = {**scaling, "attn_factor": 0.8782488562869419, "finetuned": True}
    ours, _ = read_config({**LLAMA, "rope_scaling": published, "max_position_embeddings": 131072})
    assert ours == read_config({**LLAMA, "rope_scaling": scaling, "max_position_embeddings": 131072})[0]
    theirs = transformers.Qwen3Config(rope_parameters={"rope_theta": 1e6, **published}, max_position_embeddings=131072)
    _, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    assert attention_factor(ours.rope) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("cls", ["LlamaConfig", "Qwen2Config", "Qwen3Config"])
def test_what_transformers_5_saves_is_read(cls, tmp_path):
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    getattr(transformers, cls)(rope_parameters=llama3, eos_token_id=[7, 9]).save_pretrained(tmp_path)
    model, _ = read_config(json.loads((tmp_path / "config.json").read_text()))
    assert model.rope == Rope(
        theta=500000.0,
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_positions=8192,
    )
    assert model.eos_token_ids == (7, 9)


@pytest.mark.parametrize("raw", [QWEN3, LLAMA, {**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 2}}])
def test_writing_is_the_inverse_of_reading(raw):
    model, _ = read_config(raw)
    assert read_config(to_hugging_face(model)) == (model, None)


REFUSED = [
    ({"model_type": "mistral"}, "model_type"),
    ({"model_type": None}, "model_type"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"num_local_experts": 8}, "num_local_experts"),
    ({"num_experts": 64}, "num_experts"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ({"pretraining_tp": 2}, "pretraining_tp"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
    ({"rope_scaling": {"type": "mrope", "factor": 2.0}}, "mrope"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor"),
    ({"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2]}}, "mrope_section"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_theta"),
    ({"rope_theta": -1.0}, "rope_theta"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ({"use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 2}, "use_sliding_window"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"vocab_size": -5}, "vocab_size"),
    ({"vocab_size": "many"}, "vocab_size"),
    ({"hidden_size": None}, "hidden_size"),
    ({"head_dim": 15}, "head_dim"),
    ({"torch_dtype": "int8"}, "dtype"),
    ({"eos_token_id": "x"}, "eos_token_id"),
    ({"attention_bias": "yes"}, "attention_bias"),
    ({"num_thinking_layers": 3}, "num_decoding_layers"),
    ({"num_thinking_layers": 2, "num_decoding_layers": 1, "mtp_horizon": 4}, "0 + thinking 2 + decoding 1 = 3"),
    ({"num_thinking_layers": 4, "num_decoding_layers": 0, "mtp_horizon": 4}, "decoding 0"),
    ({"num_thinking_layers": 3, "num_decoding_layers": 1, "mtp_horizon": 0}, "got 0"),
    ({"num_encoding_layers": -1, "num_thinking_layers": 4, "num_decoding_layers": 1, "mtp_horizon": 2}, "encoding -1"),
    (
        {"num_parallel_layers": 3, "num_sequential_layers": 1, "mtp_horizon": 4, "dmtd_block_attention": "causal"},
        "Parallel DMTD is not supported",
    ),
    (
        {
            **{"num_parallel_layers": 3, "num_sequential_layers": 1, "mtp_horizon": 4},
            **{"dmtd_block_attention": "none", "dmtd_history_mode": "shadow"},
        },
        'dmtd_history_mode: got "shadow"',
    ),
    ({"num_parallel_layers": 3, "num_sequential_layers": 1, "mtp_horizon": 4}, "Parallel DMTD is not supported"),
    ({"num_parallel_layers": 3, "num_thinking_layers": 3, "mtp_horizon": 4}, "ambiguous"),
    (
        {
            **{"num_thinking_layers": 3, "num_decoding_layers": 1, "mtp_horizon": 4},
            **{"cycle_origin": "prompt", "prompt_input": "cyclical"},
        },
        "prompt + prompt input cyclical",
    ),
]


@pytest.mark.parametrize(("change", "named"), REFUSED, ids=[next(iter(change)) for change, _ in REFUSED])
def test_refused_by_name(change, named):
    read_config(LLAMA)
    with pytest.raises(ConfigError) as caught:
        read_config({**LLAMA, **change})
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 36},
        {"layer_types": ["full_attention"] * 36},
        {"num_experts": 0, "quantization_config": None, "pretraining_tp": 1, "partial_rotary_factor": 1.0},
        {"auto_map": {"AutoModelForCausalLM": "modeling.X"}, "attention_dropout": 0.1},
    ],
)
def test_harmless_keys_change_nothing(change):
    assert read_config({**QWEN3, **change}) == read_config(QWEN3)


def test_dmtd_class_names_are_free_but_other_heads_are_not():
    published = {**QWEN3, "model_type": "mtpqwen3", **ORIGINAL}
    assert read_config({**published, "architectures": ["WhateverTheAuthorsCalledIt"]})[1] == RELEASED
    with pytest.raises(ConfigError, match="MTPQwen3ForSequenceClassification"):
        read_config({**published, "architectures": ["MTPQwen3ForSequenceClassification"]})


def test_dmtd_type_without_its_fields_is_refused():
    with pytest.raises(ConfigError, match="num_thinking_layers"):
        read_config({**QWEN3, "model_type": "mtpqwen3"})


MODEL, _ = read_config(QWEN3)


@pytest.mark.parametrize(
    ("recorded", "options", "expected"),
    [
        (None, {"decoding_layers": 8, "cycle_length": 4}, (0, 28, 8, 4, "prompt", "thinking", False, False)),
        (
            None,
            {"decoding_layers": 8, "cycle_length": 4, "encoding_layers": 2, "cycle_origin": "absolute"},
            (2, 26, 8, 4, "absolute", "cyclical", False, True),
        ),
        (
            None,
            {"decoding_layers": 8, "cycle_length": 4, "prompt_input": "cyclical"},
            (0, 28, 8, 4, "absolute", "cyclical", False, True),
        ),
        (
            None,
            {"decoding_layers": 8, "cycle_length": 4, "cycle_origin": "prompt", "prompt_input": "sum"},
            (0, 28, 8, 4, "prompt", "sum", False, True),
        ),
        (RELEASED, {}, (0, 28, 8, 4, "prompt", "thinking", True, False)),
        (RELEASED, {"cycle_length": 2}, (0, 28, 8, 2, "prompt", "thinking", True, False)),
        (RELEASED, {"decoding_layers": 16}, (0, 20, 16, 4, "prompt", "thinking", True, False)),
        (RELEASED, {"cycle_origin": "absolute"}, (0, 28, 8, 4, "absolute", "cyclical", True, True)),
        (RELEASED, {"cycle_origin": "prompt"}, (0, 28, 8, 4, "prompt", "thinking", True, True)),
    ],
)
def test_options_over_what_is_recorded(recorded, options, expected):
    spec = resolve_dmtd(MODEL, recorded, SplitOptions(**options))
    fields = ("encoding_layers", "thinking_layers", "decoding_layers", "cycle_length", "cycle_origin", "prompt_input")
    assert tuple(getattr(spec, field) for field in (*fields, "trained", "convention_recorded")) == expected


@pytest.mark.parametrize(
    ("recorded", "options", "named"),
    [
        (None, {}, ("--decoding-layers", "--cycle-length")),
        (None, {"decoding_layers": 8}, ("--cycle-length",)),
        (None, {"cycle_length": 4}, ("--decoding-layers",)),
        (None, {"decoding_layers": 36, "cycle_length": 4}, ("thinking 0", "36")),
        (None, {"decoding_layers": 8, "cycle_length": 0}, ("got 0",)),
        (None, {"decoding_layers": 8, "thinking_layers": 8, "cycle_length": 4}, ("= 16 layers", "36")),
        (
            None,
            {"decoding_layers": 8, "cycle_length": 4, "cycle_origin": "prompt", "prompt_input": "cyclical"},
            ("undefined", "--prompt-input"),
        ),
        (
            None,
            {"decoding_layers": 8, "cycle_length": 4, "cycle_origin": "absolute", "prompt_input": "thinking"},
            ("undefined",),
        ),
        (
            None,
            {"decoding_layers": 8, "cycle_length": 4, "cycle_origin": "absolute", "prompt_input": "sum"},
            ("undefined",),
        ),
        (RELEASED, {"cycle_origin": "relative"}, ('cycle_origin: got "relative"',)),
        (RELEASED, {"prompt_input": "both"}, ('prompt_input: got "both"',)),
        (RELEASED, {"encoding_layers": -1}, ("encoding -1",)),
    ],
)
def test_options_that_cannot_be_honoured(recorded, options, named):
    with pytest.raises(ConfigError) as caught:
        resolve_dmtd(MODEL, recorded, SplitOptions(**options))
    assert all(word in str(caught.value) for word in named)


@pytest.mark.parametrize(
    ("layers", "at_fault"),
    [
        ({"encoding_layers": -1, "decoding_layers": 8}, "encoding_layers"),
        ({"encoding_layers": 36, "decoding_layers": 8}, "encoding_layers"),
        ({"thinking_layers": 0, "decoding_layers": 8}, "thinking_layers"),
        ({"encoding_layers": 2, "decoding_layers": 0}, "decoding_layers"),
        ({"encoding_layers": 30, "decoding_layers": 8}, "decoding_layers"),
        ({"encoding_layers": 2, "thinking_layers": 8, "decoding_layers": 8}, "decoding_layers"),
    ],
)
def test_a_wrong_split_is_told_of_the_option_that_is_wrong(layers, at_fault):
    with pytest.raises(ConfigError) as caught:
        resolve_dmtd(MODEL, None, SplitOptions(cycle_length=4, **layers))
    assert caught.value.param == at_fault
