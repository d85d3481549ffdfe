"""The options of ``Job``, which is a whole fine-tuning run, and of the parts of its training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dmtd_models.finetune.options import BatchOptions, Job, LossOptions, TrainOptions
from dmtd_runtime.cli.options.groups import Group, option, threads_option

_TEXT, _LEARN, _RUN, _STORED, _RESULT = "Text", "What is learnt", "Run", "What frozen layers give", "Result"
USUAL = Job(base=Path(), output=Path())  # the verb is given both


def _curriculum(text: str) -> tuple[tuple[int, float], ...]:
    try:
        pairs = [part.split(":") for part in text.split(",") if part]
        return tuple((int(length), float(share)) for length, share in pairs)
    except ValueError:
        raise typer.BadParameter(f"--curriculum: got {text!r}, expected LENGTH:SHARE pairs, as 2:0.2,3:0.5") from None


JobGroup = Annotated[
    Job,
    Group(
        {
            "data": option(
                "Text to train on: JSON lines, parquet, or a directory of `datasets`. May be given again.", panel=_TEXT
            ),
            "held_out": option(
                "Text to measure on while training. By default 2% of the documents, at most 128. May be given again.",
                panel=_TEXT,
            ),
            "decontaminate": option(
                "What the model will be evaluated on: items, chats or texts. Training documents that repeat something of it "
                "are left out. May be given again.",
                panel=_TEXT,
            ),
            "answer_tokens": option(
                "Let the base write chats first, until they hold this many answer tokens. 0: none.", panel=_TEXT, min=0
            ),
            "questions": option(
                "With --answer-tokens: prompts to answer, as data or as a text file with one a line. By default the base "
                "asks itself.",
                panel=_TEXT,
            ),
            "max_length": option("Tokens of a document. What is longer is cut.", panel=_TEXT, min=8),
            "initial": option(
                "An adapter of BASE to start from. BASE stays the teacher, and the split is the adapter's where none is given. "
                "By default training starts from BASE.",
                panel=_LEARN,
            ),
            "device": option("Where to train. By default cuda where there is one.", panel=_RUN),
            "threads": threads_option(_RUN, "as many as PyTorch chooses"),
            "feature_dir": option(
                "Directory of what --cache stores. By default within OUTPUT.", "--cache-dir", panel=_STORED
            ),
            "save": option(
                "checkpoint: a whole model. adapter: the difference to BASE, a fraction of its size. both.",
                panel=_RESULT,
                metavar="FORM",
            ),
            "adapter_bits": option(
                "Bits of each weight in an adapter, of --train late or full. Fewer: smaller, less exact.",
                panel=_RESULT,
                min=3,
                max=8,
            ),
        }
    ),
]
TrainGroup = Annotated[
    TrainOptions,
    Group(
        {
            "trained": option(
                "late: the decoding layers. full: all layers. lora: low-rank factors beside all layers.",
                "--train",
                panel=_LEARN,
            ),
            "train_embedding": option(
                "Train the embedding and lm_head too. By default they stay as they are.",
                "--train-embedding",
                panel=_LEARN,
            ),
            "last_layers": option(
                "With --train full or lora: how many layers are trained, counted from the last. By default all.",
                panel=_LEARN,
                min=1,
            ),
            "lora_rank": option("With --train lora: rank of the factors.", panel=_LEARN, min=1, max=1024),
            "curriculum": option(
                "Shorter cycles first: LENGTH:SHARE pairs. 2:0.2,3:0.5 means cycles of 2 for the first 20% of the run, of 3 "
                "until 50%, then of --cycle-length. By default none.",
                panel=_LEARN,
            ),
            "epochs": option("How many times the text is read.", panel=_RUN, min=0),
            "max_tokens": option(
                "Tokens to train on, instead of whole epochs. By default --epochs decides.", panel=_RUN, min=1
            ),
            "tokens_per_step": option("Tokens of one forward pass, in each process.", panel=_RUN),
            "accumulate": option("Forward passes between two steps of the optimiser.", panel=_RUN, min=1),
            "learning_rate": option(
                "The largest learning rate. By default 1e-3 with --train late or lora, 3e-4 with full.", panel=_RUN
            ),
            "schedule": option(
                "How the learning rate moves: warmup_stable_decay, linear or cosine.", panel=_RUN, metavar="NAME"
            ),
            "warmup": option("Share of the run, 0 to 1, in which the learning rate rises.", panel=_RUN),
            "precision": option(
                "Type of matrix products and frozen weights: bfloat16 or float32. By default bfloat16 where the device has "
                "instructions for it.",
                panel=_RUN,
                metavar="TYPE",
            ),
            "gradient_checkpointing": option(
                "Compute activations again in the backward pass: less memory, a third more work. By default off.",
                "--gradient-checkpointing",
                panel=_RUN,
            ),
            "cache_features": option(
                "Compute what frozen layers give once, and store it for all epochs. By default on a CPU where layers are "
                "frozen.",
                "--cache/--no-cache",
                panel=_STORED,
            ),
            "eval_every_tokens": option("Tokens between two evaluations. 0: none.", "--eval-every", panel=_RUN, min=0),
            "save_every_s": option("Seconds between two saved states.", "--save-every", panel=_RUN, min=1),
            "seed": option("Seed of everything that is drawn: order, phases, factors.", panel=_RUN, min=0),
        },
        parsers={"curriculum": _curriculum},
    ),
]
LossGroup = Annotated[
    LossOptions,
    Group(
        {
            "distill": option(
                "1: learn the base's distribution. 0: learn the next token of the text. Between: both, in this share.",
                panel=_LEARN,
                min=0,
                max=1,
            ),
            "top_k": option(
                "How many of the base's likeliest tokens are learnt. 0: the whole vocabulary.", panel=_LEARN, min=0
            ),
            "temperature": option("Temperature of the base's and the learnt distribution.", panel=_LEARN),
        }
    ),
]
BatchGroup = Annotated[
    BatchOptions,
    Group(
        {
            "learn_prompt": option(
                "Learn whole chats, or the answers alone.", "--learn-prompt/--learn-answers", panel=_LEARN
            ),
            "vary_phase": option(
                "Begin an answer's first cycle a few tokens later, others in each epoch, or always at its start.",
                "--vary-phase/--fixed-phase",
                panel=_LEARN,
            ),
            "cycle_lengths": option(
                "fixed, or varied: cycles of 1 to --cycle-length tokens, others in each epoch, as --min-confidence makes them.",
                panel=_LEARN,
                metavar="NAME",
            ),
        }
    ),
]
