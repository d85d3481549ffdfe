"""``dmtd export BASE --adapter A``: the bundle of the tuned model, without its checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_support import opened, spec_of
from typer.testing import CliRunner

from dmtd_export.cli.main import app
from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.finetune.options import TrainOptions
from dmtd_models.finetune.result import save_adapter, save_checkpoint
from dmtd_models.finetune.run import _student
from dmtd_models.reference.dmtd import DmtdModel
from dmtd_models.reference.oracle import greedy
from dmtd_models.reference.testing import write_tiny_checkpoint

PROMPT = [7, 3, 11, 2, 5, 19, 23]
NEW_TOKENS = 12


def dmtd(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, arguments, prog_name="dmtd")
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module", params=["lora", "late"])
def places(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base, an adapter of it and the checkpoint with the same weights."""
    root = tmp_path_factory.mktemp(request.param)
    base = write_tiny_checkpoint(root / "base", family="llama", seed=5)
    with opened(base, decoding_layers=2, cycle_length=3) as (checkpoint, _):
        spec = replace(spec_of(), convention_recorded=True)
        plain = DmtdModel.from_reader(checkpoint.config, spec, checkpoint.read, torch.float32).requires_grad_(False)
        student = _student(checkpoint, plain, TrainOptions(precision="float32", trained=request.param, lora_rank=3))
        random = torch.Generator().manual_seed(2)
        for value in student.parameters():
            if value.requires_grad:
                value.data += 0.1 * torch.randn(value.shape, generator=random)
        save_adapter(checkpoint, spec, student, root / "adapter")
        save_checkpoint(checkpoint, spec, student, root / "tuned")
    return {"kind": request.param, **{name: str(root / name) for name in ("base", "adapter", "tuned")}}


def generated(bundle: str, *options: str) -> list[int]:
    told = dmtd(
        *("generate", bundle, "--token-ids", ",".join(map(str, PROMPT)), "--max-tokens", str(NEW_TOKENS)),
        *("--greedy", "--ignore-eos", "--json", "--threads", "1", *options),
    )
    return json.loads(told.stdout)["token_ids"]


def test_the_bundle_is_that_of_the_tuned_model(places: dict[str, str], tmp_path: Path) -> None:
    bundle = str(tmp_path / "b")
    export = ["export", places["base"], "--adapter", places["adapter"], "-o", bundle, "--max-num-seqs", "1", "--json"]
    done = dmtd(*export)
    told = json.loads(done.stdout)
    assert told["verification"]["ok"] is True and told["verification"]["level"] == "oracle"
    assert told["dmtd_trained"] is True and "not trained" not in done.stderr
    assert (told["decoding_layers"], told["cycle_length"], told["cycle_origin"]) == (2, 3, "prompt")
    with open_checkpoint(Path(places["base"]), Path(places["adapter"])) as adapted:
        assert adapted.dmtd is not None
        model = DmtdModel.from_reader(adapted.config, adapted.dmtd, adapted.read, torch.float32)
    expected = greedy(model, PROMPT, NEW_TOKENS)
    top = expected.logits.topk(2).values
    assert float((top[:, 0] - top[:, 1]).min()) > 4e-5 * float(expected.logits.abs().max()), "choose another seed"
    found = generated(bundle)
    assert found == list(expected.token_ids)
    dmtd("verify", bundle, "--checkpoint", places["base"], "--adapter", places["adapter"])
    if places["kind"] == "lora":  # factors lose nothing; a delta is cut to 8 bits
        other = str(tmp_path / "tuned")
        dmtd("export", places["tuned"], "-o", other, "--max-num-seqs", "1", "--no-verify")
        assert generated(other) == found


def test_an_adapter_of_another_model_is_one_line(places: dict[str, str], tmp_path: Path) -> None:
    other = write_tiny_checkpoint(tmp_path / "other", family="llama", seed=6)
    done = dmtd("export", str(other), "--adapter", places["adapter"], "-o", str(tmp_path / "b"), code=2)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "fingerprint" in lines[0] and lines[0].startswith("error: --adapter: ")
    assert not (tmp_path / "b").exists()


def test_a_directory_without_an_adapter_is_one_line(places: dict[str, str], tmp_path: Path) -> None:
    done = dmtd("export", places["base"], "--adapter", str(tmp_path), "-o", str(tmp_path / "b"), code=2)
    assert f"error: --adapter: {tmp_path}: no adapter" in done.stderr and "Traceback" not in done.output
