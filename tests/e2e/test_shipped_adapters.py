"""The adapters in models/: small enough, with a card that says what was recorded, and text that people would read.

By default each opens over its base and moves the weights that it should. Under ``slow``, SmolLM2-135M with an adapter is
exported and asked through the runtime, greedily, in cycles, and the plain model reads what was written: three questions, then
everything that both adapters are judged by.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dmtd_export.bundle.export import export_bundle
from dmtd_export.evaluate import EvaluateOptions, OpenOptions
from dmtd_export.evaluate import evaluate as run_evaluation
from dmtd_export.evaluate.fluency import distinct_share
from dmtd_export.evaluate.generation import GenerationResult
from dmtd_export.evaluate.report import EvaluationReport
from dmtd_export.options import ExportOptions
from dmtd_models.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dmtd_models.config.model import SplitOptions, resolve_dmtd
from dmtd_models.reference import oracle
from dmtd_models.reference.dmtd import DmtdModel
from dmtd_runtime import LLM, SamplingParams
from study import smollm2
from study.text import facts, write_lines

MODELS = Path(__file__).resolve().parents[2] / "models"
FASTER, TRUER = "smollm2-135m-e4-d8-tau4", "smollm2-135m-e4-d8-tau2"
ADAPTERS = (FASTER, TRUER)
CACHE = smollm2.default_cache_dir()  # now, before a fixture gives the tests a cache directory of their own
FACTS = 48
FACTS_KEPT = 0.8
QUESTIONS = (
    "What colour is the sky on a clear day?",
    "Write two sentences about the sea.",
    "Why do people sleep at night?",
)


in_repository = pytest.mark.skipif(
    not all((MODELS / name / "adapter_model.safetensors").is_file() for name in ADAPTERS),
    reason="the adapters' weights are in the repository, not in the sdist",
)


@pytest.fixture(scope="module")
def gguf() -> Path:
    return smollm2.fetch_smollm2(CACHE)


@pytest.fixture(scope="module")
def base(gguf: Path) -> Checkpoint:
    return open_checkpoint(gguf)


@pytest.fixture(scope="module")
def plain(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = tmp_path_factory.mktemp("plain") / "bundle"
    export_bundle(
        gguf,
        bundle,
        ExportOptions(split=SplitOptions(decoding_layers=8, cycle_length=4), target="onnxruntime", max_num_seqs=8),
    )
    return bundle


@pytest.fixture(scope="module", params=ADAPTERS)
def adapter(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def report(adapter: str, gguf: Path, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluationReport:
    bundle = tmp_path_factory.mktemp("adapted") / "bundle"
    export_bundle(gguf, bundle, ExportOptions(target="onnxruntime", max_num_seqs=8), adapter=MODELS / adapter)
    items = bundle.with_name("facts.jsonl")
    write_lines(items, facts())
    try:
        alone = OpenOptions(threads=1)  # thread pools that share cores spin against each other
        chosen = EvaluateOptions(tasks=(str(items),), limit=FACTS, fluency=True, open=alone)
        return run_evaluation(bundle, plain, chosen)
    finally:
        shutil.rmtree(bundle)


@in_repository
def test_an_adapter_moves_the_late_layers_of_its_base(adapter: str, gguf: Path, base: Checkpoint) -> None:
    """The weights' own digests, of base and adapter, are compared at opening."""
    with open_checkpoint(gguf, MODELS / adapter) as tuned:
        assert tuned.dmtd.trained and (tuned.dmtd.encoding_layers, tuned.dmtd.decoding_layers) == (4, 8)
        for name, moved in (("layers.29.mlp.down_proj", True), ("layers.21.mlp.down_proj", False)):
            one, other = (np.float32(each.read(f"model.{name}.weight")) for each in (tuned, base))
            share = np.linalg.norm(one - other) / np.linalg.norm(other)
            assert 0.001 < share < 0.5 if moved else share == 0


@pytest.mark.slow
def test_text_of_the_longer_cycles_is_fluent(gguf: Path, tmp_path: Path) -> None:
    """The short form of what is judged below: three everyday questions, answered in cycles of 4."""
    export_bundle(gguf, tmp_path, ExportOptions(target="onnxruntime", max_num_seqs=1), adapter=MODELS / FASTER)
    texts = []
    with LLM(tmp_path, threads=1) as llm:
        for question in QUESTIONS:
            prompt = llm.tokenizer.encode(llm.render_chat([{"role": "user", "content": question}]))
            [output] = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=32))
            texts.append((prompt, output.outputs[0].token_ids))
    with open_checkpoint(gguf) as checkpoint:
        spec = resolve_dmtd(checkpoint.config, None, SplitOptions(decoding_layers=8, cycle_length=4))
        plain = DmtdModel.from_reader(checkpoint.config, spec, checkpoint.read, torch.float32)
    nats: list[float] = []
    for prompt, ids in texts:
        assert len(ids) >= 16 and distinct_share(ids) >= 0.8
        logits = oracle.teacher_forced(plain, [*prompt, *ids], len(prompt), plain=True)[len(prompt) - 1 : -1]
        nats += torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="none").tolist()
    assert sum(nats) / len(nats) <= 2.5


@pytest.mark.slow
@in_repository
def test_text_is_fluent(report: EvaluationReport) -> None:
    """Nats a token under the plain model: human prose has 2.5 to 3.4, random tokens 11; a loop is likely too, so 3-grams."""
    assert report.fluency is not None and report.cycle.dmtd_trained
    written, own = report.fluency.model, report.fluency.base
    assert len(written.texts) == 20 and all(len(text.split()) >= 5 for text in written.texts)
    assert written.nll.value <= 2.0
    assert written.distinct_3grams >= 0.8 * own.distinct_3grams


@pytest.mark.slow
def test_facts_are_kept(report: EvaluationReport) -> None:
    """Facts that the plain model answers in all of five wordings, and how many of them the cycles answer in most."""
    [facts] = report.tasks
    assert isinstance(facts, GenerationResult) and facts.items == FACTS
    known, kept = facts.scores.solved
    assert known >= 10
    assert kept >= FACTS_KEPT * known


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_card_says_what_was_recorded(name: str, tmp_path: Path, repo_root: Path) -> None:
    copy = tmp_path / name
    copy.mkdir()
    for file in (MODELS / name).glob("*.json"):
        shutil.copy2(file, copy)
    subprocess.run([sys.executable, repo_root / "tools" / "adapter_card", copy], check=True)
    card = (MODELS / name / "README.md").read_text(encoding="utf-8")
    assert card == (copy / "README.md").read_text(encoding="utf-8")
    costs = json.loads((copy / "formats.json").read_text(encoding="utf-8"))["formats"]
    for most, formats in ((1.01, ("keep", "int8")), (1.05, ("int4",))):
        assert all(
            costs[name]["cycles"]["overall"]["ratio"] <= most and f"`--weights {name}`" in card for name in formats
        )
    recorded = json.loads((copy / "evaluation.json").read_text(encoding="utf-8"))["fluency"]
    assert len(recorded["prompts"]) == 20
    for prompt, text in zip(recorded["prompts"], recorded["model"]["texts"], strict=True):
        assert f"**{prompt}**" in card and all(line in card for line in text.strip().splitlines())


@in_repository
def test_adapters_are_small() -> None:
    found = sorted(path.parent.name for path in MODELS.glob("*/adapter_config.json"))
    assert found == sorted(ADAPTERS), "every adapter is tested"
    sizes = [(MODELS / name / "adapter_model.safetensors").stat().st_size for name in ADAPTERS]
    assert max(sizes) <= 40_000_000 and sum(sizes) <= 80_000_000
