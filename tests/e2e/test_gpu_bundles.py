"""The bundles that tools/gpu_check makes in seconds: a shared ring of weights that graphs read as they read any other's."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from dmtd_runtime import LLM, SamplingParams
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import weights_may_overlap
from dmtd_runtime.bundle.opening import open_bundle
from dmtd_runtime.bundle.speed_bound import split_bytes


@pytest.fixture
def tools(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(repo_root / "tools"))
    import gpu_bundles

    monkeypatch.delitem(sys.modules, "gpu_bundles")
    logger = logging.getLogger("dmtd.export")  # which it quietens for good
    before = logger.level
    with weights_may_overlap():  # as tools/gpu_step.py does in a process of its own
        yield gpu_bundles
    logger.setLevel(before)


def test_a_ring_of_weights_runs_and_counts_its_bytes_in_full(
    tools: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "RING_BYTES", 1)  # as small as the largest group: it wraps around
    wanted = tools.Wanted(shape="tiny-ring", dtype="float32", tau=3, late=2)
    options = {"checkpoint": None, "max_num_seqs": 2, "max_model_len": 96}
    bundle = tools.make_bundle(wanted, tmp_path / "ring", **options)
    assert tools.make_bundle(wanted, tmp_path / "ring", **options) == bundle  # it is not made twice
    manifest = open_bundle(bundle)
    file, weights = bundle / contract.WEIGHTS_FILE, manifest.weights
    assert file.stat().st_size < sum(info.length for info in weights.values()) / 2
    assert split_bytes(manifest).stored > 2 * file.stat().st_size
    stacked = re.compile(r"(k_proj|v_proj|up_proj)")  # parts of one matrix, behind its first
    starts = [info.offset for name, info in weights.items() if not stacked.search(name)]
    assert len(set(starts)) == len(starts)  # TensorRT takes two tensors of one address for one
    parts = [weights[f"model.layers.3.self_attn.{kind}_proj.weight"] for kind in "qkv"]
    assert [part.offset + part.length for part in parts[:2]] == [part.offset for part in parts[1:]]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    for plain in (False, True):
        with LLM(bundle, plain=plain, max_num_seqs=2) as llm:
            tokens = [output.outputs[0].token_ids for output in llm.generate([[1, 2, 3], [4]], params)]
        assert len(set(map(tuple, tokens))) == 2  # other prompts, other tokens: the weights are no zeros


def test_the_checkpoint_of_a_ring_takes_no_disk(tools: ModuleType, tmp_path: Path) -> None:
    tools.write_hollow(tmp_path / "hollow", tools.SHAPES["qwen3-4b"])
    file = tmp_path / "hollow" / "model.safetensors"
    assert file.stat().st_size > 8e9
    assert file.stat().st_blocks * 512 < 1e6
