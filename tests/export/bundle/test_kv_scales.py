"""Scales of int8 caches: what is measured, where it stands in a bundle, and what is refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_support import dmtd, one_json
from export_support import stored_tensor

from dmtd_export.bundle.calibration import read_calibration
from dmtd_export.bundle.export import export_bundle
from dmtd_export.bundle.kv_scales import HEADROOM, largest_values, scales_of
from dmtd_export.bundle.polygraphy_data import feed
from dmtd_export.cli.main import main
from dmtd_export.engines.options import BuildOptions
from dmtd_export.engines.run import preview
from dmtd_export.errors import ExportError
from dmtd_export.options import ExportOptions, WeightOptions, check_options
from dmtd_export.verify.graph_runs import open_onnxruntime
from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.config.model import SplitOptions, resolve_dmtd
from dmtd_models.data.chat import TextTokenizer
from dmtd_models.reference.dmtd import DmtdModel
from dmtd_models.reference.layers import rotate
from dmtd_models.reference.oracle import gates
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime.bundle.manifest import load_manifest
from dmtd_runtime.errors import BundleError

LAYERS, KV_HEADS, WIDTH = 5, 2, 16
SPLIT = SplitOptions(encoding_layers=1, decoding_layers=2, cycle_length=3)
TEXT = "Pack my box with five dozen liquor jugs. " * 30


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scales")
    (root / "text.txt").write_text(TEXT)
    return write_tiny_checkpoint(root / "model", family="llama", layers=LAYERS, tokenizer=True)


def int8_options(checkpoint: Path, **given: object) -> ExportOptions:
    calibration = (str(checkpoint.parent / "text.txt"),)
    return ExportOptions(**{"split": SPLIT, "max_num_seqs": 2, "kv": "int8", "calibration": calibration, **given})


TURNS = 10000.0 ** -np.arange(0, 1, 2 / WIDTH)


@pytest.mark.parametrize("positions", [64, 1024])
def test_no_key_grows_beyond_its_scale_at_any_position(positions: int) -> None:
    """Keys that stood at the first 50 positions, put at every other one; and what none of them reaches is given to none."""
    rng = np.random.default_rng(0)
    keys, values = (rng.standard_normal((KV_HEADS, 50, WIDTH)).astype(np.float32) for _ in range(2))
    largest = largest_values(np.stack([turned(keys, np.arange(50)), values]), TURNS, positions)
    assert np.array_equal(largest[1], np.abs(values).max(axis=1))
    reached = np.zeros_like(largest[0])
    for position in range(positions):
        reached = np.maximum(reached, np.abs(turned(keys, np.full(50, position))).max(axis=1))
    assert (reached <= largest[0] * (1 + 1e-4)).all()
    np.testing.assert_allclose(reached, largest[0], rtol=0.07)  # a fast pair passes its peak between two positions


def turned(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Keys [kv_heads, rows, width] without positions, at these of their rows."""
    angles = torch.from_numpy((positions[:, None] * TURNS)[None])
    found: np.ndarray = rotate(torch.from_numpy(keys)[None].double(), angles.cos(), angles.sin())[0].numpy()
    return found.astype(np.float32)


def test_a_channel_that_was_never_used_has_a_scale_that_divides() -> None:
    largest = np.zeros((2, KV_HEADS, WIDTH), np.float32)
    largest[0, 0, 0] = 12.7
    scales = scales_of(largest)
    assert scales[0, 0, 0] == pytest.approx(HEADROOM * 0.1)
    assert (scales > 0).all() and np.isfinite(1 / scales).all()


def test_scales_are_those_of_the_reference_over_the_text_in_cycles_and_plain(checkpoint: Path, tmp_path: Path) -> None:
    manifest = export_bundle(checkpoint, tmp_path / "bundle", int8_options(checkpoint))
    raw = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert (raw["model"]["dtype"], raw["model"]["kv_dtype"], raw["quantised"]) == ("float32", "int8", {})
    assert raw["schema"] == 3, "versions before it know no int8 caches"
    with open_checkpoint(checkpoint) as source:
        spec = resolve_dmtd(source.config, source.dmtd, SPLIT)
        model = DmtdModel.from_reader(source.config, spec, source.read, torch.float64)
        text = read_calibration(
            (str(checkpoint.parent / "text.txt"),),
            TextTokenizer.of_checkpoint(source),
            max_tokens=16384,
            window_len=256,
        )
    assert raw["calibration"]["kv"] == {"num_tokens": text.num_tokens, "sha256": text.sha256}
    largest = np.zeros((2 * LAYERS, KV_HEADS, WIDTH))
    for sequence in text.sequences:
        for plain in (False, True):
            count = len(sequence.token_ids)
            pair = gates(spec, prompt_len=sequence.prompt_len, total_len=count, plain=plain)
            ids, positions = torch.tensor([sequence.token_ids]), torch.arange(count)[None]
            with torch.no_grad():
                run = model(ids, positions, *(torch.from_numpy(gate)[None] for gate in pair))
            for layer in range(LAYERS):
                key, value = run.keys[layer][0].numpy(), run.values[layer][0].numpy()
                largest[2 * layer] = np.maximum(largest[2 * layer], reached_by(key))
                largest[2 * layer + 1] = np.maximum(largest[2 * layer + 1], np.abs(value).max(axis=1))
    for layer in range(LAYERS):
        for kind, wanted in zip(("key", "value"), largest[2 * layer :], strict=False):
            name = f"model.layers.{layer}.self_attn.{kind}_cache.scale"
            np.testing.assert_allclose(
                stored_tensor(tmp_path / "bundle", raw, name), wanted.reshape(-1) * HEADROOM / 127, rtol=1e-2
            )
            graphs = [graph.file for graph in manifest.graphs if name in graph.weights]
            assert graphs, f"no graph reads {name}"


def reached_by(keys: np.ndarray) -> np.ndarray:
    """The largest value of a channel, [kv_heads, width], of keys [kv_heads, rows, width] from position 0 on, by trying finely."""
    back, found = turned(keys, -np.arange(keys.shape[1])), np.zeros((KV_HEADS, WIDTH))
    for position in np.arange(0, 255.01, 0.25):
        found = np.maximum(found, np.abs(turned(back, np.full(keys.shape[1], position))).max(axis=1))
    return found


def test_the_same_export_twice_is_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    made = [export_bundle(checkpoint, tmp_path / name, int8_options(checkpoint)) for name in ("one", "two")]
    assert made[0].files["model.onnx.data"] == made[1].files["model.onnx.data"]
    assert made[0].files.keys() == made[1].files.keys() and "thinking.ort.batch2.onnx" in made[0].files


def test_a_bundle_of_before_has_caches_of_its_type(checkpoint: Path, tmp_path: Path) -> None:
    export_bundle(checkpoint, tmp_path / "bundle", ExportOptions(split=SPLIT, max_num_seqs=1))
    raw = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert raw["model"].pop("kv_dtype") == "float32"
    (tmp_path / "bundle" / "manifest.json").write_text(json.dumps(raw))
    assert load_manifest(tmp_path / "bundle").model.cache_dtype == "float32"


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"num_tokens": -5}, "calibration.kv is -5 tokens of SHA-256"),
        ({"num_tokens": 0}, "expected at least 1 and 64 hexadecimal digits"),
        ({"sha256": "none"}, 'SHA-256 "none", expected'),
    ],
)
def test_a_calibration_that_cannot_have_been_is_refused(
    checkpoint: Path, tmp_path: Path, entry: dict[str, object], words: str
) -> None:
    export_bundle(checkpoint, tmp_path / "bundle", int8_options(checkpoint))
    raw = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    raw["calibration"]["kv"] |= entry
    (tmp_path / "bundle" / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(BundleError, match=words):
        load_manifest(tmp_path / "bundle")


REFUSED = [
    ({"kv": "int8"}, "kv: got int8 and no text to measure scales over; give one: --calibration FILE"),
    ({"calibration": ("text.txt",)}, "calibration: has no use here: got no layers or lm_head in 4 bits"),
    ({"kv": "float16"}, "kv: got float16, expected int8 or float32, .* would cast a float16 cache whole in every step"),
    (
        {"kv": "float32", "dtype": "float16"},
        "kv: got float32, expected int8 or float16, the bundle's --dtype; leave it",
    ),
    ({"kv": "int8", "dtype": "float16"}, "kv: got int8 with --dtype float16, expected float32"),
    (
        {"kv": "int8", "target": "all"},
        "kv: got int8 with --target all, expected onnxruntime: standard graphs and engines",
    ),
]


@pytest.mark.parametrize(("given", "words"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_what_no_graph_has_is_refused_before_anything_is_read(given: dict[str, object], words: str) -> None:
    with pytest.raises(ExportError, match=words) as refused:
        check_options(ExportOptions(**given))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kv", [None, "float16"])
def test_the_models_own_type_is_what_half_precision_says(kv: str | None) -> None:
    options = ExportOptions(dtype="float16", kv=kv)
    check_options(options)
    assert (options.kv_dtype, options.graphs_for) == ("float16", "all")


def test_a_wrong_option_exits_with_2_and_names_it(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "export",
        str(checkpoint),
        "-o",
        str(tmp_path / "bundle"),
        "--decoding-layers",
        "2",
        "--cycle-length",
        "3",
    ]
    for words, said in (
        (["--kv", "int8"], "--kv: got int8 and no text"),
        (["--kv", "int8", "--calibration", str(tmp_path / "none.txt")], "--calibration: "),
        (["--calibration", str(checkpoint.parent / "text.txt")], "--calibration: has no use"),
        (
            ["--kv", "int8", "--calibration", str(checkpoint.parent / "text.txt"), "--max-model-len", "8"],
            "--max-model-len: got 8, expected 16 or more with --calibration",
        ),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*command, *words])
        told = capsys.readouterr().err.strip().splitlines()
        assert ended.value.code == 2
        assert said in told[-1] and not (tmp_path / "bundle").exists()


def test_without_a_tokenizer_token_ids_calibrate_and_text_does_not(tmp_path: Path) -> None:
    bare = write_tiny_checkpoint(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(
        ExportError, match=r"calibration: tokenizer: .*: no tokenizer\.json.* or give records of prompt_ids"
    ):
        export_bundle(bare, tmp_path / "bundle", int8_options(bare))
    ids = [index * index % 128 for index in range(300)]
    (tmp_path / "ids.jsonl").write_text(json.dumps({"prompt_ids": ids[:9], "answer_ids": ids[9:]}))
    split = SplitOptions(decoding_layers=1, cycle_length=3)
    options = int8_options(bare, split=split, calibration=(str(tmp_path / "ids.jsonl"),))
    taken = ids[:256]  # as many as the model takes
    sha256 = hashlib.sha256(np.array([len(taken), 9, *taken], "<i8").tobytes()).hexdigest()
    found = export_bundle(bare, tmp_path / "bundle", options).calibration["kv"]
    assert asdict(found) == {"num_tokens": 256, "sha256": sha256}


def test_no_engines_over_int8_caches(checkpoint: Path, tmp_path: Path) -> None:
    formats = WeightOptions(weights="int8")
    export_bundle(checkpoint, tmp_path / "bundle", int8_options(checkpoint, formats=formats))
    with pytest.raises(
        ExportError, match="this bundle's caches are int8, which no engine takes; export it without --kv"
    ):
        preview(tmp_path / "bundle", BuildOptions(backend="simulator"))


def test_the_command_exports_and_verifies(checkpoint: Path, tmp_path: Path) -> None:
    words = ["--decoding-layers", "2", "--cycle-length", "3", "--max-num-seqs", "2", "--kv", "int8", "--calibration"]
    made = dmtd(
        "export", str(checkpoint), "-o", str(tmp_path / "b"), *words, str(checkpoint.parent / "text.txt"), "--json"
    )
    told = one_json(made)
    assert (told["dtype"], told["kv_dtype"], told["verification"]["level"]) == ("float32", "int8", "oracle")
    assert not [name for name in told["files"] if name in ("thinking.onnx", "late_decode.onnx", "full_pass.onnx")]


def test_inputs_for_trying_a_graph_by_hand_fit(checkpoint: Path, tmp_path: Path) -> None:
    manifest = export_bundle(checkpoint, tmp_path / "bundle", int8_options(checkpoint))
    for graph in manifest.decoder_graphs:
        made = feed(json.loads(manifest.to_json()), json.loads(json.dumps(asdict(graph))))
        session = open_onnxruntime(tmp_path / "bundle" / graph.file)
        outputs = session.run([info.name for info in graph.outputs], made)
        assert all(np.isfinite(output).all() for output in outputs)
        assert any(output.dtype == np.int8 and output.any() for output in outputs)
