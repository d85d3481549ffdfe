"""What goes into a bundle beside the graphs: tokenizer, chat template and generation_config.json."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from export_support import WARNINGS_OF_PLAIN, export, read_manifest

from dmtd_export.bundle.export import export_bundle
from dmtd_export.errors import ExportError
from dmtd_export.options import ExportOptions
from dmtd_models.config.model import SplitOptions
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime import LLM, RequestError, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("plain") / "m", tie=True, tokenizer=True)


def test_checkpoint_without_tokenizer_warns_and_works_on_token_ids(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_tiny_checkpoint(tmp_path / "m")
    with caplog.at_level(logging.WARNING, "dmtd"):
        export(source, tmp_path / "b")
    assert len(caplog.messages) == WARNINGS_OF_PLAIN
    assert f"{source}: no tokenizer.json: the bundle works on token ids only" in caplog.messages
    assert any("--cycle-origin prompt --prompt-input thinking" in message for message in caplog.messages)
    with LLM(tmp_path / "b", threads=1) as llm:
        [output] = llm.generate([[1, 2, 3]], GREEDY)
        assert len(output.outputs[0].token_ids) == 6
        with pytest.raises(RequestError, match="no tokenizer: give token ids"):
            llm.generate("words", GREEDY)


def test_tokenizer_config_and_template_are_carried_over_byte_for_byte(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "m", tokenizer=True)
    own = {
        "chat_template.jinja": b"{# \xc3\xbc #}{{ messages[0]['content'] }}\r\n",
        "generation_config.json": b'{ "do_sample":true,\r\n "temperature": 0.5 }',  # Windows line ends
        "special_tokens_map.json": b"{}\n\n",
    }
    for name, content in own.items():
        (source / name).write_bytes(content)
    (source / "notes.txt").write_text("not part of a bundle")
    export(source, tmp_path / "b")
    for name in (*own, "tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (tmp_path / "b" / name).read_bytes() == (source / name).read_bytes(), name
    assert not (tmp_path / "b/notes.txt").exists()


def test_template_inside_the_tokenizer_config_becomes_a_file(plain: Path, tmp_path: Path) -> None:
    export(plain, tmp_path / "b")
    inside = json.loads((plain / "tokenizer_config.json").read_text())["chat_template"]
    assert (tmp_path / "b/chat_template.jinja").read_bytes() == inside.encode()


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (None, {"eos_token_id": [258, 7], "do_sample": True, "temperature": 0.5}),
        ("none", {"eos_token_id": [258, 7]}),  # ends are no option
        ("FILE", {"temperature": 0.25}),
    ],
)
def test_generation_config_is_the_checkpoints_the_users_or_none(
    tmp_path: Path, wanted: str | None, expected: dict[str, Any]
) -> None:
    source = write_tiny_checkpoint(tmp_path / "m", layers=2, tokenizer=True)
    (source / "generation_config.json").write_text(
        '{"eos_token_id": [258, 7], "do_sample": true, "temperature": 0.5}', encoding="utf-8"
    )
    own = tmp_path / "own.json"
    own.write_text('{"temperature": 0.25}', encoding="utf-8")
    options = ExportOptions(
        split=SplitOptions(decoding_layers=1, cycle_length=2),
        generation_config=str(own) if wanted == "FILE" else wanted,
    )
    export_bundle(source, tmp_path / "b", options)
    assert json.loads((tmp_path / "b/generation_config.json").read_text(encoding="utf-8")) == expected
    # Whoever reads the manifest alone knows all ends.
    assert read_manifest(tmp_path / "b")["model"]["eos_token_ids"] == expected.get("eos_token_id", [258])


def test_a_generation_config_that_is_in_the_way_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_tiny_checkpoint(tmp_path / "m", layers=2, tokenizer=True)
    options = ExportOptions(split=SplitOptions(decoding_layers=1, cycle_length=2))
    for content in ('{"do_sample": true, "top_p": 7}', "{", '{"eos_token_id": "x"}'):
        (source / "generation_config.json").write_text(content, encoding="utf-8")
        with pytest.raises(ExportError, match=r"generation_config\.json.* leave it out with --generation-config none"):
            export_bundle(source, tmp_path / "b", options)
    for name in (str(tmp_path), "none/such"):
        with pytest.raises(ExportError, match=r"^generation_config: .* cannot be read"):
            export_bundle(source, tmp_path / "b", replace(options, generation_config=name))
    (source / "generation_config.json").write_text('{"do_sample": false, "top_p": 0.0}', encoding="utf-8")
    with caplog.at_level(logging.WARNING, "dmtd"):
        export_bundle(source, tmp_path / "b", options)
    assert [line for line in caplog.messages if "top_p: got 0, " in line and line.endswith("do_sample is not true")]
