"""Exports with a calibration text: what each matrix was rounded with, what is gained, what is recorded, what is refused."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_support import export, export_options, snapshot

torch = pytest.importorskip("torch")

from dmtd_export.bundle import calibrated  # noqa: E402
from dmtd_export.bundle.calibration import CalibrationText, read_calibration  # noqa: E402
from dmtd_export.bundle.compensation import compensated, inverse_factor  # noqa: E402
from dmtd_export.errors import ExportError  # noqa: E402
from dmtd_export.options import WeightOptions, check_options  # noqa: E402
from dmtd_export.verify import verify_bundle  # noqa: E402
from dmtd_export.verify.stored import stored_weight  # noqa: E402
from dmtd_models.checkpoints.checkpoint import open_checkpoint  # noqa: E402
from dmtd_models.config.model import SplitOptions, resolve_dmtd  # noqa: E402
from dmtd_models.data.chat import TextTokenizer  # noqa: E402
from dmtd_models.reference.dmtd import DmtdModel  # noqa: E402
from dmtd_models.reference.oracle import gates  # noqa: E402
from dmtd_models.reference.testing import write_tiny_checkpoint  # noqa: E402
from dmtd_runtime.bundle.describe import to_json  # noqa: E402
from dmtd_runtime.bundle.manifest import load_manifest  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TRAINED = {"num_encoding_layers": 1, "num_thinking_layers": 1, "num_decoding_layers": 1, "mtp_horizon": 4}
FOUR_BITS: dict[str, Any] = {"weights": "int4-symmetric", "weights_block": 16}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words in an order that repeats, of which windows have other lengths."""
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "its", "tail", "again;"]
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text("\n".join(" ".join(rng.choice(words, 12)) for _ in range(40)) + "\n")
    return file


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that records training in cycles of 4."""
    place = tmp_path_factory.mktemp("trained") / "checkpoint"
    return write_tiny_checkpoint(place, layers=3, tokenizer=True, dmtd=TRAINED, tie=True)


def read_text(checkpoint: Path, text: Path) -> CalibrationText:
    with open_checkpoint(checkpoint) as opened:
        longest = opened.config.max_positions
        tokenizer = TextTokenizer.of_checkpoint(opened)
        return read_calibration([str(text)], tokenizer, max_tokens=4096, window_len=longest)


def reference(checkpoint: Path, stored: Callable[[str], np.ndarray] | None = None) -> DmtdModel:
    with open_checkpoint(checkpoint) as opened:
        spec = resolve_dmtd(opened.config, opened.dmtd, SplitOptions())
        return DmtdModel.from_reader(opened.config, spec, stored or opened.read, torch.float32)


def run(model: DmtdModel, text: CalibrationText, *, plain: bool) -> list[np.ndarray]:
    """Logits of each sequence, one at a time."""
    found = []
    for each in text.sequences:
        count = len(each.token_ids)
        on = gates(model.spec, prompt_len=each.prompt_len, total_len=count, plain=plain)
        with torch.no_grad():
            made = model(
                torch.tensor([each.token_ids]), torch.arange(count)[None], *(torch.from_numpy(g)[None] for g in on)
            )
        found.append(made.logits[0].numpy())
    return found


def moments_of(model: DmtdModel, module: str, text: CalibrationText, *, plain: bool) -> torch.Tensor:
    """X^T X / tokens of what a module is called with."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    run(model, text, plain=plain)
    handle.remove()
    rows = torch.cat(seen)
    return rows.T @ rows / len(rows)


def test_rounding_takes_one_thread_and_gives_the_others_back(
    trained: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, before = [], torch.get_num_threads()

    def counted(*arguments, **options):
        seen.append(torch.get_num_threads())
        return compensated(*arguments, **options)

    monkeypatch.setattr(calibrated, "compensated", counted)
    torch.set_num_threads(2)
    try:
        formats = WeightOptions(weights="float", weights_late="int4-symmetric", weights_block=16)
        export(trained, tmp_path / "b", formats=formats, calibration=(str(text),))
        assert (set(seen), torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("module", ["model.layers.2.self_attn.q_proj", "model.layers.2.mlp.up_proj"])
def test_late_layers_are_rounded_with_what_heads_and_late_steps_feed_them(
    trained: Path, text: Path, tmp_path: Path, module: str
) -> None:
    """The first matrices of D: all before them are floats here, or read out of the bundle."""
    formats = WeightOptions(weights="float", weights_late="int4-symmetric", weights_block=16)
    export(trained, tmp_path / "b", formats=formats, calibration=(str(text),))
    manifest = load_manifest(tmp_path / "b")
    weight = reference(trained).get_submodule(module).weight.detach().numpy()
    stored = stored_weight(tmp_path / "b", manifest, f"{module}.weight")

    def read(name: str) -> np.ndarray:
        return np.array(stored_weight(tmp_path / "b", manifest, name))

    model, tokens = reference(trained, read), read_text(trained, text)
    same = {}
    for plain in (False, True):
        factor = inverse_factor(moments_of(model, module, tokens, plain=plain), tokens.num_tokens)
        made = compensated(weight, factor, 16, symmetric=True).dequantised()
        same[plain] = float((made == stored).mean())
    assert same[False] > 0.99 > 0.9 > same[True]  # a sum in another order may move a value to the next code


def test_what_the_model_computes_moves_less_than_without_a_text(trained: Path, text: Path, tmp_path: Path) -> None:
    tokens = read_text(trained, text)
    wanted = run(reference(trained), tokens, plain=False)
    apart = {}
    for calibration in ((), (str(text),)):
        place = tmp_path / f"b{len(calibration)}"
        export(trained, place, formats=WeightOptions(**FOUR_BITS), calibration=calibration)
        manifest = load_manifest(place)
        model = reference(trained, lambda name, at=place, of=manifest: np.array(stored_weight(at, of, name)))
        got = run(model, tokens, plain=False)
        apart[bool(calibration)] = sum(float(((a - b) ** 2).sum()) for a, b in zip(wanted, got, strict=True))
    assert apart[True] < 0.8 * apart[False]


@pytest.mark.parametrize("weights", ["int4", "int4-symmetric"])
def test_the_manifest_says_what_was_rounded_over_which_text_and_verification_holds(
    trained: Path, text: Path, tmp_path: Path, weights: Any
) -> None:
    export(trained, tmp_path / "b", formats=WeightOptions(weights=weights), calibration=(str(text),))
    manifest, tokens = load_manifest(tmp_path / "b"), read_text(trained, text)
    recorded = {"num_tokens": tokens.num_tokens, "sha256": tokens.sha256}
    assert {what: dataclasses.asdict(info) for what, info in manifest.calibration.items()} == {"weights": recorded}
    shown = to_json(manifest)
    assert shown["calibration"] == {"weights": recorded}
    assert shown["weight_formats"]["decoding"] == f"{weights} in blocks of 32, calibrated"
    assert shown["weight_formats"]["lm_head"] == (
        "int8 in blocks of 32" if weights == "int4" else "int4-symmetric in blocks of 32, calibrated"
    )
    with open_checkpoint(trained) as opened:
        report = verify_bundle(tmp_path / "b", checkpoint=opened)
    assert report.ok, report.first_divergence
    assert report.level == "oracle"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]


def test_weights_and_caches_are_measured_over_one_text(trained: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    export(trained, tmp_path / "b", formats=WeightOptions(**FOUR_BITS), calibration=(str(text),), kv="int8")
    calibration = load_manifest(tmp_path / "b").calibration
    assert set(calibration) == {"weights", "kv"} and calibration["weights"] == calibration["kv"]


def test_another_models_rows_are_told_from_rounded_ones(trained: Path, text: Path, tmp_path: Path) -> None:
    other = write_tiny_checkpoint(tmp_path / "other", layers=3, tokenizer=True, dmtd=TRAINED, tie=True, seed=1)
    formats = WeightOptions(weights="float", weights_thinking="int4")
    export(other, tmp_path / "b", formats=formats, calibration=(str(text),))
    with open_checkpoint(trained) as opened:
        report = verify_bundle(tmp_path / "b", checkpoint=opened, level="structure")
    details = [check.detail for check in report.checks if not check.ok]
    assert len(details) == 1 and details[0].startswith("35 of 35")
    with open_checkpoint(other) as opened:
        assert verify_bundle(tmp_path / "b", checkpoint=opened, level="structure").ok


def test_an_embedding_of_its_own_is_rounded_by_its_values(text: Path, tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "c", layers=2, tokenizer=True)
    made = export(source, tmp_path / "b", formats=WeightOptions(**FOUR_BITS), calibration=(str(text),))
    of = {name: fmt["source"] for name, fmt in made["quantised"].items()}
    assert of.pop("model.embed_tokens.weight") == "search"
    assert set(of.values()) == {"calibrated"} and "lm_head.weight" in of


def test_the_same_text_gives_the_same_bundle_and_another_one_another(trained: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text.read_text().replace("cat", "dog"))
    hashes = []
    for place, calibration in (("one", text), ("two", text), ("three", other)):
        export(trained, tmp_path / place, formats=WeightOptions(**FOUR_BITS), calibration=(str(calibration),))
        hashes.append(snapshot(tmp_path / place))
    assert hashes[0] == hashes[1]
    assert hashes[0]["model.onnx.data"] != hashes[2]["model.onnx.data"]


@pytest.mark.parametrize(
    "formats", [{}, {"weights": "float"}, {"weights": "keep"}, {"weights": "int8"}, {"weights_embedding": "int4"}]
)
def test_a_text_that_nothing_is_rounded_over_is_refused(formats: dict[str, Any]) -> None:
    options = export_options(formats=WeightOptions(**formats), calibration=("words.txt",))
    with pytest.raises(
        ExportError, match=r"^calibration: has no use here: got no layers or lm_head in 4 bits or int8-ch"
    ):
        check_options(options)


def test_a_text_for_caches_alone_rounds_no_embedding_and_needs_no_torch(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tiny_checkpoint(tmp_path / "c", layers=2, tokenizer=True)
    monkeypatch.setitem(sys.modules, "dmtd_export.bundle.calibrated", None)
    formats = WeightOptions(weights_embedding="int4")
    made = export(source, tmp_path / "b", formats=formats, calibration=(str(text),), kv="int8")
    assert set(made["calibration"]) == {"kv"}
    assert {name: fmt["source"] for name, fmt in made["quantised"].items()} == {"model.embed_tokens.weight": "search"}


def test_a_model_that_computes_no_numbers_is_one_line(text: Path, tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "c", layers=2, tokenizer=True, dtype="float32")
    damage(source)
    with pytest.raises(ExportError, match=r"inputs of model\.layers\.\d\.[a-z_.]+ are not finite over the calibration"):
        export(source, tmp_path / "b", formats=WeightOptions(**FOUR_BITS), calibration=(str(text),))
    assert not (tmp_path / "b").exists()


def damage(checkpoint: Path) -> None:
    """Make a norm's weight so large that what it multiplies is not finite."""
    from safetensors.numpy import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    name = "model.layers.0.post_attention_layernorm.weight"
    weights[name] = np.full_like(weights[name], 3e38)
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
