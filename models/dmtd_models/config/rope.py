"""The rotary embedding's rule and parameters, read from config.json. No torch; ``reference.rope`` computes the tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

from dmtd_errors.words import shown
from dmtd_models.config.values import boolean, integer, number, positive
from dmtd_models.errors import ConfigError

RopeKind = Literal["default", "linear", "llama3", "yarn"]

_COMMON_ROPE_KEYS = ("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings")
_ROPE_KEYS = frozenset(
    (
        *_COMMON_ROPE_KEYS,
        *("partial_rotary_factor", "low_freq_factor", "high_freq_factor"),
        *("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
        # What transformers, the reference of these families, reads from no config.
        *("attn_factor", "finetuned"),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary embedding: base and the scaling rule with its parameters (those that ``kind`` does not use are None)."""

    theta: float
    kind: RopeKind = "default"
    factor: float | None = None
    original_max_positions: int | None = None
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None  # llama3
    beta_fast: float | None = None  # yarn
    beta_slow: float | None = None  # yarn
    attention_factor: float | None = None  # yarn: multiplies cos and sin
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn


def read_rope(raw: Mapping[str, object], max_positions: int) -> Rope:
    """Translate ``rope_theta`` with ``rope_scaling``, or ``rope_parameters``, of a config.json.

    Raises:
        ConfigError: a rule or a parameter that is not supported, or two places that disagree.
    """
    scaling, parameters = raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}
    for key, value in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key}: got {shown(value)}, expected an object")
    scaling, parameters = cast(Mapping[str, object], scaling), cast(Mapping[str, object], parameters)
    for key in sorted(scaling.keys() & parameters.keys()):
        if scaling[key] != parameters[key]:
            raise ConfigError(
                f"{key}: rope_scaling says {shown(scaling[key])}, rope_parameters {shown(parameters[key])}"
            )
    rope = {**parameters, **scaling}
    theta_outside = raw.get("rope_theta")
    if theta_outside is not None and rope.setdefault("rope_theta", theta_outside) != theta_outside:
        raise ConfigError(
            f"rope_theta: got {shown(theta_outside)} and, in the rope parameters, {shown(rope['rope_theta'])}"
        )
    for key in sorted(rope.keys() - _ROPE_KEYS):
        raise ConfigError(f"rope parameter {key}: got {shown(rope[key])}; this parameter is not supported")
    if number(rope, "partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"partial_rotary_factor: got {shown(rope['partial_rotary_factor'])}, expected 1; not supported"
        )
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in get_args(RopeKind):
        raise ConfigError(f"rope_type: got {shown(kind)}, expected one of {', '.join(get_args(RopeKind))}")
    theta = number(rope, "rope_theta", 10000.0)
    if theta <= 0:
        raise ConfigError(f"rope_theta: got {theta}, expected a positive number")
    return _rope_of_kind(cast(RopeKind, kind), theta, rope, raw, max_positions)


def ignored_factor(raw: Mapping[str, object], rope: Rope) -> str | None:
    """A line about ``attn_factor``, which other runtimes multiply yarn's factor by; None where that makes no difference."""
    places = (raw.get("rope_scaling"), raw.get("rope_parameters"))
    given = next((place["attn_factor"] for place in places if isinstance(place, Mapping) and "attn_factor" in place), 1)
    if rope.kind != "yarn" or not isinstance(given, int | float) or given == 1:
        return None
    product = given * yarn_factor(rope.factor or 1.0)
    return (
        f"rope parameter attn_factor: got {shown(given)}, ignored as transformers does; vLLM multiplies by it: "
        f"for that, say attention_factor {product:.6g} in config.json instead"
    )


def yarn_factor(factor: float, mscale: float = 1.0) -> float:
    """What yarn multiplies cos and sin by, where no parameter says otherwise."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _rope_of_kind(
    kind: RopeKind, theta: float, rope: Mapping[str, object], raw: Mapping[str, object], max_positions: int
) -> Rope:
    """Only the parameters that ``kind`` reads are kept, so that equal ropes compare equal."""
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, kind=kind, factor=positive(rope, "factor"))
    outside = raw.get("original_max_position_embeddings")
    source = raw if outside is not None else rope
    original = integer(source, "original_max_position_embeddings", max_positions)
    if original <= 0:
        raise ConfigError(f"original_max_position_embeddings: got {original}, expected a positive number")
    if kind == "llama3":
        low, high = positive(rope, "low_freq_factor"), positive(rope, "high_freq_factor")
        if high <= low:
            raise ConfigError(f"rope parameter high_freq_factor: got {high}, expected more than low_freq_factor {low}")
        return Rope(
            theta=theta,
            kind=kind,
            factor=positive(rope, "factor"),
            original_max_positions=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    factor = positive(rope, "factor") if rope.get("factor") is not None else max_positions / original
    optional = {
        key: None if rope.get(key) is None else number(rope, key)
        for key in ("attention_factor", "mscale", "mscale_all_dim")
    }
    return Rope(
        theta=theta,
        kind=kind,
        factor=factor,
        original_max_positions=original,
        beta_fast=number(rope, "beta_fast", 0.0) or 32.0,
        beta_slow=number(rope, "beta_slow", 0.0) or 1.0,
        attention_factor=optional["attention_factor"],
        mscale=optional["mscale"],
        mscale_all_dim=optional["mscale_all_dim"],
        truncate=boolean(rope, "truncate", True),
    )
