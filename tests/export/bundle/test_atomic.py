"""A bundle appears whole or not at all, whatever ends the export; what stood there before survives bit for bit."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from export_support import assert_whole, export, snapshot

from dmtd_export.bundle import atomic
from dmtd_export.bundle.atomic import atomic_directory
from dmtd_export.bundle.export import export_bundle
from dmtd_export.errors import ExportError
from dmtd_export.options import ExportOptions
from dmtd_models.config.model import SplitOptions

OPTIONS = ExportOptions(split=SplitOptions(decoding_layers=1, cycle_length=3), max_num_seqs=1)
# Exports its checkpoints into the target, in turn, as often as asked; Ctrl-C ends it as it ends the command line.
CHILD = """
import sys
from pathlib import Path
from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import ExportOptions
from dmtd_models.config.model import SplitOptions
target, times, *sources = sys.argv[1:]
print("ready", flush=True)
try:
    for i in range(int(times)):
        options = ExportOptions(split=SplitOptions(decoding_layers=1, cycle_length=3), max_num_seqs=1)
        export_bundle(Path(sources[i % len(sources)]), Path(target), options)
except KeyboardInterrupt:
    sys.exit(130)
"""


def start(target: Path, *sources: Path, times: int = 10_000) -> subprocess.Popen[str]:
    """A child that has done its imports and begins to export."""
    path = os.pathsep.join(path for path in sys.path if path)
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", CHILD, target, str(times), *sources],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.mark.parametrize(
    "kind",
    [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],  # Ctrl-C in any stage: below
    ids=["SIGKILL", "SIGINT"],
)
def test_killed_at_any_moment(
    kind: signal.Signals, target: Path, sources: list[Path], weights_of: dict[str, str]
) -> None:
    rng = random.Random(int(kind))
    for _ in range(5):
        child = start(target, *sources)
        time.sleep(rng.uniform(0.0, 0.2))
        child.send_signal(kind)
        _, errors = child.communicate(timeout=300)
        assert child.returncode == (-signal.SIGKILL if kind == signal.SIGKILL else 130), errors
        assert_whole(target, weights_of)
    export(sources[1], target)
    assert_whole(target, weights_of)
    assert [path.name for path in target.parent.iterdir()] == ["b"], "the next export removes what was left"


def test_killed_before_the_first_bundle_leaves_none(tmp_path: Path, sources: list[Path]) -> None:
    script = (
        "import dmtd_export.bundle.export as e, os, signal, sys\n"
        "from pathlib import Path\n"
        "from dmtd_models.config.model import SplitOptions\n"
        "e.build_graph = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)\n"
        "split = SplitOptions(decoding_layers=1, cycle_length=3)\n"
        "e.export_bundle(Path(sys.argv[1]), Path(sys.argv[2]), e.ExportOptions(split=split))\n"
    )
    path = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(  # the weights are written, the graphs are not
        [sys.executable, "-c", script, sources[0], tmp_path / "b"],
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    [leftover] = tmp_path.iterdir()
    assert leftover.name.startswith(".b.partial-") and any(leftover.rglob("model.onnx.data"))
    export(sources[0], tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def raise_no_space(*arguments: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def raise_interrupt(*arguments: object, **options: object) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)  # the handler raises before this ends


def raise_bug(*arguments: object, **options: object) -> None:
    raise RuntimeError("bug")


@pytest.mark.parametrize("stage", ["build_graph", "write_weights", "write_assets", "sha256_of", "verify"])
@pytest.mark.parametrize(
    ("fail", "error"),
    [(raise_no_space, ExportError), (raise_interrupt, KeyboardInterrupt), (raise_bug, RuntimeError)],
    ids=["no space", "Ctrl-C", "bug"],
)
def test_failing_in_any_stage_keeps_the_old_bundle(
    stage: str,
    fail: Callable[..., None],
    error: type[BaseException],
    target: Path,
    sources: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = snapshot(target)
    if stage != "verify":
        monkeypatch.setattr(f"dmtd_export.bundle.export.{stage}", fail)
    with pytest.raises(error) as caught:
        export_bundle(sources[1], target, OPTIONS, verify=fail)
    if error is ExportError:
        assert str(caught.value) == (
            f"no space left while writing {target}: free some and export again; nothing was kept"
        )
    assert snapshot(target.parent) == {f"b/{name}": digest for name, digest in before.items()}
    assert [path.name for path in target.parent.iterdir()] == ["b"]


def test_failing_in_the_middle_of_the_weights(target: Path, sources: list[Path]) -> None:
    before, told = snapshot(target), []

    def progress(stage: str, done: int, total: int) -> None:
        told.append(done)
        if len(told) == 20:
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(ExportError, match=r"Input/output error; .*nothing was kept"):
        export_bundle(sources[1], target, OPTIONS, progress=progress)
    assert snapshot(target) == before
    assert [path.name for path in target.parent.iterdir()] == ["b"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.2 MB, where this user may mount one."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", place], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk(small_disk: Path, tmp_path: Path, sources: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    export(sources[0], tmp_path / "fits")
    shutil.copytree(tmp_path / "fits", small_disk / "b")
    before = snapshot(small_disk)
    with pytest.raises(ExportError, match=r"small has 0\.00 GB free, the bundle needs 0\.07 GB; free some space"):
        export(sources[1], small_disk / "b")
    monkeypatch.setattr("dmtd_export.bundle.export.check_disk", lambda output, needed_bytes: None)
    with pytest.raises(ExportError, match="no space left while writing"):
        export(sources[1], small_disk / "b")
    assert snapshot(small_disk) == before
    assert [path.name for path in small_disk.iterdir()] == ["b"]


def test_several_exports_into_one_target_at_a_time(
    tmp_path: Path, sources: list[Path], weights_of: dict[str, str]
) -> None:
    children = [start(tmp_path / "b", source, times=5) for source in sources]
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
    assert_whole(tmp_path / "b", weights_of)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_work_of_a_live_export_is_left_alone(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "b") as first:
        (first / "a").write_text("first")
        with atomic_directory(tmp_path / "b") as second:
            (second / "a").write_text("second")
        assert (tmp_path / "b/a").read_text() == "second"
        assert (first / "a").read_text() == "first"
    assert (tmp_path / "b/a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_other_directories_are_not_taken_for_leftovers(tmp_path: Path) -> None:
    for name in (".b.partialish", ".bb.partial-x", "b.partial-1"):
        (tmp_path / name).mkdir()
    (tmp_path / ".b.partial-file").write_text("a file is not a work directory")
    with atomic_directory(tmp_path / "b"):
        pass
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("name", ["b[1]", "b*", "b b", "ü"])
def test_leftovers_of_odd_names_are_found(tmp_path: Path, name: str) -> None:
    (tmp_path / f".{name}.partial-dead").mkdir()
    with atomic_directory(tmp_path / name):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [name]


class TestWithoutExchange:
    """File systems that cannot swap two directories in one call."""

    @pytest.fixture(autouse=True)
    def _no_exchange(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)

    def test_ctrl_c_between_the_two_renames_keeps_the_old_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = tmp_path / "bundle"
        target.mkdir()
        (target / "old").write_text("old")
        rename = Path.rename

        def interrupted(self: Path, other: Path) -> Path:
            if self.name == atomic.NEW:
                raise KeyboardInterrupt
            return rename(self, other)

        monkeypatch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt), atomic.atomic_directory(target) as work:
            (work / "new").write_text("new")
        assert [path.name for path in target.iterdir()] == ["old"]
        assert [path.name for path in tmp_path.iterdir()] == ["bundle"]

    def test_replaces(self, target: Path, sources: list[Path]) -> None:
        old = snapshot(target)
        export(sources[1], target)
        assert snapshot(target)["model.onnx.data"] != old["model.onnx.data"]
        assert [path.name for path in target.parent.iterdir()] == ["b"]

    def test_a_failed_second_rename_is_undone(self, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before, rename = snapshot(target), Path.rename

        def failing(self: Path, other: Path) -> Path:
            if self.name == "new":
                raise OSError(errno.EIO, "Input/output error")
            return rename(self, other)

        monkeypatch.setattr(Path, "rename", failing)
        with pytest.raises(OSError, match="Input/output"), atomic_directory(target):
            pass
        assert snapshot(target) == before

    def test_killed_between_the_renames_the_old_bundle_comes_back(self, target: Path) -> None:
        before = snapshot(target)
        work = target.parent / ".b.partial-dead"
        (work / "new").mkdir(parents=True)
        target.rename(work / "old")
        with pytest.raises(RuntimeError, match="fails"), atomic_directory(target):
            raise RuntimeError("fails as well")
        assert snapshot(target) == before
        assert [path.name for path in target.parent.iterdir()] == ["b"]


def test_a_symbolic_link_stays_and_its_directory_is_replaced(target: Path, sources: list[Path], tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(target)
    old = snapshot(target)
    export(sources[1], link)
    assert link.is_symlink() and link.readlink() == target
    assert snapshot(target)["model.onnx.data"] != old["model.onnx.data"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "place"]
    assert [path.name for path in target.parent.iterdir()] == ["b"]


def test_bundles_have_ordinary_permissions(target: Path) -> None:
    ordinary = target.parent / "ordinary"
    ordinary.mkdir()
    assert target.stat().st_mode == ordinary.stat().st_mode
