"""Paths that are no text, or may not be read: the verbs work, or name the cause."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bundles import make_bundle
from export_support import export

from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.errors import CheckpointError
from dmtd_runtime import LLM, BundleError, SamplingParams
from dmtd_runtime.bundle.manifest import load_manifest

ROOT = Path(__file__).resolve().parents[2]
ENVIRON = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("", "runtime", "models"))}
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
# Root reads everything unless these two are taken from it.
CAPABILITIES = "-dac_override,-dac_read_search"
AS_OWNER = ["setpriv", f"--bounding-set={CAPABILITIES}", f"--inh-caps={CAPABILITIES}"] if os.geteuid() == 0 else []


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("paths"))


def tokens(bundle: Path) -> list[int]:
    with LLM(bundle) as llm:
        return list(llm.generate([[1, 2, 3]], GREEDY)[0].outputs[0].token_ids)


def test_bytes_that_are_not_utf8(bundle: Path, tmp_path: Path) -> None:
    place = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(bundle, place / "bundle")
    assert tokens(place / "bundle") == tokens(bundle)
    shutil.copytree(bundle.parent / "checkpoint", place / "checkpoint")
    export(place / "checkpoint", place / "exported", decoding_layers=2)
    export(bundle.parent / "checkpoint", tmp_path / "exported", decoding_layers=2)
    assert tokens(place / "exported") == tokens(tmp_path / "exported")


def verbs(*lines: str) -> list[str]:
    """What each line says last, run one after another in one process that permission bits bind."""
    code = """
import sys
from typer.testing import CliRunner
from dmtd_export.cli.main import app
for line in sys.argv[1:]:
    done = CliRunner().invoke(app, line.split("|"))
    print(done.exit_code, done.stderr.strip().splitlines()[-1], repr(done.exception) if done.exit_code != 1 else "")
"""
    if AS_OWNER and shutil.which("setpriv") is None:
        pytest.skip("needs setpriv, or another user than root")
    command = [*AS_OWNER, sys.executable, "-c", code, *lines]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRON, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_what_may_not_be_read_is_called_so(bundle: Path, tmp_path: Path) -> None:
    for name in ("no_x", "manifest", "weights"):
        shutil.copytree(bundle, tmp_path / name)
    shutil.copytree(bundle.parent / "checkpoint", tmp_path / "model")
    closed = {
        "no_x": tmp_path / "no_x",
        "manifest": tmp_path / "manifest" / "manifest.json",
        "weights": tmp_path / "weights" / "model.onnx.data",
        "model": tmp_path / "model" / "config.json",
    }
    for path in closed.values():
        path.chmod(0o600 if path.is_dir() else 0)
    told = verbs(
        *(f"inspect|{tmp_path / name}" for name in ("no_x", "manifest")),
        *(f"generate|{tmp_path / name}|-p|x" for name in ("no_x", "manifest", "weights")),
        f"export|{tmp_path / 'model'}|-o|{tmp_path / 'new'}",
    )
    closed["no_x"].chmod(0o700)
    assert len(told) == 6
    for line in told:
        assert line.startswith("1 error: ")
        assert "ermission" in line
        assert "again" not in line
        assert " -o" not in line


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(BundleError, match="cannot be reached"):
        load_manifest(Path(name))


def test_rings_of_links(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(BundleError, match="cannot be reached: Too many levels"):
        load_manifest(tmp_path / "a")
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "a")
    (tmp_path / "c").symlink_to("gone")
    with pytest.raises(BundleError, match="is a link to gone"):
        load_manifest(tmp_path / "c")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(Path("x" * 300))


def test_a_manifest_that_is_a_pointer(bundle: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(bundle, tmp_path / "bundle")
    (copied / "model.onnx.data").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(BundleError, match="git lfs pull"):
        LLM(copied)
