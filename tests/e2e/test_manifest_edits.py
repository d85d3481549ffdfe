"""A manifest with one value changed: one line, or the right tokens. Never a traceback, never other tokens.

What says how to decode (cycle length, convention, ends) stands in the manifest alone and decides tokens: there, no traceback.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bundles import make_checkpoint
from rich.console import Console

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import ExportOptions, SplitOptions
from dmtd_runtime import LLM, SamplingParams
from dmtd_runtime.bundle import describe
from dmtd_runtime.bundle.manifest import load_manifest
from dmtd_runtime.errors import DmtdError

GREEDY = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True)
DECIDING = {"cycle_length", "cycle_origin", "prompt_input", "eos_token_ids", "bos_token_id"}
VALUES: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 1 << 31, 1 << 63, 1 << 70, 0.5, True, None),
    *("", "x", "capacity", "float32", "int64", "../x", "\0", [], [1], {}, {"x": 1}),
)
QUICK = 150
Place = tuple[str | int, ...]


@pytest.fixture(scope="module", params=[0, 1], ids=["E0", "E1"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("edits")
    options = ExportOptions(
        split=SplitOptions(decoding_layers=2, encoding_layers=request.param, cycle_length=3),
        max_num_seqs=2,
        target="onnxruntime",
    )
    export_bundle(make_checkpoint(place / "checkpoint"), place / "bundle", options)
    return place / "bundle"


def places(value: Any, at: Place = ()) -> Iterator[Place]:
    """Every value below, containers too."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from places(inner, (*at, key))


def edited(whole: dict[str, Any], place: Place, value: Any, *, delete: bool) -> dict[str, Any]:
    made = copy.deepcopy(whole)
    parent: Any = made
    for key in place[:-1]:
        parent = parent[key]
    if delete:
        del parent[place[-1]]
    else:
        parent[place[-1]] = value
    return made


def tokens(directory: Path) -> list[int]:
    with LLM(directory, max_num_seqs=2, threads=1) as llm:
        return list(llm.generate([[5, 6, 7, 8]], GREEDY)[0].outputs[0].token_ids)


def outcome(directory: Path, manifest: dict[str, Any]) -> list[int] | str:
    """Tokens, or the line; anything else is raised. What ``inspect`` prints must come as well."""
    (directory / "manifest.json").write_text(json.dumps(manifest))
    try:
        found = tokens(directory)
    except DmtdError as refused:
        return str(refused)
    read = load_manifest(directory)
    with Console(quiet=True).capture():
        Console(quiet=True).print(describe.render(read, width=80))
    json.dumps(describe.to_json(read))
    return found


def check(bundle: Path, place: Path, draws: Iterator[tuple[Place, Any, bool]]) -> int:
    copied = shutil.copytree(bundle, place / "bundle")
    whole = json.loads((bundle / "manifest.json").read_text())
    expected, refused = tokens(bundle), 0
    for at, value, delete in draws:
        found = outcome(copied, edited(whole, at, value, delete=delete))
        if isinstance(found, str):
            refused += 1
            assert "\n" not in found, (at, value, delete)
        elif not DECIDING & {*map(str, at)}:
            assert found == expected, (at, value, delete)
    return refused


def drawn(whole: dict[str, Any], count: int, seed: int) -> Iterator[tuple[Place, Any, bool]]:
    """Rare places as often as frequent ones: a manifest is mostly weights and lists of inputs."""
    rng = random.Random(seed)
    kinds: dict[tuple[str, ...], list[Place]] = {}
    for place in places(whole):
        kind = tuple("*" if isinstance(key, int) or "." in key else key for key in place)
        kinds.setdefault(kind, []).append(place)
    for _ in range(count):
        yield rng.choice(kinds[rng.choice(list(kinds))]), rng.choice(VALUES), rng.random() < 0.2


def test_one_value_changed(bundle: Path, tmp_path: Path) -> None:
    whole = json.loads((bundle / "manifest.json").read_text())
    assert check(bundle, tmp_path, drawn(whole, QUICK, 1)) > QUICK // 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
def test_many_values_changed(seed: int, bundle: Path, tmp_path: Path) -> None:
    whole = json.loads((bundle / "manifest.json").read_text())
    assert check(bundle, tmp_path, drawn(whole, 1500, seed)) > 500


def test_an_output_that_the_list_lacks(bundle: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(bundle, tmp_path / "bundle")
    whole = json.loads((bundle / "manifest.json").read_text())
    number = next(i for i, graph in enumerate(whole["graphs"]) if graph["file"] == "cycle.ort.batch2.onnx")
    for side in ("inputs", "outputs"):
        for index, info in enumerate(whole["graphs"][number][side]):
            found = outcome(copied, edited(whole, ("graphs", number, side, index), None, delete=True))
            assert isinstance(found, str), info
            assert "cycle.ort.batch2.onnx" in found, info


@pytest.mark.parametrize("name", ["rotary.cos", "model.norm.weight"])
def test_a_weight_without_dimensions(name: str, bundle: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(bundle, tmp_path / "bundle")
    whole = json.loads((bundle / "manifest.json").read_text())
    found = outcome(copied, edited(whole, ("weights", name, "shape"), [], delete=False))
    assert isinstance(found, str)
    assert name in found
