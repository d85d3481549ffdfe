"""What a checkpoint is: the architecture of its decoder and its DMTD split, read from config.json. No torch.

Foreign keys (Hugging Face's, the published DMTD ones) are translated here, in ``rope`` and in ``families``, and
nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

from dmtd_errors.words import shown
from dmtd_models.config.families import FAMILIES, REFUSED_KEYS, Family
from dmtd_models.config.rope import Rope, RopeKind, read_rope
from dmtd_models.config.values import boolean, integer, number
from dmtd_models.errors import ConfigError

__all__ = [
    "ANY_SPLIT",
    "DEFAULT_CONVENTION",
    "LEGAL_CONVENTIONS",
    "MAX_CYCLE_LENGTH",
    "CycleOrigin",
    "DmtdSpec",
    "ModelConfig",
    "PromptInput",
    "Rope",
    "RopeKind",
    "SplitOptions",
    "check_dmtd",
    "read_config",
    "require_split",
    "resolve_dmtd",
]

CycleOrigin = Literal["absolute", "prompt"]
PromptInput = Literal["cyclical", "thinking", "sum"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The architecture of one decoder-only checkpoint."""

    family: str  # a key of families.FAMILIES: llama, qwen2, qwen3
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool
    max_positions: int
    dtype: str  # of the stored weights as config.json states it: float32, float16, bfloat16
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DmtdSpec:
    """How the decoder is split and which convention its weights were trained for (design: E + T + D layers, tau)."""

    encoding_layers: int
    thinking_layers: int
    decoding_layers: int
    cycle_length: int
    cycle_origin: CycleOrigin
    prompt_input: PromptInput
    trained: bool  # the checkpoint itself carries DMTD fields
    convention_recorded: bool  # cycle_origin and prompt_input stood in the checkpoint or were given; else defaulted


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitOptions:
    """A split and convention that are asked for, by options; None: as the checkpoint records it (see ``resolve_dmtd``)."""

    encoding_layers: int | None = None
    thinking_layers: int | None = None
    decoding_layers: int | None = None
    cycle_length: int | None = None
    cycle_origin: CycleOrigin | None = None
    prompt_input: PromptInput | None = None


ANY_SPLIT = SplitOptions(
    decoding_layers=1, cycle_length=1
)  # of a plain model in plain mode, where all compute the same
MAX_CYCLE_LENGTH = 256  # a refill is one window of a graph; a model that cannot be exported need not be trained

_LEAST_LAYERS = {"encoding_layers": 0, "thinking_layers": 1, "decoding_layers": 1}

# The authors train with the first pair and serve with the second; the third is what their released prefill is said to
# do. Every other pair has no defined gates.
LEGAL_CONVENTIONS: tuple[tuple[CycleOrigin, PromptInput], ...] = (
    ("absolute", "cyclical"),
    ("prompt", "thinking"),
    ("prompt", "sum"),
)
DEFAULT_CONVENTION: tuple[CycleOrigin, PromptInput] = ("prompt", "thinking")

_ORIGINAL_KEYS = ("num_encoding_layers", "num_thinking_layers", "num_decoding_layers")
_PARALLEL_KEYS = ("num_parallel_layers", "num_sequential_layers", "dmtd_block_attention", "dmtd_history_mode")
_STORED_DTYPES = ("float64", "float32", "float16", "bfloat16")


def read_config(raw: Mapping[str, object]) -> tuple[ModelConfig, DmtdSpec | None]:
    """Translate the contents of a Hugging Face config.json.

    Args:
        raw: the parsed JSON object, of transformers 4 (``rope_theta`` + ``rope_scaling``) or 5 (``rope_parameters``).

    Returns:
        The architecture, and the DMTD split where the config carries one.

    Raises:
        ConfigError: something in it that this package would not compute exactly, named with its value.
    """
    family = _family(raw)
    _refuse_foreign(raw, family)
    model = _model(raw, family)
    _check_sizes(model)
    is_dmtd_type = raw["model_type"] in family.dmtd_types
    return model, _dmtd(raw, model, required=is_dmtd_type)


def resolve_dmtd(model: ModelConfig, recorded: DmtdSpec | None, split: SplitOptions = SplitOptions()) -> DmtdSpec:
    """Combine what the checkpoint records with the options given; options win.

    Thinking layers that are not given are the rest, unless no layer option is given at all and the split is recorded.

    Raises:
        ConfigError: a plain checkpoint without decoding layers or cycle length, a split that does not add up, or a
            convention that is not defined.
    """
    if recorded is None:
        require_split(split, model.num_layers)
    encoding, thinking_given, decoding = split.encoding_layers, split.thinking_layers, split.decoding_layers
    layers_given = any(count is not None for count in (encoding, thinking_given, decoding))
    if encoding is None:
        encoding = recorded.encoding_layers if recorded else 0
    if decoding is None:
        decoding = cast(DmtdSpec, recorded).decoding_layers
    if thinking_given is not None:
        thinking = thinking_given
    elif recorded is not None and not layers_given:
        thinking = recorded.thinking_layers
    else:
        thinking = model.num_layers - encoding - decoding
    origin, prompt, convention_recorded = _resolve_convention(recorded, split.cycle_origin, split.prompt_input)
    spec = DmtdSpec(
        encoding_layers=encoding,
        thinking_layers=thinking,
        decoding_layers=decoding,
        cycle_length=cast(DmtdSpec, recorded).cycle_length if split.cycle_length is None else split.cycle_length,
        cycle_origin=origin,
        prompt_input=prompt,
        trained=recorded is not None and recorded.trained,
        convention_recorded=convention_recorded,
    )
    check_dmtd(spec, model.num_layers, split)
    return spec


def require_split(split: SplitOptions, num_layers: int = 32) -> None:
    """Raise ConfigError where ``split`` does not say what a checkpoint without DMTD fields must be told."""
    options = {"decoding_layers": split.decoding_layers, "cycle_length": split.cycle_length}
    if missing := [name for name, value in options.items() if value is None]:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise ConfigError(
            f"the checkpoint carries no DMTD fields: its split is unknown; give {flags} "
            f"(for example --decoding-layers {max(1, num_layers // 4)} --cycle-length 4)",
            param=missing[0],
        )


def check_dmtd(spec: DmtdSpec, num_layers: int, split: SplitOptions = SplitOptions()) -> None:
    """Refuse a split, cycle length or convention that is not defined; ``split``: the options that it was made of.

    Raises:
        ConfigError: with the numbers, and an option where one was given.
    """

    def given(*names: str) -> str | None:
        return next((name for name in names if getattr(split, name) is not None), None)

    e, t, d = spec.encoding_layers, spec.thinking_layers, spec.decoding_layers
    if e < 0 or t <= 0 or d <= 0 or e + t + d != num_layers:
        # One that is wrong whatever the others are is at fault before one that does not add up.
        most = num_layers - sum(_LEAST_LAYERS.values())
        wrong = [name for name, least in _LEAST_LAYERS.items() if not 0 <= getattr(spec, name) - least <= most]
        raise ConfigError(
            f"DMTD split: got encoding {e} + thinking {t} + decoding {d} = {e + t + d} layers, expected encoding >= 0, "
            f"thinking > 0, decoding > 0 and a sum of {num_layers} (num_hidden_layers); correct the split "
            "(--encoding-layers, --thinking-layers, --decoding-layers)",
            param=given(*wrong, "decoding_layers", "thinking_layers", "encoding_layers"),
        )
    if not 1 <= spec.cycle_length <= MAX_CYCLE_LENGTH:
        raise ConfigError(
            f"got {spec.cycle_length}, expected 1 to {MAX_CYCLE_LENGTH}; correct it, or the checkpoint's mtp_horizon",
            param="cycle_length",
        )
    if (spec.cycle_origin, spec.prompt_input) not in LEGAL_CONVENTIONS:
        legal = ", ".join(f"{origin} + {prompt}" for origin, prompt in LEGAL_CONVENTIONS)
        raise ConfigError(
            f"convention: got cycle origin {spec.cycle_origin} + prompt input {spec.prompt_input}, which is undefined, "
            f"expected one of {legal}; correct --cycle-origin or --prompt-input",
            param=given("cycle_origin", "prompt_input"),
        )


def _resolve_convention(
    recorded: DmtdSpec | None, origin: CycleOrigin | None, prompt: PromptInput | None
) -> tuple[CycleOrigin, PromptInput, bool]:
    """The pair in force, and whether anyone stated it. A single given half chooses its natural partner."""
    for value, kind, option in ((origin, CycleOrigin, "cycle_origin"), (prompt, PromptInput, "prompt_input")):
        if value is not None and value not in get_args(kind):
            raise ConfigError(f"got {shown(value)}, expected one of {', '.join(get_args(kind))}", param=option)
    if origin is None and prompt is None:
        if recorded is None:
            return (*DEFAULT_CONVENTION, False)
        return recorded.cycle_origin, recorded.prompt_input, recorded.convention_recorded
    if origin is None:
        return ("absolute" if prompt == "cyclical" else "prompt"), cast(PromptInput, prompt), True
    if prompt is None:
        if recorded is not None and recorded.convention_recorded and recorded.cycle_origin == origin:
            return origin, recorded.prompt_input, True
        return origin, ("cyclical" if origin == "absolute" else "thinking"), True
    return origin, prompt, True


def _family(raw: Mapping[str, object]) -> Family:
    model_type = raw.get("model_type")
    known = {kind: family for family in FAMILIES.values() for kind in (*family.plain_types, *family.dmtd_types)}
    if not isinstance(model_type, str) or model_type not in known:
        raise ConfigError(f"model_type: got {shown(model_type)}, expected one of {', '.join(sorted(known))}")
    family = known[model_type]
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list | tuple):
        raise ConfigError(f"architectures: got {shown(architectures)}, expected a list of class names")
    for name in architectures:
        # The class names of DMTD checkpoints are the authors' own; there only another kind of head is refused.
        is_dmtd = model_type in family.dmtd_types
        other_head = "Classification" in str(name) or "QuestionAnswering" in str(name)
        if (is_dmtd and other_head) or not (is_dmtd or name == family.architecture):
            raise ConfigError(
                f"architectures: got {shown(name)}, expected {family.architecture} for model_type {model_type}"
            )
    return family


def _refuse_foreign(raw: Mapping[str, object], family: Family) -> None:
    for key, neutral in REFUSED_KEYS.items():
        value = raw.get(key)
        if value is not None and not any(value == allowed for allowed in neutral):
            raise ConfigError(f"{key}: got {shown(value)}, which changes the model's output and is not supported")
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ConfigError(f"hidden_act: got {shown(activation)}, expected silu; other activations are not supported")
    if not family.reads_mlp_bias and raw.get("mlp_bias"):
        raise ConfigError(f"mlp_bias: got {shown(raw['mlp_bias'])}, expected false for {family.name}")
    layer_types = raw.get("layer_types") or []
    if not isinstance(layer_types, list | tuple):
        raise ConfigError(f"layer_types: got {shown(layer_types)}, expected a list")
    for kind in layer_types:
        if kind != "full_attention":
            raise ConfigError(f"layer_types: got {shown(kind)}, expected full_attention in every layer; not supported")
    if raw.get("use_sliding_window") and raw.get("sliding_window", 4096) is not None and not layer_types:
        first = integer(raw, "max_window_layers", 28)
        num_layers = integer(raw, "num_hidden_layers")
        if first < num_layers:
            raise ConfigError(
                f"use_sliding_window: got true with max_window_layers {first} of {num_layers} layers, so sliding "
                "attention is in use; it is not supported"
            )


def _model(raw: Mapping[str, object], family: Family) -> ModelConfig:
    num_heads = integer(raw, "num_attention_heads")
    hidden_size = integer(raw, "hidden_size")
    if "num_key_value_heads" in raw and raw["num_key_value_heads"] is None:
        num_kv_heads = num_heads
    else:
        num_kv_heads = integer(raw, "num_key_value_heads", family.default_num_kv_heads or num_heads)
    default_head_dim = family.default_head_dim or (hidden_size // num_heads if num_heads > 0 else 0)
    max_positions = integer(raw, "max_position_embeddings", family.default_max_positions)
    attention_bias = boolean(raw, "attention_bias", False)
    eos = raw.get("eos_token_id", family.default_eos_token_id)
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    bos = raw.get("bos_token_id", family.default_bos_token_id)
    for key, ids in (("eos_token_id", eos_ids), ("bos_token_id", () if bos is None else (bos,))):
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise ConfigError(f"{key}: got {shown(raw.get(key))}, expected a token id or a list of them")
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in _STORED_DTYPES:
        raise ConfigError(f"dtype: got {shown(dtype)}, expected one of {', '.join(_STORED_DTYPES)}")
    return ModelConfig(
        family=family.name,
        vocab_size=integer(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=integer(raw, "intermediate_size"),
        num_layers=integer(raw, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=integer(raw, "head_dim", default_head_dim),
        rms_norm_eps=number(raw, "rms_norm_eps", 1e-6),
        rope=read_rope(raw, max_positions),
        tie_word_embeddings=boolean(raw, "tie_word_embeddings", False),
        max_positions=max_positions,
        dtype=dtype,
        qkv_bias=attention_bias if family.qkv_bias == "attention_bias" else True,
        o_bias=attention_bias and family.o_bias_follows_attention_bias,
        mlp_bias=boolean(raw, "mlp_bias", False),
        qk_norm=family.qk_norm,
        bos_token_id=cast("int | None", bos),
        eos_token_ids=eos_ids,
    )


def _check_sizes(model: ModelConfig) -> None:
    sizes = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.max_positions,
    }
    for key, value in sizes.items():
        if value <= 0:
            raise ConfigError(f"{key}: got {value}, expected a positive number")
    if model.num_heads % model.num_kv_heads:
        raise ConfigError(
            f"num_attention_heads {model.num_heads} is not a multiple of num_key_value_heads {model.num_kv_heads}"
        )
    if model.head_dim % 2:
        raise ConfigError(f"head_dim: got {model.head_dim}, expected an even number (rotary embedding halves it)")


def _dmtd(raw: Mapping[str, object], model: ModelConfig, *, required: bool) -> DmtdSpec | None:
    original = [key for key in _ORIGINAL_KEYS if raw.get(key) is not None]
    parallel = [key for key in _PARALLEL_KEYS if raw.get(key) is not None]
    if not (original or parallel or raw.get("mtp_horizon") is not None):
        if required:
            raise ConfigError(
                f"model_type {raw['model_type']}: num_thinking_layers, num_decoding_layers and mtp_horizon are "
                "missing; add them to config.json"
            )
        return None
    if original and parallel:
        raise ConfigError(
            f"config.json carries both {original[0]} and {parallel[0]}: the split is ambiguous; keep one set of fields"
        )
    if parallel:
        _refuse_parallel(raw)
        split = (0, integer(raw, "num_parallel_layers"), integer(raw, "num_sequential_layers"))
    else:
        encoding = integer(raw, "num_encoding_layers", 0)
        split = (encoding, integer(raw, "num_thinking_layers"), integer(raw, "num_decoding_layers"))
    origin, prompt = (raw.get(key) for key in ("cycle_origin", "prompt_input"))
    convention = _resolve_convention(None, cast("CycleOrigin | None", origin), cast("PromptInput | None", prompt))
    spec = DmtdSpec(
        encoding_layers=split[0],
        thinking_layers=split[1],
        decoding_layers=split[2],
        cycle_length=integer(raw, "mtp_horizon"),
        cycle_origin=convention[0],
        prompt_input=convention[1],
        trained=True,
        convention_recorded=convention[2],
    )
    check_dmtd(spec, model.num_layers)
    return spec


def _refuse_parallel(raw: Mapping[str, object]) -> None:
    """Block attention ``none`` with history ``real`` is the original DMTD; every other pair is Parallel DMTD."""
    for key, original in (("dmtd_block_attention", "none"), ("dmtd_history_mode", "real")):
        if raw.get(key) != original:
            raise ConfigError(
                f"{key}: got {shown(raw.get(key))}, expected {shown(original)} (the original DMTD); "
                "Parallel DMTD is not supported"
            )
