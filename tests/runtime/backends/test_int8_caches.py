"""Int8 caches: what ONNX Runtime's attention keeps and reads, held to an attention written here, and what no cut or neighbour
changes.

The rounding: a value over its channel's scale, to the nearest integer, ties to even, within -128 and 127. NaN becomes 127.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundle_mutations import edit_weight, reseal
from cli_support import dmtd
from forced_support import ALONE, COMPANY_AND_CUTS, first_logits
from onnx import helper
from serving_support import Visit, alone, serve

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import ExportOptions
from dmtd_models.config.model import SplitOptions
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime import LLM, SamplingParams
from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.backends.kv_cache import kv_bytes
from dmtd_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from dmtd_runtime.backends.opening import open_backend
from dmtd_runtime.bundle.manifest import Manifest, load_manifest
from dmtd_runtime.bundle.speed_bound import split_bytes
from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.errors import BackendError
from dmtd_runtime.ort.library import import_onnxruntime
from dmtd_runtime.serving.options import ServingOptions

ROWS = (1, 2, 3, 4, 5, 8, 23, 64)
HEADS, KV_HEADS, WIDTH, CAPACITY = 6, 2, 32, 128
TYPES = {"float32": onnx.TensorProto.FLOAT, "int32": onnx.TensorProto.INT32, "int8": onnx.TensorProto.INT8}


class Attention:
    """One GroupQueryAttention over int8 caches, without rotary positions."""

    def __init__(self) -> None:
        inputs = [("qkv", "float32", 3), ("past_key", "int8", 4), ("past_value", "int8", 4)]
        inputs += [("seqlens_k", "int32", 1), ("total", "int32", 1)]
        inputs += [("k_scale", "float32", 1), ("v_scale", "float32", 1)]
        node = helper.make_node(
            "GroupQueryAttention",
            ["qkv", "", "", "past_key", "past_value", "seqlens_k", "total", *[""] * 5, "k_scale", "v_scale"],
            ["out", "key", "value"],
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            k_quant_type="PER_CHANNEL",
            v_quant_type="PER_CHANNEL",
            kv_cache_bit_width=8,
        )
        made = [helper.make_tensor_value_info(name, TYPES[dtype], [None] * rank) for name, dtype, rank in inputs]
        outputs = [helper.make_tensor_value_info("out", TYPES["float32"], None)]
        outputs += [helper.make_tensor_value_info(name, TYPES["int8"], None) for name in ("key", "value")]
        opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
        graph = helper.make_graph([node], "attention", made, outputs)
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        self._session = import_onnxruntime().InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )

    def __call__(
        self,
        qkv: np.ndarray,
        key: np.ndarray,
        value: np.ndarray,
        past: list[int],
        scales: tuple[np.ndarray, np.ndarray],
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(out [batch, rows, heads, width], key, value) from qkv [batch, rows, ...] over ``past`` rows of each sequence."""
        rows = qkv.shape[1]
        feed = {"qkv": qkv, "past_key": key, "past_value": value, "k_scale": scales[0], "v_scale": scales[1]}
        feed["seqlens_k"] = np.array(past, np.int32) + np.int32(rows - 1)
        feed["total"] = np.array([max(past) + rows], np.int32)
        out, new_key, new_value = self._session.run(None, feed)
        return out.reshape(len(qkv), rows, HEADS, WIDTH), new_key, new_value


@pytest.fixture(scope="module")
def attention() -> Attention:
    return Attention()


def drawn(rng: np.random.Generator, batch: int, rows: int) -> np.ndarray:
    return rng.standard_normal((batch, rows, (HEADS + 2 * KV_HEADS) * WIDTH)).astype(np.float32)


def old_codes(rng: np.random.Generator, batch: int) -> np.ndarray:
    return rng.integers(-128, 128, (batch, KV_HEADS, CAPACITY, WIDTH)).astype(np.int8)


def drawn_scales(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Channels of sizes that differ, about a fortieth of a standard deviation a step: a few values saturate."""
    key, value = (rng.uniform(0.4, 1.6, KV_HEADS * WIDTH).astype(np.float32) / 40 for _ in range(2))
    return key, value


def rounded(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Codes of [kv_heads, rows, width]."""
    steps = x / scale.reshape(KV_HEADS, 1, WIDTH)
    return np.clip(np.rint(steps), -128, 127).astype(np.int8)


def by_hand(
    qkv: np.ndarray, key: np.ndarray, value: np.ndarray, past: int, scales: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One sequence, in float64 and row by row: (out [rows, heads, width], key, value); every row sees codes, its own too."""
    parts = qkv.reshape(len(qkv), HEADS + 2 * KV_HEADS, WIDTH)
    queries, keys, values = np.split(parts, [HEADS, HEADS + KV_HEADS], axis=1)
    key, value, out = key.copy(), value.copy(), np.zeros((len(qkv), HEADS, WIDTH))
    key[:, past : past + len(qkv)] = rounded(keys.transpose(1, 0, 2), scales[0])
    value[:, past : past + len(qkv)] = rounded(values.transpose(1, 0, 2), scales[1])
    k, v = (
        codes.astype(np.float64) * scale.reshape(KV_HEADS, 1, WIDTH)
        for codes, scale in zip((key, value), scales, strict=True)
    )
    for row in range(len(qkv)):
        for head in range(HEADS):
            group, seen = head // (HEADS // KV_HEADS), past + row + 1
            score = np.exp(k[group, :seen] @ queries[row, head] / np.sqrt(WIDTH))
            out[row, head] = score @ v[group, :seen] / score.sum()
    return out, key, value


@pytest.mark.parametrize("past", [0, 1, 40])
@pytest.mark.parametrize("rows", ROWS)
def test_rows_of_one_sequence(attention: Attention, rows: int, past: int) -> None:
    rng = np.random.default_rng([rows, past])
    qkv, key, value, scales = drawn(rng, 1, rows), old_codes(rng, 1), old_codes(rng, 1), drawn_scales(rng)
    out, new_key, new_value = attention(qkv, key, value, [past], scales)
    wanted, wanted_key, wanted_value = by_hand(qkv[0], key[0], value[0], past, scales)
    assert np.array_equal(new_key[0, :, : past + rows], wanted_key[:, : past + rows])
    assert np.array_equal(new_value[0, :, : past + rows], wanted_value[:, : past + rows])
    assert {-128, 127} <= {*np.unique(new_key[0, :, past : past + rows])} or rows < 8, "some saturate"
    np.testing.assert_allclose(out[0], wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


def test_a_row_of_each_of_several_sequences(attention: Attention) -> None:
    rng, past = np.random.default_rng(3), [3, 50, 17, 0, 99]
    qkv, key, value, scales = drawn(rng, 5, 1), old_codes(rng, 5), old_codes(rng, 5), drawn_scales(rng)
    out, new_key, new_value = attention(qkv, key, value, past, scales)
    for one, rows in enumerate(past):
        wanted, wanted_key, wanted_value = by_hand(qkv[one], key[one], value[one], rows, scales)
        assert np.array_equal(new_key[one, :, : rows + 1], wanted_key[:, : rows + 1])
        assert np.array_equal(new_value[one, :, : rows + 1], wanted_value[:, : rows + 1])
        np.testing.assert_allclose(out[one], wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("chunk", ROWS)
def test_attention_does_not_depend_on_how_rows_are_cut(attention: Attention, chunk: int) -> None:
    rng, count = np.random.default_rng(chunk), 70
    qkv, scales = drawn(rng, 1, count), drawn_scales(rng)
    whole, whole_key, whole_value = attention(qkv, *np.zeros((2, 1, KV_HEADS, CAPACITY, WIDTH), np.int8), [0], scales)
    key, value = np.zeros((2, 1, KV_HEADS, CAPACITY, WIDTH), np.int8)
    parts = []
    for start in range(0, count, chunk):
        out, key, value = attention(qkv[:, start : start + chunk], key, value, [start], scales)
        parts.append(out)
    assert np.array_equal(key, whole_key) and np.array_equal(value, whole_value)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=1e-6 * np.abs(whole).max())


def test_values_at_borders_and_beyond_the_range(attention: Attention) -> None:
    """Ties go to the even code; what is too large saturates; NaN becomes a code too, and is no more to be seen."""
    given = [0.5, 1.5, 2.5, -0.5, -1.5, 127.4, 127.6, 1e9, -128.4, -129, -1e9, np.inf, -np.inf, np.nan]
    codes = [0, 2, 2, 0, -2, 127, 127, 127, -128, -128, -128, 127, -128, 127]
    qkv = np.zeros((1, 1, (HEADS + 2 * KV_HEADS) * WIDTH), np.float32)
    for first in (HEADS * WIDTH, (HEADS + KV_HEADS) * WIDTH):
        qkv[0, 0, first : first + len(given)] = given
    scales = (np.ones(KV_HEADS * WIDTH, np.float32),) * 2
    _, key, value = attention(qkv, *np.zeros((2, 1, KV_HEADS, CAPACITY, WIDTH), np.int8), [0], scales)
    # infinity's code differs between builds; all else is the rounding above
    finite = np.isfinite(given)
    for found in (key, value):
        assert found[0, 0, 0, : len(given)][finite].tolist() == np.array(codes)[finite].tolist()
        assert not found[0, 0, 0, len(given) :].any()


def make(root: Path, **split: object) -> tuple[Path, Manifest]:
    """E0 T3 D2, or as told; calibrated on a text like no prompt of these tests."""
    checkpoint = write_tiny_checkpoint(root / "model", layers=5, tokenizer=True)
    (root / "text.txt").write_text("Pack my box with five dozen liquor jugs. " * 40)
    options = ExportOptions(
        split=SplitOptions(**{"decoding_layers": 2, "cycle_length": 3, **split}),
        max_num_seqs=4,
        kv="int8",
        calibration=(str(root / "text.txt"),),
    )
    export_bundle(checkpoint, root / "bundle", options)
    return root / "bundle", load_manifest(root / "bundle")


@pytest.fixture(scope="module", params=[0, 1], ids=["E0", "E1"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    return make(tmp_path_factory.mktemp("int8-caches"), encoding_layers=request.param)


@pytest.mark.parametrize("plain", [False, True], ids=["cycles", "plain"])
def test_neighbours_and_chunks_change_no_logits(opened: tuple[Path, Manifest], plain: bool) -> None:
    whole = first_logits(*opened, *ALONE, plain=plain)
    for company in COMPANY_AND_CUTS:
        logits = first_logits(*opened, *company, plain=plain)
        np.testing.assert_allclose(logits, whole, rtol=0, atol=2e-5 * np.abs(whole).max())


def visit(*, at: int, tokens: int, shared: int = 0, own: int = 0, seed: int = 1, **more: Any) -> Visit:
    return Visit(
        at=at,
        shared=shared,
        own=own,
        tokens=tokens,
        seed=seed,
        **{"temperature": 0.0, "priority": 0, "salt": None, **more},
    )


def test_who_comes_and_goes_changes_nobody_and_prefixes_are_kept(opened: tuple[Path, Manifest]) -> None:
    """Continuous batching with moves of slots, sequences cut short, and rows out of the prefix cache."""
    directory, manifest = opened
    options = ServingOptions(prefix_cache_bytes=1 << 20)
    visits = [
        visit(at=0, shared=40, tokens=9),
        visit(at=2, own=17, seed=2, tokens=30, leaves=6),
        visit(at=3, own=5, seed=3, tokens=12, n=2, temperature=1.0),
        visit(at=40, shared=40, tokens=9),
    ]
    plan = CyclePlan(cycle=manifest.cycle)
    with_slots = BackendOptions(max_num_seqs=4, max_model_len=128, threads=1)
    backend = OnnxRuntimeBackend(directory, manifest, with_slots)
    try:
        guests = serve(backend, plan, visits, options)
        assert guests[-1].sequence.cached_tokens == 32, "two blocks of 16"
        for guest in guests:
            by_itself = alone(backend, plan, guest.visit, guest.index)
            assert guest.tokens == by_itself.tokens[: len(guest.tokens)]
        assert guests[0].tokens == guests[-1].tokens
        [rows] = backend.read_rows(0, range(0, 16, 16))
        assert rows.dtype == np.int8 and rows.nbytes == 2 * 5 * 2 * 16 * 16
    finally:
        backend.close()


def test_other_backends_and_devices_refuse_in_one_line(
    opened: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, manifest = opened
    for name in ("simulator", "tensorrt-rtx"):
        with pytest.raises(
            BackendError, match=r"caches are int8, which ONNX Runtime's own graphs alone take"
        ) as refused:
            open_backend(directory, manifest, BackendOptions(backend=name))
        assert "\n" not in str(refused.value) and "--kv int8" in str(refused.value)
    monkeypatch.setattr("dmtd_runtime.backends.onnxruntime.limits.check_cuda_provider", lambda ort: None)
    with pytest.raises(BackendError, match="caches are int8, which run on the CPU alone"):
        open_backend(directory, manifest, BackendOptions(device="cuda"))


def test_a_sequence_that_fails_leaves_nothing_behind(opened: tuple[Path, Manifest], tmp_path: Path) -> None:
    """NaN in a prompt's last row ends its sequence, and its slot is cleared; a code keeps no NaN, so one further ahead passes."""
    bundle = Path(shutil.copytree(opened[0], tmp_path / "bundle"))
    edit_weight(bundle, "model.embed_tokens.weight", lambda table: table.__setitem__(200, np.nan))
    reseal(bundle)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with LLM(bundle, max_num_seqs=1, prefix_cache_bytes=0) as llm:
        [before] = llm.generate([[5, 6, 7, 8]], params)
        with pytest.raises(BackendError, match="logits: got NaN or infinity"):
            llm.generate([[9, 10, 11, 200]], params)
        [after] = llm.generate([[5, 6, 7, 8]], params)
        [passed] = llm.generate([[9, 200, 10, 11]], params)
    assert after.outputs[0].token_ids == before.outputs[0].token_ids
    assert len(passed.outputs[0].token_ids) == 6


def test_every_verb_takes_the_bundle_and_says_what_its_caches_are(opened: tuple[Path, Manifest]) -> None:
    directory, manifest = opened
    assert split_bytes(manifest).kv_per_token() == kv_bytes(manifest.model, 1) == 2 * 5 * 2 * 16
    for words, told in (
        (("inspect",), ("float32, caches int8, up to", "KV of a token", "320 B")),
        (("bench", "--max-tokens", "8", "--repeats", "1", "--prompt-len", "8"), ("int8, 320 B a token",)),
        (("bench", "--max-tokens", "8", "--repeats", "1", "--prompt-len", "8", "--json"), ('"kv_dtype": "int8"',)),
        (("generate", "--token-ids", "1,2,3", "--max-tokens", "4", "--json"), ("finish_reason",)),
        (
            ("evaluate", "--text", str(directory.parent / "text.txt"), "--max-tokens", "600", "--prefixes", "0"),
            ("perplexity",),
        ),
    ):
        result = dmtd(words[0], str(directory), *words[1:])
        assert result.exit_code == 0, result.output
        assert all(each in result.output for each in told), result.output
