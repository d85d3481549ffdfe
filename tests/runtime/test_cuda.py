"""ONNX Runtime's CUDA provider: refused in one line where it is missing; on a GPU, tokens as the CPU's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dmtd_export.export import export_bundle
from dmtd_export.options import ExportOptions
from dmtd_models.testing import write_tiny_checkpoint
from dmtd_runtime import LLM, BackendError, SamplingParams
from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.backends.cuda_provider import CUDA_PROVIDER
from dmtd_runtime.backends.ort_library import import_onnxruntime
from dmtd_runtime.backends.ort_session import provider_options

PROMPTS = [[1, 2, 3], [4] * 9, [5, 6]]
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def bundle(root: Path, dtype: str) -> Path:
    source = write_tiny_checkpoint(root / "model", family="llama", layers=5, dtype="bfloat16")
    export_bundle(source, root / dtype, ExportOptions(decoding_layers=2, cycle_length=3, dtype=dtype))
    return root / dtype


def test_a_missing_provider_is_refused_and_never_replaced_by_the_cpu(tmp_path: Path) -> None:
    if CUDA_PROVIDER in import_onnxruntime().get_available_providers():
        pytest.skip("this ONNX Runtime has the CUDA provider")
    with pytest.raises(BackendError, match=r"no CUDAExecutionProvider.*dmtd\[gpu\]"):
        LLM(bundle(tmp_path, "float16"), device="cuda")


def test_a_float32_bundle_is_refused_with_the_export_option(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="--dtype bfloat16"):
        LLM(bundle(tmp_path, "float32"), device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("full_pass", ["staged", "fused"])
@pytest.mark.parametrize("max_num_seqs", [1, 4])
@pytest.mark.parametrize("plain", [False, True])
def test_on_a_gpu_most_tokens_are_the_cpus(
    tmp_path: Path, dtype: str, full_pass: str, max_num_seqs: int, plain: bool
) -> None:
    with LLM(bundle(tmp_path, "float32"), plain=plain) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)]
    with LLM(
        bundle(tmp_path / "half", dtype), device="cuda", full_pass=full_pass, max_num_seqs=max_num_seqs, plain=plain
    ) as llm:
        got = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)]
        again = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)]
    assert got == again
    # Rounding to a half type may turn a near-tie, and all tokens behind it: the first ones must agree.
    assert [ids[:2] for ids in got] == [ids[:2] for ids in expected]


def test_what_is_asked_of_the_provider() -> None:
    options = BackendOptions(device="cuda", device_id=2)
    always = {"device_id": "2", "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
    assert provider_options(options, stream=None, graphs=False) == always
    shared = {"user_compute_stream": "77", "enable_cuda_graph": "1"}
    assert provider_options(options, stream=77, graphs=True) == always | shared


def test_ctrl_c_within_the_import_of_onnxruntime_is_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its C++ side raises ImportError from the KeyboardInterrupt."""
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('initialization failed') from KeyboardInterrupt()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "onnxruntime")
    with pytest.raises(KeyboardInterrupt):
        import_onnxruntime()
