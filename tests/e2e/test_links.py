"""Bundles whose files are links: what counts is the bytes, in every verb."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from bundles import make_checkpoint
from typer.testing import CliRunner

from dmtd_export.bundle.export import export_bundle
from dmtd_export.cli.main import app
from dmtd_export.options import ExportOptions, SplitOptions
from dmtd_export.verify import verify_bundle
from dmtd_export.verify.graph_runs import open_evaluator
from dmtd_runtime import LLM, BundleError, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
WEIGHTS = "model.onnx.data"


def hub_cache(bundle: Path, place: Path) -> Path:
    """snapshots/REVISION with links to blobs/HASH."""
    (place / "blobs").mkdir()
    (place / "snapshots" / "0").mkdir(parents=True)
    for number, file in enumerate(sorted(bundle.iterdir())):
        shutil.copyfile(file, place / "blobs" / f"{number:040x}")
        (place / "snapshots" / "0" / file.name).symlink_to(f"../../blobs/{number:040x}")
    return place / "snapshots" / "0"


def weights_elsewhere(bundle: Path, place: Path) -> Path:
    """The one large file on another disk, under another name."""
    shutil.copytree(bundle, place / "bundle")
    (place / "disk").mkdir()
    (place / "bundle" / WEIGHTS).rename(place / "disk" / "weights")
    (place / "bundle" / WEIGHTS).symlink_to(place / "disk" / "weights")
    return place / "bundle"


def graphs_elsewhere(bundle: Path, place: Path) -> Path:
    shutil.copytree(bundle, place / "bundle")
    (place / "graphs").mkdir()
    for graph in (place / "bundle").glob("*.onnx"):
        graph.rename(place / "graphs" / graph.name)
        graph.symlink_to(place / "graphs" / graph.name)
    return place / "bundle"


def hard_links(bundle: Path, place: Path) -> Path:
    """What cp -l makes."""
    shutil.copytree(bundle, place / "copy")
    shutil.copytree(place / "copy", place / "bundle", copy_function=os.link)
    return place / "bundle"


def linked_directory(bundle: Path, place: Path) -> Path:
    (place / "bundle").symlink_to(bundle)
    return place / "bundle"


LAYOUTS = (hub_cache, weights_elsewhere, graphs_elsewhere, hard_links, linked_directory)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """E0 T1 D1 of float16, with both dialects."""
    place = tmp_path_factory.mktemp("plain")
    options = ExportOptions(split=SplitOptions(decoding_layers=2, cycle_length=3), max_num_seqs=1, dtype="float16")
    export_bundle(make_checkpoint(place / "checkpoint"), place / "bundle", options)
    return place / "bundle"


def tokens(bundle: Path, **options: object) -> list[int]:
    with LLM(bundle, **options) as llm:  # type: ignore[arg-type]
        return list(llm.generate([[1, 2, 3]], GREEDY)[0].outputs[0].token_ids)


@pytest.fixture(scope="module")
def expected(bundle: Path) -> list[int]:
    return tokens(bundle)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_the_same_tokens(
    layout: Callable[[Path, Path], Path], bundle: Path, expected: list[int], tmp_path: Path
) -> None:
    linked = layout(bundle, tmp_path)
    assert tokens(linked) == expected
    assert tokens(linked, dialect="standard", full_pass="fused", plain=True) == tokens(
        bundle, dialect="standard", full_pass="fused", plain=True
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_a_changed_byte_is_found_and_nothing_else(
    layout: Callable[[Path, Path], Path], bundle: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(bundle, tmp_path / "own")
    linked = layout(copied, tmp_path)
    assert verify_bundle(linked, level="structure").ok
    at = linked.resolve() / WEIGHTS
    with at.resolve().open("r+b") as file:
        file.seek(4096)
        old = file.read(1)
        file.seek(4096)
        file.write(bytes([old[0] ^ 1]))
    report = verify_bundle(linked, level="structure")
    assert not report.ok
    assert WEIGHTS in str(report.first_divergence)


def test_all_graphs_are_run_over_what_links_lead_to(bundle: Path, tmp_path: Path) -> None:
    report = verify_bundle(weights_elsewhere(bundle, tmp_path), level="graphs", quick=True)
    assert report.ok, report.first_divergence


def test_the_evaluator_reads_what_links_lead_to(bundle: Path, tmp_path: Path) -> None:
    import numpy as np

    feed = {"logits": np.arange(10, dtype=np.float32).reshape(1, 1, 10)}
    session = open_evaluator(hub_cache(bundle, tmp_path) / "choose_token.onnx")
    assert session.run(["token_ids"], feed)[0].tolist() == [[9]]
    open_evaluator(weights_elsewhere(bundle, tmp_path) / "thinking.onnx")


def test_engines_of_the_simulator_behind_links_say_so(bundle: Path, tmp_path: Path) -> None:
    own = shutil.copytree(bundle, tmp_path / "own")
    built = CliRunner().invoke(app, ["build", str(own), "--backend", "simulator", "--no-verify"])
    assert built.exit_code == 0, built.output
    before = tokens(own, backend="simulator")
    (engines,) = (own / "engines").iterdir()
    (engines / WEIGHTS).rename(tmp_path / "weights")
    (engines / WEIGHTS).symlink_to(tmp_path / "weights")
    with pytest.raises(BundleError, match="links") as caught:
        tokens(own, backend="simulator")
    assert "cp -rL" in str(caught.value)
    assert len(before) == 8
