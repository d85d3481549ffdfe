"""ONNX Runtime's backend as it runs on a GPU, over a stand-in of the provider that computes: its tokens are the CPU's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from fake_provider import FakeOnnxRuntime

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import ExportOptions, WeightOptions
from dmtd_models.config.model import SplitOptions
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime import LLM, BackendError, SamplingParams
from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.backends.onnxruntime import binding, limits
from dmtd_runtime.backends.onnxruntime import memory as ort_memory
from dmtd_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from dmtd_runtime.backends.onnxruntime.trial import trial_step
from dmtd_runtime.backends.onnxruntime.weights import weight_bytes
from dmtd_runtime.bundle.opening import open_bundle
from dmtd_runtime.device.simulator.device import SimulatedDevice
from dmtd_runtime.ort import session as ort_session

PROMPTS = [[1, 2, 3], [4] * 40, [5, 6], [7], [8] * 17, [9, 1]]
CHOICES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "seed": 1},
    "logprobs": {"temperature": 0.0, "logprobs": 2},
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, found = tmp_path_factory.mktemp("cuda"), {}
    for dtype, layers in (("float16", 0), ("float32", 1)):
        source = write_tiny_checkpoint(root / f"model-{dtype}", family="qwen3", layers=5)
        options = ExportOptions(
            split=SplitOptions(encoding_layers=layers, decoding_layers=2, cycle_length=3),
            dtype=dtype,
            verify=False,
            max_num_seqs=4,
        )
        export_bundle(source, root / dtype, options)
        found[dtype] = root / dtype
    # Quantised: scales in half precision, as they are stored, and minimums and offsets; biases and a tied embedding.
    source = write_tiny_checkpoint(root / "model-int4", family="qwen2", layers=5, tie=True)
    options = ExportOptions(
        split=SplitOptions(decoding_layers=2, cycle_length=3),
        dtype="float16",
        formats=WeightOptions(weights="int4", weights_lm_head="int4", weights_embedding="int4"),
        verify=False,
        max_num_seqs=4,
    )
    export_bundle(source, root / "int4", options)
    return found | {"int4": root / "int4"}


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOnnxRuntime]:
    host = SimulatedDevice()
    module = FakeOnnxRuntime(host)
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(__version__="13.5.0"))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", FakeCuda(host))  # type: ignore[arg-type]
    for user in (ort_session, binding):
        monkeypatch.setattr(user, "import_onnxruntime", lambda: module)
    monkeypatch.setattr(limits, "check_cuda_provider", lambda ort: None)
    monkeypatch.setattr(ort_session, "prepare", lambda ort, device_id: None)
    monkeypatch.setattr(ort_memory, "prepare", lambda ort, device_id: None)
    return module


def generated(bundle: Path, choice: str, **options: Any) -> list[tuple[list[int], list[float]]]:
    params = [
        SamplingParams(max_tokens=count, ignore_eos=True, **CHOICES[choice]) for count, _ in enumerate(PROMPTS, start=7)
    ]
    with LLM(bundle, **options) as llm:
        outputs = [output.outputs[0] for output in llm.generate(PROMPTS, params)]
    logprobs = [[entry.logprob for entry in output.logprobs or ()] for output in outputs]
    return [(list(o.token_ids), values) for o, values in zip(outputs, logprobs, strict=True)]


HALF, FLOAT, INT4 = ("float16", "onnxruntime"), ("float32", "standard"), ("int4", "onnxruntime")


# Captured: every bundle, full pass and batch, and each of them with every choice. As issued: every value of each once more.
@pytest.mark.parametrize(
    ("bundle", "full_pass", "max_num_seqs", "cuda_graphs", "choice"),
    [
        (HALF, "staged", 1, True, "greedy"),
        (HALF, "staged", 4, True, "sampled"),
        (HALF, "fused", 1, True, "logprobs"),
        (HALF, "fused", 4, True, "greedy"),
        (FLOAT, "staged", 1, True, "logprobs"),
        (FLOAT, "staged", 4, True, "greedy"),
        (FLOAT, "fused", 1, True, "sampled"),
        (FLOAT, "fused", 4, True, "logprobs"),
        (HALF, "staged", 4, False, "greedy"),
        (HALF, "fused", 1, False, "sampled"),
        (FLOAT, "staged", 1, False, "logprobs"),
        (FLOAT, "fused", 4, False, "sampled"),
        (INT4, "staged", 1, True, "greedy"),
        (INT4, "staged", 4, True, "logprobs"),
        (INT4, "fused", 4, False, "sampled"),
    ],
)
def test_tokens_are_those_of_the_cpu(
    bundles: dict[str, Path],
    provider: FakeOnnxRuntime,
    bundle: tuple[str, str],
    full_pass: str,
    max_num_seqs: int,
    cuda_graphs: bool,
    choice: str,
) -> None:
    dtype, dialect = bundle
    same = {"dialect": dialect, "full_pass": full_pass, "max_num_seqs": max_num_seqs}
    got = generated(bundles[dtype], choice, device="cuda", cuda_graphs=cuda_graphs, **same)
    captured = {graph_id for graph_id in provider.runs if graph_id not in (None, "-1")}
    assert bool(captured) is cuda_graphs
    with pytest.MonkeyPatch.context() as undone:
        for user in (ort_session, binding):
            undone.setattr(user, "import_onnxruntime", ort_memory.import_onnxruntime)
        expected = generated(bundles[dtype], choice, **same)
    for (ids, logprobs), (expected_ids, expected_logprobs) in zip(got, expected, strict=True):
        assert ids == expected_ids
        np.testing.assert_allclose(logprobs, expected_logprobs, atol=1e-5 if dtype == "float32" else 2e-2)


def test_a_prefix_that_was_kept_on_the_host_comes_back_to_the_device(
    bundles: dict[str, Path], provider: FakeOnnxRuntime
) -> None:
    prompt, params = [5 + i % 90 for i in range(60)], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with LLM(bundles["float32"], device="cuda", dialect="standard", max_num_seqs=2) as llm:
        first, again = (llm.generate(prompt, params)[0] for _ in range(2))
    assert (first.metrics.cached_tokens, again.metrics.cached_tokens) == (0, 48)
    assert again.outputs[0].token_ids == first.outputs[0].token_ids


def backend(bundle: Path, **options: Any) -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend(bundle, open_bundle(bundle), BackendOptions(device="cuda", **options))


def test_a_graph_that_keeps_old_lengths_is_noticed_at_opening(
    bundles: dict[str, Path],
    provider: FakeOnnxRuntime,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    provider.stale = "seqlens_k"
    opened = backend(bundles["float16"])
    try:
        assert "captured graphs give other numbers on this GPU" in caplog.text
        before = len(provider.runs)
        opened.run([trial_step(0, 3)], [3])
        assert provider.runs[before:] == ["-1"]
    finally:
        opened.close()


def test_warming_up_leaves_nothing_to_capture_and_nothing_behind(
    bundles: dict[str, Path], provider: FakeOnnxRuntime
) -> None:
    opened = backend(bundles["float16"], max_num_seqs=4)
    try:
        opened.warm_up()
        known = set(provider.runs)
        for count in (1, 3, 4):
            opened.run([trial_step(3, 2, slot) for slot in range(count)], [2] * 4)
            opened.run([trial_step(0, 3, slot) for slot in range(count)], [3] * 4, choose=True)
        assert set(provider.runs) == known
        assert provider.session_options[-1]["enable_cuda_graph"] == "1"
    finally:
        opened.close()


def test_too_long_a_model_is_refused_before_anything_is_allocated(
    bundles: dict[str, Path], provider: FakeOnnxRuntime
) -> None:
    provider.host._total = 1 << 20
    with pytest.raises(
        BackendError, match=r"needed \(weights 0.00 GB, caches of 4 x .* --max-model-len or --max-num-seqs"
    ):
        backend(bundles["float16"], max_num_seqs=4)
    assert provider.host.memory()[0] == 1 << 20
    assert not provider.session_options


def test_weights_are_on_the_device_once(bundles: dict[str, Path], provider: FakeOnnxRuntime) -> None:
    """Fused, both graphs hold E, D and the head."""
    names: list[str] = []
    alloc = provider.host.alloc
    provider.host.alloc = lambda size, what: (names.append(what), alloc(size, what))[1]  # type: ignore[method-assign]
    opened = backend(bundles["float32"], dialect="standard", full_pass="fused")
    try:
        stored = sum(info.length for info in open_bundle(bundles["float32"]).weights.values())
        held = sum(block.data.nbytes for block in provider.host._blocks.values())
        cache = 2 * 5 * opened.capacity * 2 * 16 * 4
        assert stored < held < 1.2 * (stored + cache)
    finally:
        opened.close()
    assert not provider.host._blocks


@pytest.mark.usefixtures("provider")
def test_what_constants_are_made_of_is_not_uploaded(bundles: dict[str, Path]) -> None:
    """Minimums of blocks, which no kernel reads; the memory that is asked for counts what is made of them."""
    manifest, opened = open_bundle(bundles["int4"]), backend(bundles["int4"])
    try:
        parts = {
            name.partition("+")[0].rpartition(".")[2] for name in opened._weights if name.startswith("model.layers")
        }
        assert parts == {"codes", "scales", "weight", "bias"}
    finally:
        opened.close()
    graphs = [manifest.graph(name, "onnxruntime") for name in ("thinking", "late_decode")]
    stored = sum(info.length for info in manifest.weights.values())
    assert stored <= weight_bytes(manifest, graphs) < 1.5 * stored  # every tensor begins at an address of its own
