"""What `dmtd evaluate --base` takes: the same model, however it was trained, quantised or stored."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_support import dmtd

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import ExportOptions
from dmtd_models.config.model import SplitOptions
from dmtd_models.reference.testing import write_tiny_checkpoint


def evaluate(*arguments: object) -> tuple[int, str]:
    """Exit code and stderr."""
    result = dmtd("evaluate", *map(str, arguments))
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"vocab_size": 300}, "got vocab_size 300, expected 259"),
        ({"layers": 4}, "got num_layers 4, expected 5"),
        ({"hidden_size": 32}, "got hidden_size 32, expected 64"),
        ({"family": "qwen2"}, "got family qwen2, expected llama"),
    ],
)
@pytest.mark.parametrize("kind", ["checkpoint", "bundle"])
def test_another_model_is_no_base(
    bundle: Path,
    data: Path,
    tmp_path: Path,
    other: dict[str, Any],
    words: str,
    kind: str,
) -> None:
    base = write_tiny_checkpoint(
        tmp_path / "checkpoint", **{"family": "llama", "layers": 5, "tokenizer": True, **other}
    )
    if kind == "bundle":
        split = SplitOptions(decoding_layers=1, cycle_length=2)
        export_bundle(base, tmp_path / kind, ExportOptions(split=split, max_num_seqs=1, verify=False))
    code, err = evaluate(bundle, "--text", data / "prose.txt", "--base", tmp_path / kind)
    assert code == 2
    assert f"error: --base: {tmp_path / kind}: {words} as in {bundle}: another model; give the one that it was" in err


def test_a_base_whose_tokenizer_reads_otherwise(
    checkpoint: Path, plain_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(plain_checkpoint, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["T"], vocabulary["h"] = vocabulary["h"], vocabulary["T"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, err = evaluate(checkpoint, "--text", data / "prose.txt", "--base", other)
    assert code == 2
    assert "its tokenizer reads" in err


def test_of_two_bundles_the_one_in_bfloat16_is_named(
    checkpoint: Path, bundle: Path, data: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    export_bundle(checkpoint, half, ExportOptions(dtype="bfloat16", max_num_seqs=1, verify=False))
    for model, base, told in ((bundle, half, f"--base: {half}"), (half, bundle, str(half))):
        code, err = evaluate(model, "--base", base, "--text", data / "prose.txt")
        assert code == (2 if "--base" in told else 1)
        assert f"error: {told}: this bundle is bfloat16, which ONNX Runtime cannot run on the CPU" in err


def test_a_name_that_leads_nowhere_is_told_before_the_libraries_are_loaded(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # so that importing it fails
    for model, base, told in ((checkpoint, tmp_path / "no", "--base: "), (tmp_path / "no", checkpoint, "")):
        code, err = evaluate(model, "--base", base, "--text", data / "prose.txt")
        assert code == (2 if told else 1)
        assert err.startswith(f"error: {told}{tmp_path / 'no'}: no such file or directory; give a bundle")
