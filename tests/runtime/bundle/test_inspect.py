"""What inspect tells of a bundle: the picture for people, the same facts as JSON."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from bundles import make_bundle
from rich.console import Console

from dmtd_runtime.bundle.describe import collapse, cycle_picture, render, split_bar, to_json
from dmtd_runtime.bundle.manifest import CycleInfo, Manifest, TensorInfo, load_manifest


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return load_manifest(make_bundle(tmp_path_factory.mktemp("inspect")))


def drawn(manifest: Manifest, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(render(manifest, width=width))
    return console.file.getvalue()  # type: ignore[attr-defined]


def cycle(e: int, t: int, d: int, tau: int) -> CycleInfo:
    return CycleInfo(
        encoding_layers=e,
        thinking_layers=t,
        decoding_layers=d,
        cycle_length=tau,
        cycle_origin="absolute",
        prompt_input="cyclical",
        dmtd_trained=True,
    )


def test_split_bar_is_as_wide_as_the_shares() -> None:
    bar, words = split_bar(cycle(2, 20, 8, 4), width=92).plain.split("\n")
    assert len(bar) == 90
    assert [bar.index("E2"), bar.index("T20"), bar.index("D8")] == [2, 34, 77]
    assert words == "E encoding: layers 0-1   T thinking: layers 2-21   D decoding: layers 22-29"


def test_split_bar_leaves_out_a_group_without_layers() -> None:
    assert "E" not in split_bar(cycle(0, 3, 1, 2), width=80).plain
    assert "D decoding: layer 3" in split_bar(cycle(0, 3, 1, 2), width=80).plain


def test_cycle_picture_of_four() -> None:
    steps, thinking, decoding, refill, words = cycle_picture(cycle(0, 22, 8, 4)).plain.split("\n")
    assert steps.split() == ["step", "full", "late", "late", "late", "full", "late", "late", "late"]
    assert [cell == "████" for cell in thinking.split()[1:]] == [True, False, False, False] * 2
    assert [cell == "████" for cell in decoding.split()[1:]] == [True] * 8
    assert refill.index("└") == steps.index("full", 10)
    assert "3 skipped tokens" in refill
    assert words.startswith("Heads: positions divisible by the cycle length.")


def test_cycle_picture_without_late_steps() -> None:
    assert "late" not in cycle_picture(cycle(0, 3, 1, 1)).plain


def test_caches_share_a_row() -> None:
    tensors = [
        TensorInfo(name=name, dims=dims, dtype="float32")
        for name, dims in [
            ("thought", (1, "late_len", 64)),
            *(
                (f"past_key_values.{layer}.{kind}", (1, 2, "capacity", 16))
                for layer in (0, 3, 4)
                for kind in ("key", "value")
            ),
            *((f"present.7.key.{slot}", (1, 2, "capacity", 16)) for slot in range(4)),
        ]
    ]
    assert collapse(tensors) == [
        ("thought", "[1, late_len, 64]", "float32"),
        ("past_key_values.{0,3-4}.key", "[1, 2, capacity, 16]", "float32"),
        ("past_key_values.{0,3-4}.value", "[1, 2, capacity, 16]", "float32"),
        ("present.7.key.{0-3}", "[1, 2, capacity, 16]", "float32"),
    ]


def test_render_tells_everything(manifest: Manifest) -> None:
    text = drawn(manifest)
    for words in (
        *("T3", "D2", "full_pass.ort.onnx", "late_decode.onnx", "[num_logits]", "past_key_values.{3-4}.key"),
        *(
            "not trained for DMTD",
            "not when it was made",
            "1.6",
            "tied embedding" if manifest.model.tie_word_embeddings else "lm_head",
        ),
    ):
        assert words in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_other_cycles_than_those_of_the_training_are_told(manifest: Manifest) -> None:
    cycle = replace(manifest.cycle, dmtd_trained=False, trained_for="E0 T3 D2 in cycles of 4")
    text = " ".join(drawn(replace(manifest, cycle=cycle)).split())
    assert "trained for E0 T3 D2 in cycles of 4, not for this: speed is real" in text


def test_names_from_a_manifest_are_no_markup(manifest: Manifest) -> None:
    odd = replace(manifest, tools={"[red]tool[/]": "[/nothing]"}, verification={"ok": True, "level": "[bold]"})
    text = drawn(odd)
    assert "[red]tool[/] [/nothing]" in text
    assert "level [bold]" in text


def test_json(manifest: Manifest) -> None:
    told = json.loads(json.dumps(to_json(manifest)))
    assert told["cycle"]["thinking_layers"] == 3
    assert told["bytes"]["weights"] == sum(
        info.length for name, info in manifest.weights.items() if not name.startswith("rotary.")
    )
    assert list(told["bound"]) == ["128", "256"]
    assert len(told["graphs"]) == len(manifest.graphs)
