"""What an export may replace at its output, what it leaves alone, and what it says where it cannot write."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from export_support import assert_whole, export, snapshot

from dmtd_export.errors import ExportError


def _a_file(target: Path) -> None:
    shutil.rmtree(target)
    target.write_text("mine")


def _not_a_bundle(target: Path) -> None:
    (target / "manifest.json").unlink()


def _foreign_manifest(target: Path) -> None:
    (target / "manifest.json").write_text('{"name": "a web application", "icons": []}')


def _damaged_manifest(target: Path) -> None:
    (target / "manifest.json").write_text("{")


def _own_files_inside(target: Path) -> None:
    (target / "checkpoint").mkdir()
    (target / "checkpoint/model.safetensors").write_text("mine")
    (target / "notes.txt").write_text("mine")


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (_a_file, "is a file; name a directory"),
        (_not_a_bundle, "exists and is not a bundle; name another directory"),
        (_foreign_manifest, "exists and is not a bundle; name another directory"),
        (_damaged_manifest, "exists and is not a bundle; name another directory"),
        (_own_files_inside, "holds checkpoint and 1 more besides its bundle"),
    ],
)
def test_what_is_not_a_bundle_is_not_replaced(
    prepare: Callable[[Path], None], words: str, target: Path, sources: list[Path]
) -> None:
    prepare(target)
    before = snapshot(target.parent)
    with pytest.raises(ExportError, match=words) as caught:
        export(sources[1], target)
    assert "\n" not in str(caught.value)
    assert snapshot(target.parent) == before
    assert [path.name for path in target.parent.iterdir()] == ["b"]


def test_an_empty_directory_and_an_older_bundle_used_by_polygraphy_are_replaced(
    target: Path, sources: list[Path], tmp_path: Path, weights_of: dict[str, str]
) -> None:
    (tmp_path / "empty").mkdir()
    (target / "__pycache__").mkdir()
    for place in (tmp_path / "empty", target):
        export(sources[1], place)
        assert_whole(place, weights_of)


def test_engines_go_with_the_bundle_that_they_were_built_from(
    target: Path, sources: list[Path], weights_of: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    (target / "engines/any-simulator-1-0123").mkdir(parents=True)
    (target / "engines/any-simulator-1-0123/engine.json").write_text("{}")
    (target / "engines/.any-simulator-1-4567.partial-abcd").mkdir()
    (target / "engines/mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="holds engines besides its bundle"):
        export(sources[1], target)
    (target / "engines/mine.txt").unlink()
    export(sources[1], target)
    assert_whole(target, weights_of)
    assert not (target / "engines").exists()
    [line] = [record.getMessage() for record in caplog.records if "go with it" in record.getMessage()]
    assert line == (
        f"{target}/engines: the engines of the bundle that is replaced go with it, they fit no other (any-simulator-1-0123); "
        f"build new ones afterwards with: dmtd build {target}"
    )


def test_the_build_command_may_be_pasted_whatever_the_path(
    sources: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "my bundle"
    export(sources[1], place)
    (place / "engines/any-simulator-1-0123").mkdir(parents=True)
    (place / "engines/any-simulator-1-0123/engine.json").write_text("{}")
    export(sources[1], place)
    [line] = [record.getMessage() for record in caplog.records if "go with it" in record.getMessage()]
    assert shlex.split(line.rpartition("with: ")[2]) == ["dmtd", "build", str(place)]


def test_a_parent_that_is_a_file(tmp_path: Path, sources: list[Path]) -> None:
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file/b", tmp_path / "file/deeper/b"):
        with pytest.raises(ExportError, match="nothing was kept") as caught:
            export(sources[0], output)
        assert str(tmp_path / "file") in str(caught.value) and "\n" not in str(caught.value)


def test_a_parent_that_may_not_be_written() -> None:
    """Said before the checkpoint is read: there is none."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "parent").mkdir()
        (place / "parent").chmod(0o555)
        place.chmod(0o755)
        script = (
            "import os, sys\nfrom pathlib import Path\n"
            "from dmtd_export.bundle.export import ExportError, export_bundle\nfrom dmtd_export.options import ExportOptions\n"
            "from dmtd_models.config.model import SplitOptions\n"
            "if os.getuid() == 0: os.setgid(65534); os.setuid(65534)\n"
            "split = SplitOptions(decoding_layers=1, cycle_length=3)\n"
            "try: export_bundle(Path('no-model'), Path('parent/b'), ExportOptions(split=split))\n"
            "except ExportError as error: sys.exit(str(error))\n"
        )
        path = os.pathsep.join(str(Path(path).absolute()) for path in sys.path if path)
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=place,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1, done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
        [line] = done.stderr.splitlines()
        assert "Permission denied; mend that, or name another directory with -o; nothing was kept" in line
        assert not list((place / "parent").iterdir())
