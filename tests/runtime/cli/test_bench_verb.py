"""`dmtd bench`: tables, JSON and the picture."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_support import SERVE, dmtd, one_json


def test_bench_json(bundle: str) -> None:
    told = one_json(
        dmtd("bench", bundle, "--prompt-len", "4", "--max-tokens", "6", "--repeats", "2", "--batch", "1,2", "--json")
    )
    assert [batch["batch"] for batch in told["batches"]] == [1, 2]
    assert told["conditions"]["repeats"] == 2


def test_bench_table(bundle: str) -> None:
    result = dmtd("bench", bundle, "--prompt-len", "4", "--max-tokens", "6", "--repeats", "1", "--full-pass", "fused")
    assert result.exit_code == 0
    shown = " ".join(result.stdout.split())
    for words in ("bytes a token", "bound", "ratio", "outside the sessions", "one repeat; fused", "more memory"):
        assert words in shown


def test_bench_serve_json(bundle: str) -> None:
    told = one_json(dmtd("bench", bundle, *SERVE, "--batch", "1,2", "--concurrency", "3", "--json"))
    assert [(load["slots"], load["concurrency"], load["request_rate"]) for load in told["loads"]] == [
        (1, 3, None),
        (2, 3, None),
    ]
    assert told["loads"][1]["dmtd"]["requests"] == 8  # four for each slot


def test_bench_serve_table_and_plot(bundle: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, begin in (("load.png", b"\x89PNG"), ("load.svg", b"<?xml")):
        result = dmtd("bench", bundle, *SERVE, "--request-rate", "500,1000", "--plot", str(tmp_path / name))
        assert result.exit_code == 0, result.output
        for words in (
            "1 slot, 500/s",
            "1 slot, 1000/s",
            "DMTD / static batch",
            "heads in phase",
            "one repeat",
            "first token",
        ):
            assert words in result.stdout
        assert (tmp_path / name).read_bytes().startswith(begin)
