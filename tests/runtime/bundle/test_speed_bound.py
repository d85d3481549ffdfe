"""The bound of the bytes, against figures worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import ExportOptions, WeightOptions
from dmtd_models.config.model import SplitOptions
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime.bundle.speed_bound import SplitBytes, mean_context, split_bytes, weight_bits


def qwen3_4b(cycle_length: int) -> SplitBytes:
    """Hidden 2560, 32 heads and 8 KV heads of 128, MLP 9728, vocabulary 151936, tied, bfloat16; E0 T28 D8."""
    layer = 2 * (2560 * 4096 * 2 + 2560 * 1024 * 2 + 3 * 2560 * 9728 + 2 * 2560 + 2 * 128)
    head = 2 * (151936 * 2560 + 2560)
    return SplitBytes(
        embedding=head - 2 * 2560,
        encoding=0,
        thinking=28 * layer,
        decoding=8 * layer,
        lm_head=head,
        tied=True,
        num_layers=(0, 28, 8),
        kv_row_bytes=2 * 8 * 128 * 2,
        cycle_length=cycle_length,
    )


def smollm2() -> SplitBytes:
    """Hidden 576, 9 heads and 3 KV heads of 64, MLP 1536, vocabulary 49152, tied, float32; E0 T22 D8, cycle of 4."""
    layer = 4 * 3_540_096
    return SplitBytes(
        embedding=4 * 28_311_552,
        encoding=0,
        thinking=22 * layer,
        decoding=8 * layer,
        lm_head=4 * (28_311_552 + 576),
        tied=True,
        num_layers=(0, 22, 8),
        kv_row_bytes=1536,
        cycle_length=4,
    )


@pytest.mark.parametrize(("cycle_length", "bound"), [(2, 1.54), (3, 1.88), (4, 2.11), (6, 2.41)])
def test_published_bounds_of_qwen3_4b(cycle_length: int, bound: float) -> None:
    assert qwen3_4b(cycle_length).bound(0) == pytest.approx(bound, abs=0.005)


@pytest.mark.parametrize(("context", "bound"), [(0, 1.7675), (128, 1.7715), (1000, 1.7965)])
def test_bounds_of_smollm2_with_its_cache(context: int, bound: float) -> None:
    assert smollm2().bound(context) == pytest.approx(bound, abs=5e-5)


def test_tied_weights_count_once() -> None:
    assert smollm2().stored == 4 * 134_515_008  # the model's published number of parameters


def test_cycle_of_one_reads_what_plain_reads() -> None:
    split = qwen3_4b(1)
    assert split.cycle(500) == split.plain_step(500)
    assert split.bound(500) == 1


def test_a_batch_reads_weights_once_and_every_cache() -> None:
    split = smollm2()
    assert split.plain_step(100, 3) - split.plain_step(0) == 3 * 100 * 30 * 1536
    # T's caches once a cycle, those of D four times.
    assert split.cycle(100, 3) - split.cycle(0) == 3 * 100 * (22 + 4 * 8) * 1536


def test_mean_context_is_that_of_the_steps() -> None:
    # A prompt of 4 and 3 new tokens: steps at positions 4 and 5 read 5 and 6 rows.
    assert mean_context(4, 3) == 5.5


@pytest.mark.parametrize("tie", [False, True])
def test_bytes_of_a_bundle(tie: bool, tmp_path: Path) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "m", family="llama", layers=6, tie=tie)
    options = ExportOptions(
        split=SplitOptions(
            encoding_layers=1, decoding_layers=2, cycle_length=3, cycle_origin="prompt", prompt_input="thinking"
        ),
        max_num_seqs=1,
    )
    split = split_bytes(export_bundle(checkpoint, tmp_path / "b", options))
    # Hidden 64, 4 heads and 2 KV heads of 16, MLP 96, vocabulary 128, float32.
    layer = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64)
    assert (split.encoding, split.thinking, split.decoding) == (layer, 3 * layer, 2 * layer)
    assert split.lm_head == 4 * (128 * 64 + 64)
    assert split.tied is tie
    assert split.stored == 6 * layer + split.lm_head + (0 if tie else 4 * 128 * 64)
    assert split.kv_row_bytes == 2 * 2 * 16 * 4
    assert split.fused_extra == 2 * layer + split.lm_head


def test_bits_a_weight_count_what_stands_beside_the_codes(tmp_path: Path) -> None:
    """In blocks of 32: a half-precision scale is half a bit a weight, a minimum as much."""
    checkpoint = write_tiny_checkpoint(tmp_path / "model", layers=4, tie=True)
    formats = WeightOptions(
        weights="int4-symmetric", weights_thinking="int4", weights_lm_head="int8", weights_embedding="int8"
    )
    split = SplitOptions(encoding_layers=1, decoding_layers=1, cycle_length=2)
    options = ExportOptions(split=split, target="onnxruntime", max_num_seqs=1, formats=formats)
    manifest = export_bundle(checkpoint, tmp_path / "bundle", options)
    four = {"encoding": 4.5, "thinking": 5.0, "decoding": 4.5}
    assert weight_bits(manifest) == {**four, "embedding": 8.5, "lm_head": 8.5}
    floats = export_bundle(
        checkpoint, tmp_path / "floats", ExportOptions(split=split, target="onnxruntime", max_num_seqs=1)
    )
    assert set(weight_bits(floats).values()) == {32.0}
