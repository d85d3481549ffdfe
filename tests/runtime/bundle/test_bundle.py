"""Opening a bundle: missing, truncated and altered files; hashes once for every state of the files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from runtime_support import TinyBundles

from dmtd_runtime import LLM, BundleError
from dmtd_runtime.bundle import records
from dmtd_runtime.bundle.opening import cache_directory, open_bundle, read_generation_config

FILES = ["model.onnx.data", "thinking.ort.onnx", "late_decode.onnx", "tokenizer.json", "config.json"]


@pytest.fixture
def copy(tiny: TinyBundles, tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return Path(shutil.copytree(tiny.get().directory, tmp_path / "bundle"))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the files hashed from here on, over an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names: list[str] = []
    sha256_of = records.sha256_of

    def counting(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
        names.append(path.name)
        return sha256_of(path, on_bytes)

    monkeypatch.setattr(records, "sha256_of", counting)
    return names


def alter(path: Path) -> None:
    """Another byte in the middle, the same size; the modification time moves on, as it does in life."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    later = path.stat().st_mtime_ns + 1_000_000
    os.utime(path, ns=(later, later))


def one_line(error: BundleError, path: Path) -> str:
    message = str(error)
    assert "\n" not in message
    assert str(path) in message
    assert "export the bundle again" in message
    return message


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(BundleError) as caught:
        open_bundle(copy)
    assert "is missing, the manifest lists it" in one_line(caught.value, copy / name)
    with pytest.raises(BundleError):
        LLM(copy)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file(copy: Path, name: str) -> None:
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-1])
    with pytest.raises(BundleError) as caught:
        open_bundle(copy)
    message = one_line(caught.value, copy / name)
    assert f"has {len(content) - 1} bytes, the manifest says {len(content)}" in message


@pytest.mark.parametrize("name", FILES)
def test_an_altered_file_of_the_same_size(copy: Path, name: str) -> None:
    alter(copy / name)
    with pytest.raises(BundleError) as caught:
        open_bundle(copy)
    assert "has SHA-256" in one_line(caught.value, copy / name)


def test_a_directory_in_the_place_of_a_file(copy: Path) -> None:
    (copy / "config.json").unlink()
    (copy / "config.json").mkdir()
    with pytest.raises(BundleError, match="is missing"):
        open_bundle(copy)


def test_hashes_are_taken_once(copy: Path, hashed: list[str]) -> None:
    manifest = open_bundle(copy)
    assert sorted(hashed) == sorted(manifest.files)
    hashed.clear()
    assert open_bundle(copy) == manifest
    assert hashed == []


def test_another_time_inode_or_place_is_hashed_anew(copy: Path, hashed: list[str], tmp_path: Path) -> None:
    open_bundle(copy)
    target = copy / "model.onnx.data"

    def touch() -> None:
        os.utime(target, ns=(0, target.stat().st_mtime_ns + 1))

    def exchange() -> None:
        """Another file of the same name, size and time: what a copy tool that keeps times leaves."""
        stat = target.stat()
        shutil.copy(target, copy / "new")
        os.utime(copy / "new", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        (copy / "new").replace(target)
        assert target.stat().st_ino != stat.st_ino

    def overwrite() -> None:
        """In place, and the time put back: what a careless repair leaves."""
        stat = target.stat()
        with target.open("r+b") as file:
            first = file.read(1)
            file.seek(0)
            file.write(first)
        os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        while target.stat().st_ctime_ns == stat.st_ctime_ns:  # a file system's clock may be coarse
            target.chmod(stat.st_mode)
        assert (target.stat().st_ino, target.stat().st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)

    def rewrite_manifest() -> None:
        path = copy / "manifest.json"
        path.write_text(path.read_text() + "\n")

    for change in (touch, exchange, overwrite, rewrite_manifest):
        hashed.clear()
        change()
        open_bundle(copy)
        assert "model.onnx.data" in hashed, f"{change.__name__} went unnoticed"
        hashed.clear()
        open_bundle(copy)
        assert hashed == []
    copy.rename(tmp_path / "moved")
    open_bundle(tmp_path / "moved")
    assert "model.onnx.data" in hashed


def test_what_was_altered_after_the_first_check_is_found(copy: Path, hashed: list[str]) -> None:
    open_bundle(copy)
    alter(copy / "model.onnx.data")
    for _ in range(2):  # and a failure is never remembered as a success
        with pytest.raises(BundleError, match="altered"):
            open_bundle(copy)


def test_a_cache_that_cannot_be_written(copy: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(copy / "config.json"))  # a file: nothing can be made below it
    for _ in range(2):
        hashed.clear()
        open_bundle(copy)
        assert "model.onnx.data" in hashed


def test_a_user_without_a_home(copy: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    open_bundle(copy)
    assert "model.onnx.data" in hashed


def test_a_home_that_may_not_be_read(copy: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    is_file = Path.is_file

    def refused(path: Path) -> bool:
        if path.is_relative_to(cache_directory()):
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refused)
    open_bundle(copy)
    assert "model.onnx.data" in hashed


def test_the_caches_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_directory() == Path("/somewhere/dmtd")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_directory() == Path("/home/someone/.cache/dmtd")


def test_generation_config(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == {}
    path = tmp_path / "generation_config.json"
    path.write_text('{"temperature": 0.5}')
    assert read_generation_config(tmp_path) == {"temperature": 0.5}
    path.write_text("[1]")
    assert read_generation_config(tmp_path) == {}
    path.write_text("{")
    with pytest.raises(BundleError, match=r"generation_config.json cannot be read as JSON .*; export the bundle again"):
        read_generation_config(tmp_path)


def test_a_convention_without_gates(copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace('"prompt_input": "thinking"', '"prompt_input": "cyclical"'))
    with pytest.raises(BundleError, match="cycle_origin prompt with prompt_input cyclical is undefined"):
        LLM(copy)
