"""Bad input from Python, as a table: what is wrong, what is called, the error and its words. All files stay what they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import Damage, config, cut, edit, flip, nothing, remove
from export_support import PLAIN, export, export_options, snapshot

from dmtd_export.bundle.export import export_bundle
from dmtd_export.errors import ExportError
from dmtd_models.errors import CheckpointError, ConfigError
from dmtd_runtime import LLM, BackendError, BundleError, RequestError, SamplingParams

LIBRARY: list[tuple[str, Damage, Callable[[], object], type[Exception], str]] = [
    ("no checkpoint", remove("m"), lambda: _export(), CheckpointError, "no such file or directory"),
    ("cut checkpoint", cut("m/model.safetensors", 50000), lambda: _export(), CheckpointError, "truncated: got 50000"),
    ("architecture", config(model_type="gemma2"), lambda: _export(), ConfigError, 'model_type: got "gemma2"'),
    ("split", nothing, lambda: _export(thinking_layers=1), ConfigError, "= 2 layers"),
    ("target", nothing, lambda: _export("m"), ExportError, "exists and is not a bundle"),
    ("no bundle", remove("b"), lambda: LLM("b"), BundleError, "b does not exist"),
    ("newer", edit("b/manifest.json", lambda m: m.update(schema=99)), lambda: LLM("b"), BundleError, "schema 99"),
    ("cut weights", cut("b/model.onnx.data", 9), lambda: LLM("b"), BundleError, "has 9 bytes, the manifest says"),
    ("altered weights", flip("b/model.onnx.data", 9000), lambda: LLM("b"), BundleError, "altered; export the bundle"),
    ("empty list", nothing, lambda: _ask([]), RequestError, "prompts: got an empty list"),
    ("empty ids", nothing, lambda: _ask([[]]), RequestError, "prompt: got no tokens"),
    ("id too large", nothing, lambda: _ask([[259]]), RequestError, "token id 259, expected integers from 0 to 258"),
    ("id no integer", nothing, lambda: _ask([[1.5]]), RequestError, "token id 1.5"),
    ("too long", nothing, lambda: _ask([[1] * 256]), RequestError, "got 256 tokens, expected at most 255"),
    (
        "a dict",
        nothing,
        lambda: _ask([[1], [2]], {"max_tokens": 3}),
        RequestError,
        "params: got dict, expected SamplingParams",
    ),
    ("lengths", nothing, lambda: _ask([[1], [2]], [SamplingParams()]), RequestError, "params: got 1 for 2 prompts"),
    ("time", nothing, lambda: _ask([[1]], timeout_s=0), RequestError, "timeout_s: got 0"),
    ("stop id", nothing, lambda: _ask([[1]], SamplingParams(stop_token_ids=[259])), RequestError, "stop_token_ids"),
    ("model length", nothing, lambda: LLM("b", max_model_len=257), RequestError, "max_model_len: got 257"),
    (
        "batch",
        nothing,
        lambda: LLM("b", max_num_seqs=2),
        RequestError,
        "exported for; for more sequences at a time export it again: dmtd export ... --max-num-seqs 2",
    ),
    ("no dialect", nothing, lambda: _half_only(), BackendError, "bfloat16, which ONNX Runtime cannot run on the CPU"),
    ("contradiction", nothing, lambda: SamplingParams(min_tokens=5, max_tokens=2), RequestError, "min_tokens: got 5"),
    ("greedy n", nothing, lambda: SamplingParams(n=2, temperature=0), RequestError, "n: got 2 with temperature 0"),
]


def _export(output: str = "new", **options: Any) -> None:
    given = export_options(**{**PLAIN, **options})
    export_bundle(Path("m"), Path(output), given)


def _ask(prompts: Any, params: Any = None, **options: Any) -> None:
    with LLM("b", threads=1) as llm:
        llm.generate(prompts, params, **options)


def _half_only() -> None:
    export(Path("m"), Path("../half"), dtype="bfloat16")
    LLM("../half")


@pytest.mark.parametrize("row", LIBRARY, ids=[row[0] for row in LIBRARY])
def test_library(row: tuple[str, Damage, Callable[[], object], type[Exception], str], place: Path) -> None:
    _, damage, action, error, words = row
    damage()
    before = snapshot(place)
    with pytest.raises(error) as caught:
        action()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert snapshot(place) == before
