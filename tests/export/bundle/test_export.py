"""What an export writes: exactly the files and records that its options and its checkpoint ask for."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from export_support import export, export_options, read_manifest, snapshot

from dmtd_export.bundle.export import export_bundle
from dmtd_export.errors import ExportError
from dmtd_export.options import ExportOptions, WeightOptions
from dmtd_models.config.model import SplitOptions
from dmtd_models.errors import ModelError
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
CHOICE = {"choose_token.onnx", "sample_token.onnx"}  # of every target: the token choice on a device
STANDARD = {"full_pass.onnx", "thinking.onnx", "late_decode.onnx"}
ORT = {"full_pass.ort.onnx", "thinking.ort.onnx", "late_decode.ort.onnx", "cycle.ort.onnx"}
PACKED = ("full_pass", "thinking", "cycle")
ORT_BATCH = {f"{graph}.ort.batch{slots}.onnx" for graph in PACKED for slots in (2, 4, 8)}
ALWAYS = {"manifest.json", "model.onnx.data", "polygraphy_data.py", "config.json"}
ORIGINAL = {"num_encoding_layers": 1, "num_thinking_layers": 1, "num_decoding_layers": 2, "mtp_horizon": 3}
LATER = {
    "num_parallel_layers": 3,
    "num_sequential_layers": 1,
    "mtp_horizon": 4,
    "mask_token_id": 5,
    "dmtd_history_mode": "real",
    "dmtd_block_attention": "none",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("plain") / "m", tie=True, tokenizer=True)


@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        ({}, STANDARD | ORT | ORT_BATCH),
        ({"target": "all", "max_num_seqs": 8}, STANDARD | ORT | ORT_BATCH),
        ({"target": "onnxruntime", "max_num_seqs": 8}, ORT | ORT_BATCH),
        ({"target": "tensorrt"}, STANDARD),
        ({"target": "onnxruntime", "max_num_seqs": 1}, ORT),
        # The cycle graph is for the CPU, which computes in float32.
        ({"target": "onnxruntime", "max_num_seqs": 1, "dtype": "bfloat16"}, ORT - {"cycle.ort.onnx"}),
        (
            {"target": "onnxruntime", "max_num_seqs": 3},
            ORT | {f"{graph}.ort.batch{slots}.onnx" for graph in PACKED for slots in (2, 3)},
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) or "default" if isinstance(value, dict) else "",
)
def test_targets_write_exactly_their_graphs(plain: Path, tmp_path: Path, options: dict, graphs: set[str]) -> None:
    export_bundle(
        plain, tmp_path / "b", ExportOptions(split=SplitOptions(decoding_layers=1, cycle_length=3), **options)
    )
    manifest = read_manifest(tmp_path / "b")
    assert {graph["file"] for graph in manifest["graphs"]} == graphs | CHOICE
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {path.name for path in (tmp_path / "b").iterdir()} == ALWAYS | tokenizer | graphs | CHOICE
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_manifest_says_exactly_what_stands_there(plain: Path, tmp_path: Path) -> None:
    manifest = export(plain, tmp_path / "b", max_num_seqs=2)
    assert manifest["schema"] == 3
    listed = {name: info["sha256"] for name, info in manifest["files"].items()}
    found = snapshot(tmp_path / "b")
    del found["manifest.json"]
    assert listed == found
    for name, info in manifest["files"].items():
        assert info["bytes"] == (tmp_path / "b" / name).stat().st_size
    assert manifest["verification"] == {}
    assert manifest["tools"]["onnx"] == onnx.__version__
    assert manifest["model"] == {
        "family": "qwen3",
        "vocab_size": 259,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "dtype": "float32",
        "kv_dtype": "float32",
        "max_model_len": 256,
        "max_window": 256,
        "bos_token_id": 256,
        "eos_token_ids": [258],
    }
    kinds = {onnx.TensorProto.INT64: "int64", onnx.TensorProto.INT32: "int32", onnx.TensorProto.BOOL: "bool"}
    kinds[onnx.TensorProto.FLOAT] = "float32"
    for graph in manifest["graphs"]:
        model = onnx.load(tmp_path / "b" / graph["file"], load_external_data=False)
        for side in ("inputs", "outputs"):
            declared = model.graph.input if side == "inputs" else model.graph.output
            contract = [
                {
                    "name": value.name,
                    "dims": [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
                    "dtype": kinds[value.type.tensor_type.elem_type],
                }
                for value in declared
            ]
            assert contract == graph[side], (graph["file"], side)


def test_same_export_twice_gives_the_same_bytes(plain: Path, tmp_path: Path) -> None:
    export(plain, tmp_path / "one")
    export(plain, tmp_path / "two")
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


@pytest.mark.parametrize(
    ("options", "split"),
    [
        ({"decoding_layers": 1, "cycle_length": 3}, (0, 3, 1, 3, "prompt", "thinking")),
        ({"decoding_layers": 2, "cycle_length": 1, "encoding_layers": 1}, (1, 1, 2, 1, "prompt", "thinking")),
        ({"decoding_layers": 1, "cycle_length": 2, "thinking_layers": 3}, (0, 3, 1, 2, "prompt", "thinking")),
        ({"decoding_layers": 1, "cycle_length": 4, "cycle_origin": "absolute"}, (0, 3, 1, 4, "absolute", "cyclical")),
        ({"decoding_layers": 1, "cycle_length": 4, "prompt_input": "sum"}, (0, 3, 1, 4, "prompt", "sum")),
    ],
    ids=str,
)
def test_split_by_option_over_a_plain_checkpoint(plain: Path, tmp_path: Path, options: dict, split: tuple) -> None:
    cycle = export(plain, tmp_path / "b", **options)["cycle"]
    assert tuple(cycle.values()) == (*split, False, None)


@pytest.mark.parametrize(
    ("fields", "options", "split"),
    [
        (ORIGINAL, {}, (1, 1, 2, 3, "prompt", "thinking")),
        (ORIGINAL | {"cycle_origin": "absolute", "prompt_input": "cyclical"}, {}, (1, 1, 2, 3, "absolute", "cyclical")),
        (ORIGINAL, {"cycle_length": 2, "cycle_origin": "absolute"}, (1, 1, 2, 2, "absolute", "cyclical")),
        (ORIGINAL, {"encoding_layers": 0}, (0, 2, 2, 3, "prompt", "thinking")),
        (LATER, {}, (0, 3, 1, 4, "prompt", "thinking")),
    ],
    ids=["mtpqwen3", "mtpqwen3-recorded", "mtpqwen3-cycle-given", "mtpqwen3-split-given", "dmtdqwen3"],
)
def test_recorded_split_with_options_over_it(tmp_path: Path, fields: dict, options: dict, split: tuple) -> None:
    source = write_tiny_checkpoint(tmp_path / "m", dmtd=fields)
    export_bundle(source, tmp_path / "b", export_options(max_num_seqs=1, **options))
    manifest = read_manifest(tmp_path / "b")
    # Another split or cycle than the weights were trained for counts as not trained.
    as_recorded = not {"encoding_layers", "cycle_length"} & set(options)
    *given, trained_for = manifest["cycle"].values()
    assert tuple(given) == (*split, as_recorded)
    assert trained_for == (None if as_recorded else "E1 T1 D2 in cycles of 3 (origin prompt, prompt input thinking)")
    layers = {graph["name"]: _cache_layers(graph) for graph in manifest["graphs"] if graph["dialect"] == "standard"}
    e, t, d = split[:3]
    assert layers["full_pass"] == set(range(4))
    assert layers["thinking"] == set(range(e + t))
    assert layers["late_decode"] == set(range(e)) | set(range(e + t, e + t + d))


def test_max_model_len_bounds_the_bundle_and_its_rotary_tables(plain: Path, tmp_path: Path) -> None:
    manifest = export(plain, tmp_path / "b", max_model_len=20)
    assert manifest["model"]["max_model_len"] == 20
    assert manifest["weights"]["rotary.cos"]["shape"] == [20 + 256, 8]
    with LLM(tmp_path / "b", threads=1) as llm:
        assert llm.max_model_len == 20
        assert len(llm.generate([list(range(19))], GREEDY)[0].outputs[0].token_ids) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_model_len": 257}, "max_model_len: got 257, expected 2 to 256"),
        ({"max_model_len": 0}, "max_model_len: got 0"),
        ({"max_num_seqs": 0}, "max_num_seqs: got 0, expected 1 to 64"),
        ({"max_num_seqs": 65}, "max_num_seqs: got 65"),
        ({"cycle_length": 257}, "cycle_length: got 257, expected 1 to 256"),
        ({"cycle_length": 0}, "cycle_length: got 0"),
        ({"decoding_layers": 4}, "encoding 0 + thinking 0 + decoding 4"),
        ({"decoding_layers": 2, "thinking_layers": 3}, "encoding 0 + thinking 3 + decoding 2 = 5 layers"),
        ({"cycle_origin": "prompt", "prompt_input": "cyclical"}, "prompt + prompt input cyclical"),
    ],
)
def test_impossible_options_write_nothing(plain: Path, tmp_path: Path, options: dict, words: str) -> None:
    with pytest.raises((ExportError, ModelError)) as caught:
        export(plain, tmp_path / "b", **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_complete_dmtd_checkpoint_exports_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fields = ORIGINAL | {"cycle_origin": "prompt", "prompt_input": "sum"}
    source = write_tiny_checkpoint(tmp_path / "m", dmtd=fields, tokenizer=True)
    with caplog.at_level(logging.WARNING, "dmtd"):
        export(source, tmp_path / "b")
    assert caplog.messages == []


def test_sharding_and_stored_type_make_no_difference(tmp_path: Path) -> None:
    manifests = []
    for name, kind in {"one": {}, "three": {"shards": 3}}.items():
        source = write_tiny_checkpoint(tmp_path / f"m-{name}", dtype="float16", **kind)
        export(source, tmp_path / name)
        manifests.append(read_manifest(tmp_path / name)["files"]["model.onnx.data"])
    assert manifests[0] == manifests[1]


def test_all_ways_to_run_a_bundle_give_the_same_tokens(plain: Path, tmp_path: Path) -> None:
    export(plain, tmp_path / "b", max_num_seqs=2)
    told = set()
    for dialect in ("standard", "onnxruntime"):
        for full_pass in ("staged", "fused"):
            with LLM(tmp_path / "b", dialect=dialect, full_pass=full_pass, threads=1) as llm:
                told.add(tuple(llm.generate([[5, 6, 7, 8, 9]], GREEDY)[0].outputs[0].token_ids))
    assert len(told) == 1 and len(told.pop()) == 6


def test_verify_hook_sees_the_bundle_and_its_record_is_kept(plain: Path, tmp_path: Path) -> None:
    seen = {}

    def hook(bundle: Path, checkpoint: object) -> dict[str, object]:
        seen["files"] = {path.name for path in bundle.iterdir()}
        seen["manifest"] = read_manifest(bundle)
        assert not (tmp_path / "b").exists(), "it is not in its place before it has been verified"
        return {"ok": True, "level": "none"}

    options = ExportOptions(split=SplitOptions(decoding_layers=1, cycle_length=3), max_num_seqs=1)
    export_bundle(plain, tmp_path / "b", options, verify=hook)
    assert seen["files"] == {path.name for path in (tmp_path / "b").iterdir()}
    assert read_manifest(tmp_path / "b") == seen["manifest"] | {"verification": {"ok": True, "level": "none"}}


def test_progress_counts_every_byte_of_the_weights(plain: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    options = ExportOptions(split=SplitOptions(decoding_layers=1, cycle_length=3), max_num_seqs=1)
    export_bundle(
        plain, tmp_path / "b", options, progress=lambda *each: told.append(each), verify=lambda bundle, checkpoint: {}
    )
    size = sum(info["length"] for info in read_manifest(tmp_path / "b")["weights"].values())
    counts = [done for stage, done, total in told if stage == "weights" and total == size]
    assert counts[0] == 0 and counts[-1] == size and counts == sorted(counts)
    assert list(dict.fromkeys(stage for stage, _, _ in told)) == ["weights", "graphs", "verify"]


def test_export_needs_no_torch_and_prints_nothing(plain: Path, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnxruntime'): sys.modules[name] = None\n"
        "from pathlib import Path\n"
        "from dmtd_export.bundle.export import export_bundle\n"
        "from dmtd_export.options import ExportOptions\n"
        "from dmtd_models.config.model import SplitOptions\n"
        "split = SplitOptions(decoding_layers=1, cycle_length=3)\n"
        "export_bundle(Path(sys.argv[1]), Path(sys.argv[2]), ExportOptions(split=split))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, plain, tmp_path / "b"],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": ":".join(path for path in sys.path if path), "PATH": ""},
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    export(plain, tmp_path / "here", max_num_seqs=8)
    assert snapshot(tmp_path / "b") == snapshot(tmp_path / "here")


def _cache_layers(graph: dict) -> set[int]:
    return {int(item["name"].split(".")[1]) for item in graph["inputs"] if item["name"].startswith("past_key_values.")}


def test_another_convention_than_the_recorded_one_counts_as_not_trained(tmp_path: Path) -> None:
    recorded = ORIGINAL | {"cycle_origin": "absolute", "prompt_input": "cyclical"}
    source = write_tiny_checkpoint(tmp_path / "m", dmtd=recorded)
    for origin, trained in (("absolute", True), ("prompt", False)):
        export_bundle(
            source,
            tmp_path / origin,
            ExportOptions(
                split=SplitOptions(cycle_origin=origin, prompt_input=None if trained else "thinking"), max_num_seqs=1
            ),
        )
        assert read_manifest(tmp_path / origin)["cycle"]["dmtd_trained"] is trained


def test_a_head_that_onnxruntime_refuses_is_named_with_the_way_out(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "m", head_dim=24)
    with pytest.raises(ExportError, match=r"head_dim: got 24.*--target tensorrt"):
        export_bundle(source, tmp_path / "b", ExportOptions(split=SplitOptions(decoding_layers=1, cycle_length=3)))
    assert not (tmp_path / "b").exists()
    export_bundle(
        source, tmp_path / "b", ExportOptions(split=SplitOptions(decoding_layers=1, cycle_length=3), target="tensorrt")
    )


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"kv": "int8"}, "--kv int8"),
        ({"formats": WeightOptions(weights_thinking="int8-channel")}, "int8-channel"),
        ({"kv": "int8", "formats": WeightOptions(weights="int8-channel")}, "--kv int8 and int8-channel"),
    ],
)
def test_the_way_out_of_a_head_is_none_that_is_refused_too(tmp_path: Path, given: dict[str, Any], named: str) -> None:
    source = write_tiny_checkpoint(tmp_path / "m", head_dim=24)
    split = SplitOptions(decoding_layers=1, cycle_length=3)
    options = ExportOptions(split=split, calibration=("text.txt",), **given)
    with pytest.raises(
        ExportError, match=f"head_dim: got 24, .*; leave out {named}, which .* and use --target tensorrt"
    ):
        export_bundle(source, tmp_path / "b", options)


def test_a_factor_that_the_reference_ignores_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What DeepSeek-R1-0528-Qwen3-8B publishes: transformers takes 1 + 0.1 ln 4, vLLM 0.878 times that, which is 1."""
    source = write_tiny_checkpoint(tmp_path / "m", layers=2, max_positions=256)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config["rope_scaling"] = scaling | {"attn_factor": 0.8782488562869419, "finetuned": True}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with caplog.at_level(logging.WARNING, "dmtd"):
        options = ExportOptions(split=SplitOptions(decoding_layers=1, cycle_length=2), target="tensorrt")
        export_bundle(source, tmp_path / "b", options)
    [line] = [line for line in caplog.messages if "attn_factor" in line]
    assert line.endswith("for that, say attention_factor 1 in config.json instead")


def test_large_rotary_tables_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_tiny_checkpoint(tmp_path / "model", max_positions=1000)
    export(source, tmp_path / "quiet")
    assert "rotary tables" not in caplog.text
    monkeypatch.setattr("dmtd_export.bundle.export.LARGE_TABLES_BYTES", 50_000)
    export(source, tmp_path / "told")
    rows = read_manifest(tmp_path / "told")["weights"]["rotary.cos"]["shape"][0]
    assert f"rotary tables of 1000 positions take {2 * rows * 8 * 4 / 1e9:.2f} GB" in caplog.text
    caplog.clear()
    export(source, tmp_path / "short", max_model_len=100)
    assert "rotary tables" not in caplog.text
