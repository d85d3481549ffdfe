"""From a checkpoint to tokens by the commands alone: `dmtd export` (verified), then `dmtd generate`, against the oracle.

Small random checkpoints in every form that may be met; the real model is ``tools/demo``'s.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_files import Packed, awq, gptq
from typer.testing import CliRunner

from dmtd_export.cli.main import app
from dmtd_export.verify.stored import stored_weight
from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.config.model import Rope, SplitOptions, resolve_dmtd
from dmtd_models.reference.dmtd import DmtdModel
from dmtd_models.reference.oracle import OracleRun, greedy
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime.bundle.manifest import load_manifest

PROMPT = [7, 3, 11, 2, 5, 19, 23, 4, 8]
NEW_TOKENS = 14
CLEAR = (
    4e-5  # of the largest |logit|, twice the float32 margin: the oracle's choices are clearer, so tokens must be equal
)
# Choices are ahead by this share of the largest logit: inputs rounded to int8 moved logits of these two by 0.023 and 0.031.
CLEAR_OF_INT8, CLEAR_STEPS = 0.06, 6
PUBLISHED: dict[str, dict[str, Any]] = {  # quantization_config as GPTQModel and AutoAWQ write it
    "gptq": {
        "bits": 4,
        "checkpoint_format": "gptq",
        "damp_percent": 0.01,
        "desc_act": False,
        "dynamic": None,
        "group_size": 32,
        "lm_head": False,
        "meta": {"quantizer": ["gptqmodel:1.4.0"], "uri": "https://github.com/modelcloud/gptqmodel"},
        "pack_dtype": "int32",
        "quant_method": "gptq",
        "static_groups": False,
        "sym": True,
        "true_sequential": True,
    },
    "awq": {
        "backend": "autoawq",
        "bits": 4,
        "do_fuse": False,
        "exllama_config": None,
        "fuse_max_seq_len": None,
        "group_size": 32,
        "modules_to_fuse": None,
        "modules_to_not_convert": None,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A checkpoint, and what its export is told beyond what it records."""

    name: str
    checkpoint: dict[str, Any] = field(default_factory=dict)
    split: dict[str, Any] = field(default_factory=dict)
    warnings: int = 2  # not trained, no tokenizer


ORIGINAL = {"num_encoding_layers": 0, "num_thinking_layers": 3, "num_decoding_layers": 2, "mtp_horizon": 4}
LATER = {
    "num_parallel_layers": 3,
    "num_sequential_layers": 2,
    "mtp_horizon": 3,
    "mask_token_id": 5,
    "dmtd_history_mode": "real",
    "dmtd_block_attention": "none",
}
CASES = [
    Case(name="mtpqwen3, published fields", checkpoint={"dmtd": ORIGINAL, "tie": True}),
    Case(name="dmtdqwen3, published fields", checkpoint={"dmtd": LATER, "dtype": "bfloat16", "shards": 2}),
    Case(
        name="recorded convention",
        checkpoint={"dmtd": ORIGINAL | {"cycle_origin": "absolute", "prompt_input": "cyclical"}},
        warnings=1,
    ),
    Case(
        name="llama, encoding layers, yarn",
        checkpoint={
            "family": "llama",
            "qkv_bias": True,
            "mlp_bias": True,
            "rope": Rope(
                theta=10000.0,
                kind="yarn",
                factor=4.0,
                original_max_positions=64,
                beta_fast=32.0,
                beta_slow=1.0,
            ),
        },
        split={"encoding_layers": 1, "decoding_layers": 2, "cycle_length": 5, "cycle_origin": "absolute"},
    ),
    Case(
        name="qwen2, sum, tau 1",
        checkpoint={"family": "qwen2", "dtype": "float16"},
        split={"decoding_layers": 1, "cycle_length": 1, "prompt_input": "sum"},
    ),
]


def dmtd(*arguments: str) -> tuple[str, str]:
    """(stdout, stderr) of a command that must succeed."""
    result = CliRunner().invoke(app, arguments, prog_name="dmtd")
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def oracle_run(source: Path, split: dict[str, Any], plain: bool, new_tokens: int = NEW_TOKENS) -> OracleRun:
    with open_checkpoint(source) as checkpoint:
        spec = resolve_dmtd(checkpoint.config, checkpoint.dmtd, SplitOptions(**split))
        model = DmtdModel.from_reader(checkpoint.config, spec, checkpoint.read, torch.float32)
        return greedy(model, PROMPT, new_tokens, plain)


def assert_clear(run: OracleRun, share: float = CLEAR) -> None:
    """Every choice is ahead of the next by this share of the largest |logit|."""
    top = run.logits.topk(2).values
    assert float((top[:, 0] - top[:, 1]).min()) > share * float(run.logits.abs().max()), "choose another seed"


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_commands_give_the_oracles_tokens(case: Case, tmp_path: Path) -> None:
    source, bundle = write_tiny_checkpoint(tmp_path / "m", layers=5, **case.checkpoint), str(tmp_path / "b")
    options = [word for name, value in case.split.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    told, warned = dmtd("export", str(source), "-o", bundle, *options, "--max-num-seqs", "1", "--json")
    assert json.loads(told)["verification"]["ok"] is True
    assert json.loads(told)["verification"]["level"] == "oracle"
    assert warned.count("warning: ") == case.warnings
    for plain in (False, True):
        expected = oracle_run(source, case.split, plain)
        assert_clear(expected)
        for way in _ways(plain):
            assert _generated(bundle, way) == list(expected.token_ids), (plain, way)


def _ways(plain: bool) -> list[list[str]]:
    """Every way to run the bundle on the CPU."""
    ways = [[], ["--full-pass", "fused"], ["--dialect", "standard"], ["--dialect", "standard", "--full-pass", "fused"]]
    return [[*way, "--plain"] for way in ways] if plain else ways


def _generated(bundle: str, options: Sequence[str], new_tokens: int = NEW_TOKENS) -> list[int]:
    told, _ = dmtd(
        *("generate", bundle, "--token-ids", ",".join(map(str, PROMPT)), "--max-tokens", str(new_tokens)),
        *("--greedy", "--ignore-eos", "--json", "--threads", "1", *options),
    )
    answer = json.loads(told)
    assert answer["finish_reason"] == "length"
    return answer["token_ids"]


@pytest.mark.parametrize(("name", "seed"), [("gptq", 321), ("awq", 46)])
def test_a_packed_checkpoint_keeps_its_blocks_and_says_what_its_values_say(
    tmp_path: Path, name: str, seed: int
) -> None:
    """Exported as it comes, verified, and held to a float bundle of its values, dequantised by the formats' formula."""
    pack, zeros = (gptq, 8) if name == "gptq" else (awq, "any")
    made = Packed(tmp_path / "m", pack, PUBLISHED[name], zeros=zeros, largest_scale=0.04, seed=seed)
    floats = Path(shutil.copytree(made.directory, tmp_path / "f"))
    made.write_values(floats)
    split = {"decoding_layers": 1, "cycle_length": 3}
    options = ("--decoding-layers", "1", "--cycle-length", "3", "--max-num-seqs", "1")
    told, _ = dmtd("export", str(made.directory), "-o", str(tmp_path / "b"), *options, "--json")
    verification = json.loads(told)["verification"]
    assert verification["ok"] is True and verification["level"] == "oracle"
    manifest = load_manifest(tmp_path / "b")
    assert {weight: fmt.source for weight, fmt in manifest.quantised.items()} == dict.fromkeys(made.values, name)
    for weight, values in made.values.items():
        np.testing.assert_array_equal(stored_weight(tmp_path / "b", manifest, weight), values.astype(np.float32))
    dmtd("export", str(floats), "-o", str(tmp_path / "fb"), *options, "--target", "onnxruntime", "--no-verify")
    for plain in ([], ["--plain"]):
        assert_clear(oracle_run(floats, split, bool(plain), CLEAR_STEPS), CLEAR_OF_INT8)
        expected = _generated(str(tmp_path / "fb"), plain, CLEAR_STEPS)
        assert _generated(str(tmp_path / "b"), plain, CLEAR_STEPS) == expected


def test_a_checkpoint_with_a_tokenizer_chats(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "m", tokenizer=True, dmtd=ORIGINAL, layers=5)
    bundle = str(tmp_path / "b")
    dmtd("export", str(source), "-o", bundle, "--max-num-seqs", "2")
    dmtd("verify", bundle, "--level", "structure")  # its numbers are those that the export has just verified
    text, figures = dmtd("generate", bundle, "-p", "Hello", "--greedy", "--max-tokens", "9", "--ignore-eos")
    assert text and "9 tokens" in figures
    assert dmtd("generate", bundle, "-p", "Hello", "--greedy", "--max-tokens", "9", "--ignore-eos")[0] == text
    assert json.loads(dmtd("inspect", bundle, "--json")[0])["schema"] == 3  # the bundle's
    options = ("--prompt-len", "8", "--max-tokens", "12", "--repeats", "1")
    assert json.loads(dmtd("bench", bundle, *options, "--json")[0])["schema"] == 1
