"""The study's text: chats that the base writes itself, and pieces of free prose and code out of packages.

``tools/study`` starts it, a process a part:

    python tools/study_text.py BASE DIR PART    answers-0, answers-1 and prose.jsonl are trained on, held_out is not

What is there already is kept, and what was stopped goes on. Every choice hangs on the part's seed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# Seed and answer tokens of each writer. No training text has the seed of what is held out: adapters are evaluated on it, too.
PROSE, WRITTEN, HELD_OUT = "prose.jsonl", "held_out", "held_out.jsonl"
CHATS = {"answers-0": (0, 70_000), "answers-1": (1, 50_000), WRITTEN: (1_000_000, 20_000)}
_CORPORA = ("austen", "shakespeare", "python-docs", "linux-docs", "stdlib")
_PIECE_CHARS, _PIECES = 2500, 120  # of each corpus, from its training documents: about 700 tokens a piece


def training_sources(directory: Path) -> list[Path]:
    """What ``dmtd finetune --data`` takes."""
    return [directory / name for name in (*CHATS, PROSE) if name != WRITTEN]


def main() -> None:
    """Make one part."""
    base, directory, part = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    directory.mkdir(parents=True, exist_ok=True)
    if part != PROSE:
        write_part(base, directory / part, *CHATS[part])
        if part == WRITTEN:
            (directory / HELD_OUT).write_text("".join(self_asked(directory / part)), encoding="utf-8")
    elif not (directory / PROSE).is_file():
        lines = [json.dumps({"text": text}) + "\n" for text in pieces()]
        (directory / PROSE).write_text("".join(lines), encoding="utf-8")


def write_part(base: Path, directory: Path, seed: int, tokens: int) -> None:
    """Chats of one seed, with one thread: two writers side by side are twice as fast as one with two threads."""
    import torch

    from dmtd_models.checkpoints.checkpoint import open_checkpoint
    from dmtd_models.data.chat import TextTokenizer
    from dmtd_models.finetune.answers import AnswerOptions
    from dmtd_models.finetune.chats import write_chats

    torch.set_num_threads(1)
    with open_checkpoint(base) as checkpoint:
        write_chats(
            checkpoint,
            TextTokenizer.of_checkpoint(checkpoint),
            directory,
            AnswerOptions(answer_tokens=tokens, seed=seed, slots=128),
            progress=lambda shard: print(
                f"  {directory.name}: {shard.answer_tokens:,} of {tokens:,} tokens", file=sys.stderr
            ),
        )


def self_asked(directory: Path) -> Iterator[str]:
    """Lines of the chats whose question the model sampled: a pattern may ask the same again where text is trained on."""
    for shard in sorted(directory.glob("*.jsonl")):
        for line in shard.read_text(encoding="utf-8").splitlines(keepends=True):
            if json.loads(line).get("kind") == "self":
                yield line


def pieces() -> Iterator[str]:
    """A piece of each of some documents of every corpus; a corpus with fewer gives several of some."""
    from dmtd_models.checkpoints.smollm2 import default_cache_dir
    from dmtd_models.data.corpora import load_text

    rng = np.random.default_rng(0)
    for name in _CORPORA:
        documents = list(load_text(name, "train", default_cache_dir()))
        order = [int(place) for _ in range(-(-_PIECES // len(documents))) for place in rng.permutation(len(documents))]
        for place in order[:_PIECES]:
            text = documents[place].text
            start = int(rng.integers(max(1, len(text) - _PIECE_CHARS)))
            yield text[start : start + _PIECE_CHARS]


if __name__ == "__main__":
    main()
