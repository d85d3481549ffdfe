"""tools/peers: a bundle measured, an engine that cannot be as a row that says why, and the Q4_0 file it makes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import gguf
import numpy as np
import pytest
from bundles import make_bundle
from gguf_files import tiny_config, write_gguf

from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.reference.testing import random_weights

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A GGUF with one matrix of Q4_1 blocks, and its values."""
    config = tiny_config("llama")
    weights = random_weights(config, seed=2)
    q4_1 = gguf.GGMLQuantizationType.Q4_1
    raw = gguf.quants.quantize(weights[NAME], q4_1)
    path = write_gguf(
        tmp_path_factory.mktemp("peers") / "tiny.gguf",
        config,
        weights,
        stored={NAME: (raw, "Q4_1")},
        quantise={2: "F16"},
    )
    return path, gguf.quants.dequantize(raw, q4_1)


def peers(repo_root, *arguments):
    command = [sys.executable, str(repo_root / "tools" / "peers"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_rows_of_what_ran_and_of_what_could_not(repo_root: Path, tmp_path: Path, model) -> None:
    bundle = make_bundle(tmp_path)
    sizes = ("--prompt-len", 8, "--max-tokens", 10, "--batch", 2, "--repeats", 2, "--warmup", 0, "--threads", 1)
    done = peers(repo_root, model[0], bundle, *sizes, "--only", "ours,mistral.rs", "--directory", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["batch"], found["threads"]) == (2, 1)
    plain, dmtd, other = found["rows"]
    assert (plain["name"], dmtd["name"]) == ("dmtd bundle, plain", "dmtd bundle, DMTD")
    for row in (plain, dmtd):
        assert (row["body"], row["lm_head"], row["problem"]) == ("float32", "float32", None)
        assert len(row["runs"]) == 2 * 2, "as many behind each of two starts"
        assert row["decode_tok_per_s"] == pytest.approx(2 * 9 / median(run["decode_s"] for run in row["runs"]))
        assert row["file_bytes"] == sum(file.stat().st_size for file in bundle.iterdir())
        assert row["private_bytes"] > 1e6
        assert row["over_best_peer"] is None, "no other engine ran"
    assert other["problem"] == "its driver runs one sequence at a time"
    assert (other["body"], other["lm_head"]) == ("Q4_0", "F16")


def test_the_file_in_q4_0_has_the_values_that_gguf_rounds_to(
    repo_root: Path, tmp_path: Path, model, monkeypatch
) -> None:
    monkeypatch.syspath_prepend(str(repo_root / "tools"))
    from peers_setup import q4_0_file

    path, values = model
    made = q4_0_file(path, tmp_path)
    q4_0 = gguf.GGMLQuantizationType.Q4_0
    with open_checkpoint(path) as before, open_checkpoint(made) as after:
        assert after.config == before.config
        for name in before.names():
            expected = gguf.quants.dequantize(gguf.quants.quantize(values, q4_0), q4_0)
            np.testing.assert_array_equal(after.read(name), expected if name == NAME else before.read(name))
    assert q4_0_file(path, tmp_path) == made
    assert [file.name for file in tmp_path.iterdir()] == [made.name]


def test_what_is_not_there_is_one_line(repo_root: Path, tmp_path: Path) -> None:
    done = peers(repo_root, tmp_path / "none.gguf", tmp_path)
    assert done.returncode == 2
    assert "none.gguf: no such file; give a GGUF" in done.stderr
