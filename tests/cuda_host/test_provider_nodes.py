"""Over quantised weights in half precision every node of ONNX Runtime's own graphs is the CUDA provider's, but for shapes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from cuda_host.cases import IN_BLOCKS, INT4, MAX_BATCH, Case, Model
from cuda_host.trace import Opened
from packed_files import Packed, awq

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import ExportOptions, WeightOptions
from dmtd_models.config.model import SplitOptions
from dmtd_runtime.bundle.manifest import load_manifest

pytestmark = pytest.mark.cuda_host

OPEN = """
import sys
from pathlib import Path
from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.backends.opening import open_backend
from dmtd_runtime.bundle.opening import open_bundle
bundle = Path(sys.argv[1])
open_backend(bundle, open_bundle(bundle), BackendOptions(device="cuda", max_num_seqs=4, warm_up=True)).close()
print("opened")
"""
Ran = tuple[list[Opened], subprocess.CompletedProcess[str]]
WRITES_OUT = "BitsKernelI"  # Dequantize4BitsKernel, Dequantize8BitsKernel
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
HALF = {"float16": "6__half", "bfloat16": "NS_8BFloat16E"}  # as names of kernels are mangled


@pytest.mark.parametrize("model", IN_BLOCKS, ids=[model.name for model in IN_BLOCKS])
def test_every_node_but_shapes_runs_on_the_device(model: Model, tmp_path: Path) -> None:
    bundle = model.export(tmp_path)
    manifest = load_manifest(bundle)
    graphs = [
        graph.file
        for graph in manifest.decoder_graphs
        if graph.dialect == "onnxruntime" and graph.slots in (1, MAX_BATCH)
    ]
    for file, nodes in placed(bundle, graphs).items():
        assert {*nodes.values()} <= {CPU, CUDA}
        on_cpu = [name for name, provider in nodes.items() if provider == CPU]
        assert all(name.endswith("/shape/Concat") for name in on_cpu), file
        kinds = Counter(name.rpartition("/")[2] for name in nodes)
        products = kinds["MatMulNBits"]
        assert products >= 9 and kinds["GatherBlockQuantized"] == (1 if "input_ids" in inputs_of(manifest, file) else 0)
        # Scales and offsets are constants by then: nothing of theirs is computed in a run.
        assert not [name for name in nodes if name.startswith("/stored/") or "/offsets/moved" in name]
        minimums = [name for name in weights_of(manifest, file) if name.partition("+")[0].endswith(".minimums")]
        assert bool(kinds["ReduceSum"]) == bool(minimums) and kinds["DequantizeLinear"] == 0


def placed(bundle: Path, graphs: list[str]) -> dict[str, dict[str, str]]:
    """The provider of every node that runs, by its name, in each graph."""
    command = [sys.executable, "-m", "cuda_host.place", *(str(bundle / file) for file in graphs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = {one["graph"]: one["nodes"] for one in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == {*graphs}
    return found


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_zero_points_are_constants_of_products(tmp_path: Path, dtype: Literal["float16", "bfloat16"]) -> None:
    Packed(tmp_path / "checkpoint", awq, {"quant_method": "awq", "bits": 4, "version": "gemm"})
    options = ExportOptions(
        split=SplitOptions(decoding_layers=1, cycle_length=2),
        dtype=dtype,
        formats=WeightOptions(weights="keep"),
        target="onnxruntime",
        max_num_seqs=MAX_BATCH,
    )
    bundle = tmp_path / "bundle"
    export_bundle(tmp_path / "checkpoint", bundle, options)
    for nodes in placed(bundle, ["thinking.ort.onnx", "late_decode.ort.onnx"]).values():
        assert any(name.endswith("MatMulNBits") for name in nodes)
        assert not [name for name in nodes if "/zeros" in name or name.startswith("/stored/")]
        assert all(provider == CUDA or name.endswith("/shape/Concat") for name, provider in nodes.items())
    done = subprocess.run(
        [sys.executable, "-c", OPEN, bundle], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "opened\n"), done.stderr[-2000:]


def inputs_of(manifest, file: str) -> set[str]:
    [graph] = [graph for graph in manifest.graphs if graph.file == file]
    return {info.name for info in graph.inputs}


def weights_of(manifest, file: str) -> tuple[str, ...]:
    [graph] = [graph for graph in manifest.graphs if graph.file == file]
    return graph.weights


@pytest.mark.parametrize("model", [INT4, replace(INT4, dtype="bfloat16")], ids=lambda model: model.dtype)
def test_a_bundle_of_links_is_opened(model: Model, tmp_path: Path) -> None:
    """ONNX Runtime follows none, and makes constants of scales and minimums, which lie on the host."""
    bundle, links = model.export(tmp_path), tmp_path / "links"
    links.mkdir()
    for path in bundle.iterdir():
        (links / path.name).symlink_to(path)
    done = subprocess.run([sys.executable, "-c", OPEN, links], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "opened\n"), done.stderr[-2000:]


def test_sums_over_blocks_are_float32s_inside(ran: Ran, case: Case) -> None:
    """The kernel's types, by its mangled name: what it reads, what it writes, what it adds up in."""
    names = {
        call.words.split()[0] for opened in ran[0] for call in opened.calls if "reduce_matrix_columns" in call.words
    }
    wants = case.model.formats.weights == "int4" and case.dialect == "onnxruntime"
    if not wants:
        pytest.skip("sums nothing, or float32 values")
    half = HALF[case.model.dtype]
    assert any(f"I{half}S3_f" in name for name in names), names
    assert all(re.search(r"reduce_matrix_columns_kernelI\w+?f\w*NS0_8Identity", name) for name in names), names


def test_late_steps_read_codes(ran: Ran, case: Case) -> None:
    """Few rows: up to 5 over 8 bits, up to 16 over 4. Prompts of more write whole matrices out."""
    if case.model.formats.weights is None or case.dialect != "onnxruntime":
        pytest.skip("no products over blocks")
    written = {
        kind: [
            call
            for opened in ran[0]
            for step in opened.warm_steps(kind)
            for call in step.calls
            if WRITES_OUT in call.words
        ]
        for kind in ("late", "prefill")
    }
    assert written["late"] == [] and written["prefill"] != []
