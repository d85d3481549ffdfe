"""Packages: what is downloaded, what is refused, what the cache repairs; archives are made here byte by byte."""

import io
import subprocess
import tarfile
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest

from study import packages
from study.packages import DebianPackage, PackageError, PyPiPackage, fetch, read_members

FILES = {"usr/share/doc/a.txt": b"one\n", "usr/share/doc/b.txt": b"two\n"}


def wheel_bytes(files=FILES):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def deb_bytes(files=FILES, compression="xz"):
    """The format of deb(5): an ar archive of debian-binary, control.tar and data.tar."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=f"w:{compression}") as tar:
        folder = tarfile.TarInfo("./usr")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in files.items():
            entry = tarfile.TarInfo("./" + name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar.{compression}": data.getvalue()}
    out = b"!<arch>\n"
    for name, content in members.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        out += content + b"\n" * (len(content) % 2)
    return out


class Index:
    """pip and apt-get replaced: what they would download, and their calls."""

    def __init__(self):
        self.files = {}
        self.calls = []

    def run(self, command, cwd=None, **_):
        self.calls.append(command)
        file = self.files.get(command[-1])
        if file is None:
            return subprocess.CompletedProcess(command, 1, "", "W: unsandboxed\nE: no route to host\nW: later\n")
        (Path(cwd) / file[0]).write_bytes(file[1])
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def index(monkeypatch):
    made = Index()
    monkeypatch.setattr(packages.subprocess, "run", made.run)
    monkeypatch.setattr(packages.shutil, "which", lambda name: f"/usr/bin/{name}")
    return made


def pypi(content):
    return PyPiPackage(name="some-text", version="1.0", sha256=sha256(content).hexdigest())


def debian(content):
    return DebianPackage(name="some-doc", version="2-1", sha256=sha256(content).hexdigest())


def test_a_wheel_is_downloaded_once_and_repaired(index, tmp_path):
    content = wheel_bytes()
    index.files["some-text==1.0"] = ("some_text-1.0-py3-none-any.whl", content)
    first = fetch(pypi(content), tmp_path)
    assert first.pinned
    assert first.path.read_bytes() == content
    assert fetch(pypi(content), tmp_path) == first
    assert len(index.calls) == 1
    first.path.write_bytes(content[:10])
    assert fetch(pypi(content), tmp_path).path.read_bytes() == content
    assert len(index.calls) == 2
    assert all({"download", "--no-deps", "--only-binary"} <= set(command) for command in index.calls)
    assert dict(read_members(first.path, lambda name: True)) == FILES


def test_another_wheel_is_refused_and_leaves_nothing(index, tmp_path):
    index.files["some-text==1.0"] = ("some_text-1.0-py3-none-any.whl", wheel_bytes({"x": b"other"}))
    with pytest.raises(PackageError, match=r"some-text: .*got sha256 .*expected"):
        fetch(pypi(wheel_bytes()), tmp_path)
    assert list((tmp_path / "packages").iterdir()) == []


def test_a_failed_download_says_what_pip_said(index, tmp_path):
    with pytest.raises(PackageError, match=r"some-text: pip download failed \(E: no route to host\)"):
        fetch(pypi(b""), tmp_path)


def test_a_pinned_debian_package(index, tmp_path):
    content = deb_bytes()
    index.files["some-doc=2-1"] = ("some-doc_2-1_all.deb", content)
    got = fetch(debian(content), tmp_path)
    assert got.pinned
    assert fetch(debian(content), tmp_path) == got
    assert len(index.calls) == 1


def test_a_mended_debian_package_is_taken_and_told(index, tmp_path):
    content = deb_bytes()
    index.files["some-doc"] = ("some-doc_2-2_all.deb", content)
    got = fetch(debian(b"the pinned one, gone"), tmp_path)
    assert (got.pinned, got.sha256) == (False, sha256(content).hexdigest())
    assert [command[-1] for command in index.calls] == ["some-doc=2-1", "some-doc"]
    assert fetch(debian(b"the pinned one, gone"), tmp_path) == got
    got.path.write_bytes(content[:100])  # no longer what apt vouched for
    assert fetch(debian(b"the pinned one, gone"), tmp_path).path.read_bytes() == content


def test_other_bytes_under_the_pinned_version_are_refused(index, tmp_path):
    index.files["some-doc=2-1"] = ("some-doc_2-1_all.deb", deb_bytes({"x": b"other"}))
    with pytest.raises(PackageError, match=r"some-doc: .*got sha256"):
        fetch(debian(deb_bytes()), tmp_path)


def test_without_apt(index, tmp_path, monkeypatch):
    with pytest.raises(PackageError, match=r"apt-get download failed \(E: no route to host\).*apt-get update"):
        fetch(debian(b""), tmp_path)
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(PackageError, match="no apt-get"):
        fetch(debian(b""), tmp_path)


@pytest.mark.parametrize("compression", ["xz", "gz"])
def test_members_of_a_debian_package(tmp_path, compression):
    path = tmp_path / "a.deb"
    path.write_bytes(deb_bytes(compression=compression))
    assert dict(read_members(path, lambda name: name.endswith("b.txt"))) == {"usr/share/doc/b.txt": b"two\n"}
    assert dict(read_members(path, lambda name: True)) == FILES


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.whl", b"PK not", "not a whole archive"),
        ("a.deb", b"PK not", "no ar archive"),
        ("a.deb", deb_bytes()[:-120], r"bytes of data\.tar\.xz, expected"),
        ("a.deb", deb_bytes().replace(b"\xfd7zXZ", b"\xfd7zXY"), "not a whole archive"),
        ("a.deb", deb_bytes()[:80], r"no data\.tar"),
        ("a.deb", deb_bytes().replace(b"data.tar.xz ", b"data.tar.zst"), "zstd"),
    ],
)
def test_broken_archives(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(PackageError, match=says):
        list(read_members(path, lambda name: True))
