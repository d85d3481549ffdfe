"""ONNX Runtime's CUDA provider: refused in one line where it is missing; on a GPU, tokens as the CPU's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import ExportOptions, WeightFormat, WeightOptions
from dmtd_export.verify.on_device import verify_on_device
from dmtd_models.config.model import SplitOptions
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime import LLM, BackendError, SamplingParams
from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.ort.cuda_provider import CUDA_PROVIDER
from dmtd_runtime.ort.library import import_onnxruntime
from dmtd_runtime.ort.session import CudaOptions, provider_options

PROMPTS = [[1, 2, 3], [4] * 9, [5, 6]]
CHOICES = {
    "greedy": SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
    "sampled": SamplingParams(temperature=0.8, seed=7, max_tokens=12, ignore_eos=True),
}


def bundle(root: Path, dtype: str, **options: Any) -> Path:
    source = write_tiny_checkpoint(root / "model", family="llama", layers=5, dtype="bfloat16")
    split = SplitOptions(decoding_layers=2, cycle_length=3)
    export_bundle(source, root / dtype, ExportOptions(split=split, dtype=dtype, **options))
    return root / dtype


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_missing_provider_is_told_first_and_never_replaced_by_the_cpu(tmp_path: Path, dtype: str) -> None:
    if CUDA_PROVIDER in import_onnxruntime().get_available_providers():
        pytest.skip("this ONNX Runtime has the CUDA provider")
    with pytest.raises(BackendError, match=r"no CUDAExecutionProvider.*dmtd\[gpu\]"):
        LLM(bundle(tmp_path, dtype), device="cuda")


def test_a_float32_bundle_is_refused_with_the_export_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmtd_runtime.backends.onnxruntime.limits.check_cuda_provider", lambda ort: None)
    with pytest.raises(BackendError, match="--dtype bfloat16"):
        LLM(bundle(tmp_path, "float32"), device="cuda")


@pytest.mark.parametrize(
    ("weights", "dtype", "named"), [("int8", "float16", "8 bits"), ("int4-symmetric", "bfloat16", "bfloat16")]
)
def test_standard_graphs_over_blocks_that_the_provider_does_not_dequantise_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: WeightFormat, dtype: str, named: str
) -> None:
    monkeypatch.setattr("dmtd_runtime.backends.onnxruntime.limits.check_cuda_provider", lambda ort: None)
    made = bundle(tmp_path, dtype, formats=WeightOptions(weights=weights), target="tensorrt", verify=False)
    with pytest.raises(BackendError, match=rf"got {named}, and .* 4 bits .*--target onnxruntime"):
        LLM(made, device="cuda")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One bundle of each type, exported once and not verified: what the CPU makes of them is other tests' concern."""
    return {dtype: bundle(tmp_path_factory.mktemp(dtype), dtype) for dtype in ("float32", "float16", "bfloat16")}


@pytest.fixture(scope="module")
def on_the_cpu(bundles: dict[str, Path]) -> dict[tuple[bool, str], list[list[int]]]:
    """Tokens in float32 by (plain, choice)."""
    found = {}
    for plain in (False, True):
        with LLM(bundles["float32"], plain=plain) as llm:
            found |= {(plain, choice): tokens(llm, choice) for choice in CHOICES}
    return found


def tokens(llm: LLM, choice: str) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, CHOICES[choice])]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("full_pass", ["staged", "fused"])
@pytest.mark.parametrize("max_num_seqs", [1, 4])
@pytest.mark.parametrize("plain", [False, True])
def test_on_a_gpu_most_tokens_are_the_cpus(
    bundles: dict[str, Path],
    on_the_cpu: dict[tuple[bool, str], list[list[int]]],
    dtype: str,
    full_pass: str,
    max_num_seqs: int,
    plain: bool,
) -> None:
    with LLM(bundles[dtype], device="cuda", full_pass=full_pass, max_num_seqs=max_num_seqs, plain=plain) as llm:
        got, again = tokens(llm, "greedy"), tokens(llm, "greedy")
    assert got == again
    # Rounding to a half type may turn a near-tie, and all tokens behind it: the first ones must agree.
    assert [ids[:2] for ids in got] == [ids[:2] for ids in on_the_cpu[plain, "greedy"]]


@pytest.mark.gpu
def test_on_a_gpu_drawn_tokens_are_the_cpus(
    bundles: dict[str, Path], on_the_cpu: dict[tuple[bool, str], list[list[int]]]
) -> None:
    with LLM(bundles["float16"], device="cuda", max_num_seqs=4) as llm:
        got, again = tokens(llm, "sampled"), tokens(llm, "sampled")
    assert got == again
    # A draw that falls on the edge of two tokens may go the other way in half precision.
    pairs = zip(got, on_the_cpu[False, "sampled"], strict=True)
    assert sum(ours[:2] == theirs[:2] for ours, theirs in pairs) >= len(PROMPTS) - 1


@pytest.mark.gpu
def test_on_a_gpu_every_row_of_logits_is_the_oracles(bundles: dict[str, Path]) -> None:
    report = verify_on_device(bundles["bfloat16"], BackendOptions(device="cuda", max_num_seqs=4), quick=True)
    assert report.ok, report.first_divergence


def test_what_is_asked_of_the_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    always = {"device_id": "2", "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested", "sdpa_kernel": "19"}
    assert provider_options(CudaOptions(device_id=2)) == always
    shared = {"user_compute_stream": "77", "enable_cuda_graph": "1"}
    assert provider_options(CudaOptions(device_id=2, stream=77, graphs=True)) == always | shared
    monkeypatch.setenv("ORT_ENABLE_CUDNN_FLASH_ATTENTION", "1")
    assert "sdpa_kernel" not in provider_options(CudaOptions())


def test_ctrl_c_within_the_import_of_onnxruntime_is_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its C++ side raises ImportError from the KeyboardInterrupt."""
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('initialization failed') from KeyboardInterrupt()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "onnxruntime")
    with pytest.raises(KeyboardInterrupt):
        import_onnxruntime()
