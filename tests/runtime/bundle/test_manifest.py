"""Reading a manifest: whatever is wrong with it is one line that names the file, the place and the fix."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runtime_support import TinyBundles

from dmtd_runtime import BundleError
from dmtd_runtime.bundle.manifest import Manifest, load_manifest, safe_relative

ABSENT = object()
AGAIN = "export the bundle again"


@pytest.fixture(scope="module")
def good(tiny: TinyBundles) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((tiny.get().directory / "manifest.json").read_text())
    return raw


def load(directory: Path, content: Any) -> Manifest:
    text = content if isinstance(content, str) else json.dumps(content)
    (directory / "manifest.json").write_text(text)
    return load_manifest(directory)


def changed(good: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """A copy with the value at a dotted place replaced, or removed."""
    raw = deepcopy(good)
    *path, last = [int(part) if part.isdigit() else part for part in place.split("/")]
    at: Any = raw
    for part in path:
        at = at[part]
    if value is ABSENT:
        del at[last]
    else:
        at[last] = value
    return raw


def test_a_manifest_survives_writing_and_reading(tiny: TinyBundles, tmp_path: Path) -> None:
    manifest = tiny.get().manifest
    assert load(tmp_path, manifest.to_json()) == manifest
    assert manifest.cycle.encoding_range == range(0)
    assert manifest.cycle.thinking_range == range(3)
    assert manifest.cycle.decoding_range == range(3, 5)


def test_unknown_keys_of_the_same_schema_are_ignored(good: dict[str, Any], tmp_path: Path) -> None:
    assert load(tmp_path, {**good, "from_the_future": [1]}).schema == good["schema"]


def test_graph_says_what_the_bundle_has_instead(tiny: TinyBundles) -> None:
    manifest = tiny.get().manifest
    assert manifest.graph("thinking", "onnxruntime", 8).file == "thinking.ort.batch8.onnx"
    with pytest.raises(BundleError, match=r"for 3 slots, only .*thinking.ort.onnx.*--target onnxruntime"):
        manifest.graph("thinking", "onnxruntime", 3)


MALFORMED = [
    ("schema", ABSENT, "no integer 'schema'"),
    ("schema", "1", "no integer 'schema'"),
    ("schema", None, "no integer 'schema'"),
    ("schema", True, "has schema True, expected 2 or later: another version of dmtd made it"),
    ("schema", 4, "has schema 4, this version reads up to 3; upgrade with: pip install -U dmtd"),
    ("model", ABSENT, "manifest lacks model"),
    ("model", [], "manifest.model is a list, expected an object"),
    ("model/vocab_size", ABSENT, "manifest.model lacks vocab_size"),
    ("model/vocab_size", "259", 'manifest.model.vocab_size is "259", expected an integer'),
    ("model/vocab_size", 259.0, "manifest.model.vocab_size is 259.0, expected an integer"),
    ("model/vocab_size", True, "manifest.model.vocab_size is true, expected an integer"),
    ("model/tie_word_embeddings", 0, "manifest.model.tie_word_embeddings is 0, expected true or false"),
    ("model/dtype", "float64", 'manifest.model.dtype is "float64", expected one of float32, float16, bfloat16'),
    ("model/dtype", ["float32"], "manifest.model.dtype is .*expected one of"),
    (
        "model/kv_dtype",
        "int4",
        'manifest.model.kv_dtype is "int4", expected one of float32, float16, bfloat16, int8, null;',
    ),
    ("model/kv_dtype", "float16", "model.kv_dtype is float16 in a model of float32"),
    ("model/kv_dtype", "int8", "key_cache.scale is missing, expected float32 .* for caches in int8"),
    ("model/bos_token_id", "x", 'manifest.model.bos_token_id is "x", expected an integer or null'),
    ("model/eos_token_ids", 258, "manifest.model.eos_token_ids is a number, expected a list"),
    ("model/eos_token_ids", [258, "x"], r'manifest.model.eos_token_ids\[1\] is "x", expected an integer'),
    ("cycle", ABSENT, "manifest lacks cycle"),
    ("cycle/cycle_origin", "start", 'manifest.cycle.cycle_origin is "start", expected one of absolute, prompt'),
    ("cycle/prompt_input", None, "manifest.cycle.prompt_input is null, expected one of"),
    ("cycle/cycle_length", 0, "with cycle length 0 does not fit"),
    ("cycle/cycle_length", 5, "cycle.ort.onnx has . steps, but the cycle length is 5"),
    ("cycle/thinking_layers", 4, "split E0 T4 D2 .* does not fit 5 layers"),
    ("cycle/thinking_layers", 0, "does not fit"),
    ("cycle/encoding_layers", -1, "split E-1 T3 D2"),
    ("cycle/trained_for", "\x1b[2J", "cycle.trained_for is .*, expected words"),
    ("graphs", {}, "manifest.graphs is an object, expected a list"),
    ("graphs/0/name", "prefill", r'manifest.graphs\[0\].name is "prefill", expected one of full_pass'),
    (
        "graphs/0/inputs/0/dims",
        [1, None],
        r"manifest.graphs\[0\].inputs\[0\].dims\[1\] is null, expected an integer or text",
    ),
    ("graphs/0/inputs/0/dims", [True], r"dims\[0\] is true, expected an integer or text"),
    ("graphs/0/file", "other.onnx", "graph file other.onnx is not in the list of files"),
    ("weights", [], "manifest.weights is a list, expected an object"),
    ("weights/lm_head.weight/offset", "0", 'manifest.weights.lm_head.weight.offset is "0", expected an integer'),
    ("weights/lm_head.weight/norm", "big", 'manifest.weights.lm_head.weight.norm is "big", expected a number'),
    ("weights/lm_head.weight/norm", float("nan"), "manifest.weights.lm_head.weight.norm is NaN, expected a number"),
    ("weights/lm_head.weight/probe", float("inf"), "lm_head.weight.probe is Infinity, expected a number"),
    ("files", None, "manifest.files is null, expected an object"),
    ("files/config.json", 7, "manifest.files.config.json is a number, expected an object"),
    ("files/config.json/bytes", ABSENT, "manifest.files.config.json lacks bytes"),
    ("files/config.json/sha256", 0, "manifest.files.config.json.sha256 is 0, expected text"),
    ("tools/dmtd", 1, "manifest.tools.dmtd is 1, expected text"),
    ("verification", "ok", "manifest.verification is text, expected an object"),
]


@pytest.mark.parametrize(("place", "value", "words"), MALFORMED, ids=[f"{m[0]}-{i}" for i, m in enumerate(MALFORMED)])
def test_malformed_manifests(good: dict[str, Any], tmp_path: Path, place: str, value: Any, words: str) -> None:
    with pytest.raises(BundleError, match=words) as caught:
        load(tmp_path, changed(good, place, value))
    message = str(caught.value)
    assert "\n" not in message
    assert str(tmp_path / "manifest.json") in message
    assert any(fix in message for fix in (AGAIN, "pip install -U dmtd", "it is not a DMTD bundle's manifest"))


@pytest.mark.parametrize(
    ("version", "fix"),
    [("9.0.0", "upgrade with: pip install -U dmtd"), ("0.1.0", AGAIN), ("0.0.10", AGAIN), ("", AGAIN), (None, AGAIN)],
)
def test_what_a_newer_version_wrote_and_this_one_cannot_read_is_no_fault_of_the_bundle(
    good: dict[str, Any], tmp_path: Path, version: object, fix: str
) -> None:
    good = {**good, "tools": {"dmtd": version}}
    for place, value in (("model/kv_dtype", "int4"), ("weights/lm_head.weight/dtype", "float4")):
        with pytest.raises(BundleError, match=f"; {fix}$"):
            load(tmp_path, changed(good, place, value))


@pytest.mark.parametrize("content", ["", "{", "[1, 2", "nothing", '{"schema": 1', "\x00"])
def test_what_is_not_json(tmp_path: Path, content: str) -> None:
    with pytest.raises(BundleError, match=r"manifest.json cannot be read as JSON \(.*\); export the bundle again"):
        load(tmp_path, content)


def test_what_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b'{"schema": "\xff"}')
    with pytest.raises(BundleError, match="cannot be read as JSON"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("content", ["[]", "1", '"schema"', "null"])
def test_json_that_is_no_manifest(tmp_path: Path, content: str) -> None:
    with pytest.raises(BundleError, match="it is not a DMTD bundle's manifest"):
        load(tmp_path, content)


def test_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no manifest.json, so it is not a bundle; make one with: dmtd export"):
        load_manifest(tmp_path)
    with pytest.raises(BundleError, match=r"does not exist; make a bundle with: dmtd export MODEL -o /.*/absent$"):
        load_manifest(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(
        BundleError, match=r"is a file, so it is not a bundle; make a bundle with: dmtd export MODEL -o OUT$"
    ):
        load_manifest(tmp_path / "file")


LEAVING = ["../secret", "/etc/passwd", "a/../../b", "..", ".", "", "a\\..\\b", "C:\\x", "a\0b", "graphs/../../x"]


@pytest.mark.parametrize("name", LEAVING)
def test_paths_that_leave_the_bundle(good: dict[str, Any], tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match="do not use this bundle") as caught:
        safe_relative(name)
    assert "\n" not in str(caught.value)
    entry = good["files"]["config.json"]
    with pytest.raises(BundleError, match="expected a path inside the bundle"):
        load(tmp_path, {**good, "files": {**good["files"], name: entry}})


@pytest.mark.parametrize("name", ["model.onnx", "sub/model.onnx", "..model", "a..b"])
def test_paths_inside_the_bundle(name: str) -> None:
    assert str(safe_relative(name)) == name


def test_check_files_tells_how_much_it_hashed(tiny: TinyBundles) -> None:
    bundle = tiny.get()
    counted: list[int] = []
    bundle.manifest.check_files(bundle.directory, hashes=True, on_bytes=counted.append)
    files = [path for path in bundle.directory.iterdir() if path.is_file()]  # others may have built engines beside them
    assert sum(counted) == sum(path.stat().st_size for path in files if path.name != "manifest.json")
    unlisted = replace(bundle.manifest, files={})
    with pytest.raises(BundleError, match=r"tokenizer\.json is not in the manifest's list"):
        unlisted.check_files(bundle.directory, hashes=True)


@pytest.mark.parametrize("schema", [1, 0, -1])
def test_an_earlier_schema_is_refused(tmp_path: Path, schema: int) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"schema": schema}))
    with pytest.raises(
        BundleError, match="expected 2 or later: another version of dmtd made it; export the bundle again"
    ):
        load_manifest(tmp_path)


def test_json_nested_too_deeply_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[" * 200_000)
    with pytest.raises(BundleError, match="cannot be read as JSON"):
        load_manifest(tmp_path)


def test_dimensions_below_one_are_refused(tiny: TinyBundles, tmp_path: Path) -> None:
    raw = json.loads((tiny.get().directory / "manifest.json").read_text())
    raw["model"]["num_heads"] = 0
    (tmp_path / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(BundleError, match=r"model\.num_heads is 0"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    ("section", "field", "value", "words"),
    [
        ("model", "max_model_len", 2560, "rotary.cos has .* rows, expected max_model_len"),
        ("model", "max_window", 100, "max_window is 100, expected at least 256"),
        ("cycle", "cycle_length", 400, "expected at least 256 and the cycle length 400"),
    ],
)
def test_lengths_that_do_not_fit_one_another_are_refused(
    good: dict[str, Any], tmp_path: Path, section: str, field: str, value: int, words: str
) -> None:
    with pytest.raises(BundleError, match=words):
        load(tmp_path, good | {section: good[section] | {field: value}})


def test_a_cycle_graph_in_the_standard_dialect_is_refused(good: dict[str, Any], tmp_path: Path) -> None:
    good = deepcopy(good)
    one = next(graph for graph in good["graphs"] if graph["dialect"] == "standard")
    good["files"]["cycle.onnx"] = good["files"][one["file"]]
    one |= {"name": "cycle", "file": "cycle.onnx"}
    with pytest.raises(BundleError, match=r"cycle\.onnx is a cycle graph in the standard dialect, which has none"):
        load(tmp_path, good)


def test_a_manifest_without_graphs_or_rotary_tables_is_refused(good: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="lists no graphs"):
        load(tmp_path, good | {"graphs": []})
    weights = {name: info for name, info in good["weights"].items() if name != "rotary.sin"}
    with pytest.raises(BundleError, match=r"rotary\.sin has 0 rows"):
        load(tmp_path, good | {"weights": weights})
