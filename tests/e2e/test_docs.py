"""The pages: limits of README.md, links, anchors, paths, tables of contents, and errors quoted as the code has them."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from dmtd_runtime.version import __version__

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = {"build", "dist", "node_modules"}
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part in SKIPPED for part in path.relative_to(ROOT).parts)
)
FOLDER_PAGES = [ROOT / name / "README.md" for name in ("dmtd_export", "runtime", "models", "models/study", "tools")]
CODE = ("dmtd_export", "runtime/dmtd_runtime", "models/dmtd_models")
MAX_LINES, MAX_WORDS, MAX_COLUMNS = 150, 1500, 120

FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
REPOSITORY_PATH = re.compile(r"`((?:dmtd_export|runtime|models|tools|tests)/[\w./-]+)`")


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors of its headings, as GitHub makes them."""
    found: dict[str, int] = {}
    made = set()
    for heading in HEADING.findall(prose(page)):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        made.add(f"{slug}-{found[slug]}" if slug in found else slug)
        found[slug] = found.get(slug, 0) + 1
    return made


def test_the_readme_keeps_its_limits() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= MAX_LINES
    assert len(text.split()) <= MAX_WORDS
    too_long = [line for line in lines if len(line) > MAX_COLUMNS and not line.startswith("|")]
    assert not too_long


def test_the_readme_renders_without_the_repository() -> None:
    """It is the wheel's page too, where a relative picture would be a hole."""
    images = re.findall(r"!\[[^\]]*\]\(([^)]+)\)|<img[^>]+src=\"([^\"]+)\"", (ROOT / "README.md").read_text("utf-8"))
    assert all((a or b).startswith("https://") for a, b in images)


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_relative_links_and_anchors_resolve(page: Path) -> None:
    broken = []
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = target.partition("#")
        file = (page.parent / place).resolve() if place else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_paths_that_are_named_exist(page: Path) -> None:
    named = REPOSITORY_PATH.findall(prose(page))
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", FOLDER_PAGES, ids=names)
def test_every_folder_page_lists_its_sections(page: Path) -> None:
    sections = re.findall(r"^## +(.+?) *$", prose(page), re.MULTILINE)
    listed = re.findall(r"^- \[([^\]]+)\]\(#", prose(page).partition("\n## ")[0], re.MULTILINE)
    assert listed == sections


@cache
def messages() -> str:
    """Every string of the code, a line each, with \0 for what is filled in."""
    found = []
    for folder in CODE:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(re.sub(r"%[-.\d]*[a-z]", "\0", node.value))
    return "\n".join(text.replace("\n", " ") for text in found)


def symptoms() -> list[str]:
    """What is quoted in the first column of the tables under Troubleshooting; ``...`` stands for what is filled in."""
    found = []
    for page in FOLDER_PAGES:
        _, _, section = page.read_text(encoding="utf-8").partition("\n## Troubleshooting\n")
        for row in re.findall(r"^\| (.+?) \|", section.partition("\n## ")[0], re.MULTILINE):
            found += re.findall(r"`([^`]* [^`]*)`", row)
    return found


def is_message(quoted: str) -> bool:
    """Whether the code says so. The name that an error blames stands before its words: ``--device: got ...``."""
    quoted = re.sub(r"^(--?[a-z][\w-]*|[a-z_]+): (?=\w|\.\.\.)", "", quoted)
    parts = [re.escape(part.strip()) for part in quoted.split("...") if part.strip(" :;,.")]
    return re.search("[^\n]*?".join(parts), messages()) is not None


def test_quoted_errors_are_those_of_the_code() -> None:
    quoted = symptoms()
    assert len(quoted) > 40
    assert [text for text in quoted if not is_message(text)] == []


def test_the_changelog_has_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)[:2] == ["Unreleased", __version__]
