"""A tiny DMTD checkpoint and its bundle, and small texts and tasks beside them: made once a session."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import ExportOptions
from dmtd_models.reference.testing import write_tiny_checkpoint

SPLIT = {"num_encoding_layers": 1, "num_thinking_layers": 2, "num_decoding_layers": 2, "mtp_horizon": 3}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """E1 T2 D2, cycle of 3, that records no convention."""
    return write_tiny_checkpoint(
        tmp_path_factory.mktemp("model") / "checkpoint", family="llama", layers=5, tokenizer=True, dmtd=SPLIT
    )


@pytest.fixture(scope="session")
def bundle(checkpoint: Path) -> Path:
    """Of the checkpoint, with the default convention."""
    directory = checkpoint.parent / "bundle"
    export_bundle(checkpoint, directory, ExportOptions(max_num_seqs=2))
    return directory


@pytest.fixture(scope="session")
def plain_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model: other weights, no DMTD fields, the same tokenizer."""
    directory = tmp_path_factory.mktemp("base") / "base"
    return write_tiny_checkpoint(directory, family="llama", layers=5, tokenizer=True, seed=5)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """prose.txt, documents.jsonl, choices.jsonl, questions.jsonl."""
    directory = tmp_path_factory.mktemp("data")
    (directory / "prose.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    documents = [{"text": f"Document {i}. " + "Water is wet, and fire is not. " * (3 + i % 4)} for i in range(11)]
    (directory / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)))
    choices = [
        {"prompt": f"Question {i}: what?", "choices": [" the first", " another one", " no" + "!" * i], "answer": i % 3}
        for i in range(6)
    ]
    (directory / "choices.jsonl").write_text("\n".join(map(json.dumps, choices)))
    questions = [
        {"messages": [{"role": "user", "content": f"Say {i}"}], "accepted": ["a", "e"], "max_new_tokens": 6 + i}
        for i in range(4)
    ]
    (directory / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    return directory
