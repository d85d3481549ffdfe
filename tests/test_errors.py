"""One tree of errors: its picture is the tree, and what a user can call raises nothing else for bad input."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from bundles import make_bundle, make_checkpoint
from test_imports import ALL_MODULES, parsed

import dmtd_errors
from dmtd_errors import DmtdError, at_fault
from dmtd_export.bundle.export import export_bundle
from dmtd_export.engines.options import BuildOptions
from dmtd_export.engines.run import build_engines, preview
from dmtd_export.evaluate import EvaluateOptions, evaluate
from dmtd_export.options import ExportOptions
from dmtd_export.verify import verify_bundle, verify_on_device
from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.config.model import SplitOptions
from dmtd_models.errors import ModelError
from dmtd_runtime import LLM, AsyncLLM, RequestError, SamplingParams
from dmtd_runtime.backends.base import BackendOptions

SPLIT = ExportOptions(split=SplitOptions(decoding_layers=2, cycle_length=3), verify=False)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("errors"))


def depths() -> dict[str, int]:
    """How far below DmtdError each of our classes stands, by the sources: importing them all takes long."""
    trees = [parsed(path) for _, _, path in ALL_MODULES]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    bases = {node.name: [ast.unparse(base).rpartition(".")[2] for base in node.bases] for node in classes}
    found = {DmtdError.__name__: 0}
    while more := {
        name: found[base] + 1 for name in bases.keys() - found.keys() for base in bases[name] if base in found
    }:
        found |= more
    assert len([node for node in classes if node.name in found]) == len(found), "two errors of one name"
    return found


def test_the_picture_is_the_tree() -> None:
    drawn = re.findall(r"^    ([ │]*)[├└]── (\w+)", dmtd_errors.__doc__ or "", flags=re.MULTILINE)
    assert {DmtdError.__name__: 0, **{name: len(indent) // 4 + 1 for indent, name in drawn}} == depths()


def test_errors_from_within_name_what_led_there_unless_they_name_something() -> None:
    for given, told in ((None, "base: got a file"), ("device", "device: got a file")):
        with pytest.raises(ModelError, match=told) as raised, at_fault("base"):
            raise ModelError("got a file", param=given)
        assert (raised.value.param, raised.value.problem) == (given or "base", "got a file")


def test_an_error_names_what_is_at_fault_and_can_be_sent_to_another_process() -> None:
    error = RequestError("got 0, expected at least 1", param="max_num_seqs")
    assert str(error) == "max_num_seqs: got 0, expected at least 1"
    sent = copy.copy(error)  # as pickle does
    assert (str(sent), sent.param, sent.problem) == (str(error), error.param, error.problem)
    assert RequestError("busy").param is None
    assert issubclass(RequestError, ValueError) and issubclass(ModelError, ValueError)


NOWHERE = Path("/no/such/place")
BAD: dict[str, Callable[[Path, Path], object]] = {
    "export: no checkpoint": lambda bundle, place: export_bundle(NOWHERE, place / "b", SPLIT),
    "export: a damaged checkpoint": lambda bundle, place: export_bundle(damaged(place), place / "b", SPLIT),
    "export: no split": lambda bundle, place: export_bundle(bundle.parent / "checkpoint", place / "b", ExportOptions()),
    "open_checkpoint": lambda bundle, place: open_checkpoint(NOWHERE).__enter__(),
    "verify": lambda bundle, place: verify_bundle(NOWHERE),
    "verify on a device": lambda bundle, place: verify_on_device(NOWHERE, BackendOptions()),
    "build": lambda bundle, place: build_engines(NOWHERE, BuildOptions(backend="simulator")),
    "build: preview": lambda bundle, place: preview(NOWHERE, BuildOptions(backend="simulator")),
    "evaluate: nowhere": lambda bundle, place: evaluate(NOWHERE, None, EvaluateOptions(texts=("x",))),
    "evaluate: no such text": lambda bundle, place: evaluate(bundle, None, EvaluateOptions(texts=("no such text",))),
    "LLM: nowhere": lambda bundle, place: LLM(NOWHERE),
    "finetune": lambda bundle, place: finetune(place, NOWHERE),
    "finetune: no split": lambda bundle, place: finetune(place, bundle.parent / "checkpoint"),
}
NAMED: dict[str, Callable[[Path, Path], object]] = {
    "max_num_seqs": lambda bundle, place: LLM(bundle, max_num_seqs=0),
    "max_model_len": lambda bundle, place: LLM(bundle, max_model_len=10**6),
    "threads": lambda bundle, place: LLM(bundle, threads=0),
    "backend": lambda bundle, place: LLM(bundle, backend="host"),  # type: ignore[arg-type]
    "plain": lambda bundle, place: LLM(bundle, plain=1),  # type: ignore[arg-type]
    "temperature": lambda bundle, place: SamplingParams(temperature=-1),
    "logit_bias": lambda bundle, place: SamplingParams(logit_bias={-1: 1.0}),
    "stop": lambda bundle, place: SamplingParams(stop=[""]),
    "prompts": lambda bundle, place: generated(bundle, lambda llm: llm.generate([])),
    "prompt": lambda bundle, place: generated(bundle, lambda llm: llm.generate([[10**6]])),
    "timeout_s": lambda bundle, place: generated(bundle, lambda llm: llm.generate([[1]], timeout_s=0)),
    "priority": lambda bundle, place: generated(bundle, lambda llm: llm.generate([[1]], priority="high")),  # type: ignore[arg-type]
    "cache_salt": lambda bundle, place: generated(bundle, lambda llm: llm.generate([[1]], cache_salt="")),
    "request_id": lambda bundle, place: generated(bundle, lambda llm: llm.stream([1], request_id="")),
    "max_num_queued_reqs": lambda bundle, place: AsyncLLM(bundle, max_num_queued_reqs=0),
    "messages[0].role": lambda bundle, place: generated(bundle, lambda llm: llm.chat([{"role": 1, "content": "x"}])),
    "window_len": lambda bundle, place: EvaluateOptions(window_len=1),
    "limit": lambda bundle, place: EvaluateOptions(limit=0),
    "prefill_chunk": lambda bundle, place: preview(bundle, BuildOptions(backend="simulator", prefill_chunk=10**6)),
    "cycle_length": lambda bundle, place: export_bundle(
        bundle.parent / "checkpoint",
        place / "b",
        ExportOptions(split=SplitOptions(decoding_layers=2, cycle_length=999)),
    ),
}


def damaged(place: Path) -> Path:
    checkpoint = make_checkpoint(place / "checkpoint")
    [weights] = checkpoint.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    return checkpoint


def generated(bundle: Path, ask: Callable[[LLM], object]) -> None:
    with LLM(bundle, threads=1) as llm:
        ask(llm)


def finetune(place: Path, base: Path) -> None:
    from dmtd_models.finetune.job import run_job
    from dmtd_models.finetune.options import BatchOptions, Job, LossOptions, TrainOptions

    train = TrainOptions(precision="float32", loss=LossOptions(), batch=BatchOptions())
    run_job(Job(base=base, output=place / "out", data=("no such data",), train=train))


@pytest.mark.parametrize("call", BAD.values(), ids=BAD)
def test_bad_input_is_an_error_of_the_tree(call: Callable[[Path, Path], object], bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(DmtdError) as caught:
        call(bundle, tmp_path)
    assert str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("param", "call"), NAMED.items(), ids=NAMED)
def test_what_is_at_fault_is_named_as_its_caller_wrote_it(
    param: str, call: Callable[[Path, Path], object], bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(DmtdError) as caught:
        call(bundle, tmp_path)
    assert caught.value.param == param
    assert str(caught.value).startswith(f"{param}: ") and "--" not in caught.value.problem.partition(";")[0]
