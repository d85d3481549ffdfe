"""The study's text: chats that the base writes itself, pieces of free prose and code out of packages, and what is evaluated on.

``tools/study`` starts it, a process a part:

    python -m study.text BASE DIR PART    answers-0, answers-1 and prose.jsonl are trained on; held_out, evaluation are not

What is there already is kept, and what was stopped goes on. Every choice hangs on the part's seed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

# Seed and answer tokens of each writer. No training text has the seed of what is held out: adapters are evaluated on it, too.
PROSE, WRITTEN, HELD_OUT = "prose.jsonl", "held_out", "held_out.jsonl"
CHATS = {"answers-0": (0, 70_000), "answers-1": (1, 50_000), WRITTEN: (1_000_000, 20_000)}
EVALUATION = "evaluation"
HELD_OUT_CORPORA = ("austen", "stdlib")
TASKS, FLUENCY = ("facts", "hellaswag"), "everyday"
_CORPORA = ("austen", "shakespeare", "python-docs", "linux-docs", "stdlib")
_PIECE_CHARS, _PIECES = 2500, 120  # of each corpus, from its training documents: about 700 tokens a piece


def training_sources(directory: Path) -> list[Path]:
    """What ``dmtd finetune --data`` takes."""
    return [directory / name for name in (*CHATS, PROSE) if name != WRITTEN]


def held_out_texts(directory: Path) -> list[Path]:
    """What ``dmtd evaluate --text`` takes."""
    return [directory / name for name in (HELD_OUT, *(f"{name}.jsonl" for name in HELD_OUT_CORPORA))]


def task_files(directory: Path) -> list[Path]:
    """What ``dmtd evaluate --task`` takes."""
    return [directory / f"{name}.jsonl" for name in TASKS]


def evaluated_on(directory: Path) -> list[Path]:
    """What ``dmtd finetune --decontaminate`` takes: tasks, and the prompts of ``dmtd evaluate --fluency``."""
    return [*task_files(directory), directory / f"{FLUENCY}.jsonl"]


def main() -> None:
    """Make one part."""
    base, directory, part = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    directory.mkdir(parents=True, exist_ok=True)
    if part == EVALUATION:
        write_evaluation(directory)
    elif part != PROSE:
        write_part(base, directory / part, *CHATS[part])
        if part == WRITTEN:
            (directory / HELD_OUT).write_text("".join(self_asked(directory / part)), encoding="utf-8")
    elif not (directory / PROSE).is_file():
        write_lines(directory / PROSE, ({"text": text} for text in pieces()))


def write_evaluation(directory: Path) -> None:
    """Files of held-out documents and of the tasks' items."""
    from dmtd_export.evaluate.fluency import EVERYDAY
    from dmtd_models.cache import default_cache_dir
    from study.corpora import load_text
    from study.tasks import hellaswag

    cache = default_cache_dir()
    for name in HELD_OUT_CORPORA:
        documents = load_text(name, "held_out", cache)
        write_lines(directory / f"{name}.jsonl", ({"id": one.text_id, "text": one.text} for one in documents))
    choices = (
        {"id": item.item_id, "prompt": item.prompt, "choices": item.choices, "answer": item.answer}
        for item in hellaswag(cache)
    )
    for name, records in zip(TASKS, (facts(), choices), strict=True):
        write_lines(directory / f"{name}.jsonl", records)
    write_lines(directory / f"{FLUENCY}.jsonl", ({"messages": user(prompt)} for prompt in EVERYDAY))


def facts() -> Iterator[dict[str, Any]]:
    """The simple facts as a task file's records: each in five wordings, the first statement counts."""
    from study.facts import FACTS, REWORDINGS

    for number, (question, accepted) in enumerate(FACTS):
        yield {
            "id": f"facts-{number:02}",
            "messages": user(question),
            "rewordings": [user(wording.format(question)) for wording in REWORDINGS],
            "accepted": accepted,
            "match": "first_statement",
            "max_new_tokens": 40,
        }


def user(text: str) -> list[dict[str, str]]:
    """A chat that begins with this."""
    return [{"role": "user", "content": text}]


def write_lines(file: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines; the file appears whole."""
    part = file.with_name(f".{file.name}.part")
    part.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    part.replace(file)


def write_part(base: Path, directory: Path, seed: int, tokens: int) -> None:
    """Chats of one seed, with one thread: two writers side by side are twice as fast as one with two threads."""
    import torch

    from dmtd_models.checkpoints.checkpoint import open_checkpoint
    from dmtd_models.data.chat import TextTokenizer
    from study.answers import AnswerOptions
    from study.chats import write_chats

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
    from dmtd_models.cache import default_cache_dir
    from study.corpora import load_text

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
