"""Adapters: base and difference give the trained weights, and nothing that does not belong together is joined."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetune_support import opened, reading, spec_of
from safetensors.numpy import load_file, save_file

from dmtd_models.checkpoints.adapter import AdaptedCheckpoint
from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.config.model import read_config
from dmtd_models.errors import ModelError
from dmtd_models.finetune.options import TrainOptions
from dmtd_models.finetune.result import save_adapter
from dmtd_models.finetune.run import _student
from dmtd_models.reference.dmtd import DmtdModel
from dmtd_models.reference.testing import write_tiny_checkpoint

KINDS = ("lora", "delta")
QUERY = "model.layers.3.self_attn.q_proj.weight"


class Made:
    """A base, its adapter and the student whose changes the adapter holds."""

    def __init__(self, root: Path, kind: str, family: str = "qwen3") -> None:
        self.kind = kind
        self.base = write_tiny_checkpoint(root / "base", family=family, seed=5, tokenizer=True)
        self.adapter = root / "adapter"
        trained = {"lora": "lora", "delta": "late"}[kind]
        with opened(self.base, decoding_layers=2, cycle_length=3) as (checkpoint, _):
            spec = spec_of(thinking=2)
            plain = DmtdModel.from_reader(checkpoint.config, spec, checkpoint.read, torch.float32)
            options = TrainOptions(precision="float32", trained=trained, lora_rank=3)
            self.student = _student(checkpoint, plain.requires_grad_(False), options)
            random = torch.Generator().manual_seed(1)
            for value in self.student.parameters():
                if value.requires_grad:
                    value.data += 0.05 * torch.randn(value.shape, generator=random)
            self.lost = save_adapter(checkpoint, replace(spec, cycle_length=4), self.student, self.adapter)
            self.plain = reading(checkpoint, checkpoint.names())

    def read(self) -> dict[str, np.ndarray]:
        with open_checkpoint(self.base, self.adapter) as adapted:
            return reading(adapted, adapted.names())

    def rewrite(self, change: Callable[[dict[str, np.ndarray]], None]) -> None:
        """Change the tensors, as a tool that knows nothing of the digest might."""
        file = self.adapter / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        self.settings(lambda raw: raw.pop("weights_sha256", None))

    def settings(self, change: Callable[[dict[str, Any]], Any]) -> None:
        file = self.adapter / "adapter_config.json"
        raw = json.loads(file.read_text())
        change(raw)
        file.write_text(json.dumps(raw))


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Made:
    return Made(tmp_path, request.param)


def test_a_lora_gives_what_peft_merges(tmp_path: Path) -> None:
    made = Made(tmp_path, "lora")
    merged = {name: value.detach().numpy() for name, value in made.student.model.merge_and_unload().named_parameters()}
    found = made.read()
    assert found.keys() == made.plain.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, merged[name], rtol=1e-6, atol=1e-6, err_msg=name)
    changed = {name for name in found if not np.array_equal(found[name], made.plain[name])}
    assert len(changed) == 4 * 7 and QUERY in changed


def test_peft_itself_reads_a_lora(tmp_path: Path) -> None:
    import warnings

    import peft
    import transformers

    made = Made(tmp_path, "lora")
    plain = transformers.AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft names the fields that it does not know
        merged = peft.PeftModel.from_pretrained(plain, str(made.adapter)).merge_and_unload()
    state = merged.state_dict()
    for name, value in made.read().items():
        np.testing.assert_allclose(value, state[name].numpy(), rtol=1e-6, atol=1e-6, err_msg=name)


def test_a_delta_is_within_half_a_step_of_its_row(tmp_path: Path) -> None:
    made = Made(tmp_path, "delta")
    trained = {
        name.removeprefix("model."): value.detach().numpy()
        for name, value in made.student.named_parameters()
        if value.requires_grad
    }
    found, stored = made.read(), load_file(made.adapter / "adapter_model.safetensors")
    assert len(trained) == 2 * 11 + 1
    clipped = 0
    for name, value in found.items():
        if name not in trained:
            assert np.array_equal(value, made.plain[name]), name
        elif value.ndim == 1:
            np.testing.assert_allclose(value, trained[name], rtol=1e-6, atol=1e-7)
        else:
            assert stored[f"{name}.delta"].dtype == np.int8
            step, error = stored[f"{name}.scale"], np.abs(value - trained[name])
            # Rows may be cut at 127 steps where that costs less than a coarser step: few values, none far out.
            outside = np.abs(trained[name] - made.plain[name]) > 127.5 * step
            assert (error <= 0.5 * step + 1e-6)[~outside].all(), name
            clipped += int(outside.sum())
            largest = np.abs(trained[name] - made.plain[name]).max(axis=1, keepdims=True)
            assert (step <= largest / 127 * 1.0001).all()
    total = sum(value.size for name, value in trained.items() if value.ndim == 2)
    assert clipped < 0.01 * total
    error = sum(float(np.square(found[name] - value, dtype=np.float64).sum()) for name, value in trained.items())
    whole = sum(float(np.square(value - made.plain[name], dtype=np.float64).sum()) for name, value in trained.items())
    assert 0 < made.lost < 0.02
    assert made.lost == pytest.approx((error / whole) ** 0.5, rel=1e-2)


@pytest.mark.parametrize(
    ("family", "model_type"), [("qwen3", "mtpqwen3"), ("llama", "mtpllama"), ("qwen2", "mtpqwen2")]
)
def test_the_configuration_is_the_published_one(tmp_path: Path, family: str, model_type: str) -> None:
    made = Made(tmp_path, "delta", family)
    with open_checkpoint(made.base, made.adapter) as adapted:
        raw = json.loads(adapted.assets()["config.json"])
        assert raw["model_type"] == model_type
        config, spec = read_config(raw)
        assert config == adapted.config and spec == adapted.dmtd
        assert spec is not None and spec.trained and spec.cycle_length == 4
        assert (spec.encoding_layers, spec.thinking_layers, spec.decoding_layers) == (0, 2, 2)
        assert adapted.names() == list(made.plain)
        assert adapted.shape(QUERY) == made.plain[QUERY].shape


def refused(made: Made, words: str, base: Path | None = None) -> None:
    with pytest.raises(ModelError, match=words) as error, open_checkpoint(base or made.base, made.adapter):
        pass
    assert "\n" not in str(error.value)


def test_another_base_is_refused(made: Made, tmp_path: Path) -> None:
    other = write_tiny_checkpoint(tmp_path / "other", seed=6, tokenizer=True)
    refused(made, "made for a model with fingerprint", other)
    stored = write_tiny_checkpoint(tmp_path / "half", seed=5, dtype="bfloat16", tokenizer=True)
    refused(made, "same quantisation", stored)
    fields = {"num_encoding_layers": 0, "num_thinking_layers": 2, "num_decoding_layers": 2, "mtp_horizon": 3}
    trained = write_tiny_checkpoint(tmp_path / "dmtd", seed=5, dmtd=fields, tokenizer=True)
    refused(made, "is a DMTD checkpoint already", trained)


def test_the_base_in_other_files_is_the_same_base(made: Made, tmp_path: Path) -> None:
    sharded = write_tiny_checkpoint(tmp_path / "sharded", seed=5, shards=3, tokenizer=True)
    with open_checkpoint(sharded, made.adapter) as adapted:
        assert np.array_equal(adapted.read(QUERY), made.read()[QUERY])


def test_a_changed_byte_is_found(made: Made) -> None:
    file = made.adapter / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    refused(made, r"adapter_model.safetensors: not the file that adapter_config.json was written with")


def test_missing_and_cut_files(made: Made) -> None:
    file = made.adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    made.settings(lambda raw: raw.pop("weights_sha256", None))
    file.write_bytes(whole[: len(whole) // 2])
    refused(made, r"adapter_model.safetensors: cannot be read")
    file.unlink()
    refused(made, r"adapter_model.safetensors: cannot be read")
    (made.adapter / "adapter_config.json").write_text("{")
    refused(made, "not JSON")
    (made.adapter / "adapter_config.json").write_text("[]")
    refused(made, "expected an object")
    (made.adapter / "adapter_config.json").unlink()
    refused(made, "no adapter")


def first(tensors: dict[str, np.ndarray], part: str) -> str:
    return next(name for name in tensors if part in name)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(first(tensors, "q_proj")),
        lambda tensors: tensors.update({"more": np.zeros(2, np.float32)}),
        lambda tensors: tensors.update({"model.layers.9.mlp.up_proj.weight.delta": np.zeros((2, 2), np.int8)}),
        lambda tensors: tensors.update(
            {f"base_model.model.model.layers.9.q_proj.lora_{f}.weight": np.zeros((2, 2), np.float32) for f in "AB"}
        ),
        lambda tensors: tensors.update(
            {name: np.concatenate((value, value)) for name, value in tensors.items() if "q_proj" in name}
        ),
        lambda tensors: tensors.clear(),
    ],
    ids=["missing", "extra", "unknown delta", "unknown factors", "wrong shape", "none"],
)
def test_tensors_that_do_not_fit_are_refused(made: Made, change: Any) -> None:
    made.rewrite(change)
    refused(made, r"does not fit|expected \[|got \[")


def test_a_scale_of_another_shape_is_refused(tmp_path: Path) -> None:
    made = Made(tmp_path, "delta")
    made.rewrite(lambda tensors: tensors.update({f"{QUERY}.scale": np.ones((1, 64), np.float32)}))
    refused(made, r"q_proj.weight.scale: got \[1, 64\], expected \[64, a divisor of 64\]")
    made.rewrite(lambda tensors: tensors.update({f"{QUERY}.scale": np.ones((64, 7), np.float32)}))
    refused(made, r"q_proj.weight.scale: got \[64, 7\]")


@pytest.mark.parametrize("bits", [3, 5, 6])
def test_a_delta_of_fewer_bits_is_smaller_and_says_what_it_lost(tmp_path: Path, bits: int) -> None:
    made = Made(tmp_path, "delta")
    eight = (made.adapter / "adapter_model.safetensors").stat().st_size
    trained = made.student.state_dict()[f"model.{QUERY}"].numpy()
    with opened(made.base, decoding_layers=2, cycle_length=3) as (checkpoint, _):
        lost = save_adapter(checkpoint, spec_of(thinking=2), made.student, made.adapter, bits)
    assert made.lost < lost < 0.6 / 2 ** (bits - 2)
    assert (made.adapter / "adapter_model.safetensors").stat().st_size < eight
    error = np.linalg.norm(made.read()[QUERY] - trained) / np.linalg.norm(trained - made.plain[QUERY])
    assert error == pytest.approx(lost, rel=0.2)
    made.rewrite(lambda tensors: tensors.update({f"{QUERY}.delta": tensors[f"{QUERY}.delta"][:, :-1]}))
    refused(made, rf"q_proj.weight.delta: got {8 * bits - 1} bytes a row, expected 3 to 7 bits x 64")


def test_factors_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    made = Made(tmp_path, "lora")
    name = f"base_model.model.{QUERY.removesuffix('.weight')}.lora_A.weight"
    made.rewrite(lambda tensors: tensors.update({name: tensors[name][:1]}))
    refused(made, "q_proj.weight: got")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("dmtd_adapter", "ia3", "expected lora or delta"),
        ("base_fingerprint", None, "base_fingerprint"),
        ("num_thinking_layers", 7, "DMTD split"),
        ("prompt_input", "cyclical", "convention"),
    ],
)
def test_a_changed_configuration_is_refused(made: Made, field: str, value: object, words: str) -> None:
    made.settings(lambda raw: raw.update({field: value}))
    with pytest.raises(ModelError, match=words), open_checkpoint(made.base, made.adapter):
        pass


def test_a_rank_of_zero_is_refused(tmp_path: Path) -> None:
    made = Made(tmp_path, "lora")
    made.settings(lambda raw: raw.update(r=0))
    refused(made, "r: got 0")


def test_the_adapter_owns_its_base(made: Made) -> None:
    base = open_checkpoint(made.base)
    with AdaptedCheckpoint(base, made.adapter) as adapted:
        assert adapted.path == made.base
        assert adapted.tokenizer_problem is None


@pytest.mark.parametrize("trained", ["late", "full"])
def test_a_run_begins_where_an_adapter_ended(tmp_path: Path, trained: str) -> None:
    made = Made(tmp_path, "delta")
    spec, expected = spec_of(thinking=2), made.read()
    with open_checkpoint(made.base) as plain, open_checkpoint(made.base, made.adapter) as adapted:
        base = DmtdModel.from_reader(plain.config, spec, plain.read, torch.float32).requires_grad_(False)
        student = _student(adapted, base, TrainOptions(precision="float32", trained=trained))
        found = {name.removeprefix("model."): value.detach().numpy() for name, value in student.named_parameters()}
        assert all(np.array_equal(found[name], value) for name, value in expected.items())
        assert all(np.array_equal(value.numpy(), made.plain[name]) for name, value in base.state_dict().items())


def test_a_run_that_would_lose_part_of_an_adapter_is_refused(tmp_path: Path) -> None:
    made, spec = Made(tmp_path, "delta"), spec_of(thinking=3, decoding=1)
    with open_checkpoint(made.base) as plain, open_checkpoint(made.base, made.adapter) as adapted:
        base = DmtdModel.from_reader(plain.config, spec, plain.read, torch.float32).requires_grad_(False)
        with pytest.raises(ModelError, match=r"initial: it changes model\.layers\.2\..* \(and 10 more\)"):
            _student(adapted, base, TrainOptions(precision="float32"))
