"""The correctness oracle: the tokens and logits that any DMTD decoder must produce, by full recomputation.

Written from the description of the method alone. It keeps no cache and shares no rule with a runtime: every step runs
the reference over the whole sequence, with two 0/1 gates a position that say what the decoding layers read there.

    position                                              gate_hidden  gate_thought
    cycle head                                                1            1
    inside a cycle                                            1            0
    prompt position, prompt input ``thinking``                0            1
    prompt position, prompt input ``sum``                     1            1
    plain model                                               0            1

Where a cycle begins: ``absolute`` counts from the start of the sequence and knows no prompt; ``prompt`` counts from the
first generated token, which is always a head.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dmtd_models.config.model import DmtdSpec
from dmtd_models.errors import ModelError
from dmtd_models.reference.dmtd import ReferenceModel

Gate = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class OracleRun:
    """A greedy continuation: the new tokens (a stop token included) and the logits each was chosen from."""

    token_ids: tuple[int, ...]
    logits: Tensor  # [steps, vocab]


def gates(spec: DmtdSpec, *, prompt_len: int, total_len: int, plain: bool = False) -> tuple[Gate, Gate]:
    """What the decoding layers read at each position.

    Args:
        spec: cycle length and convention.
        prompt_len: positions 0 .. prompt_len - 1 are the prompt.
        total_len: number of positions, prompt included.
        plain: every position a full pass of the plain model.

    Returns:
        (gate_hidden, gate_thought), each int64 [total_len] of 0 and 1.
    """
    if not 0 <= prompt_len <= total_len:
        raise ModelError(f"prompt_len: got {prompt_len}, expected 0 to total_len {total_len}")
    rows = [_gate_pair(spec, prompt_len, position, plain) for position in range(total_len)]
    table = np.array(rows, dtype=np.int64).reshape(total_len, 2)
    return table[:, 0].copy(), table[:, 1].copy()


def teacher_forced(model: ReferenceModel, token_ids: Sequence[int], prompt_len: int, plain: bool = False) -> Tensor:
    """Logits [n, vocab] at every position of a known sequence whose first ``prompt_len`` tokens are the prompt."""
    _check_ids(model, token_ids)
    hidden_gate, thought_gate = gates(model.spec, prompt_len=prompt_len, total_len=len(token_ids), plain=plain)
    with torch.no_grad():
        run = model(
            torch.tensor([list(token_ids)]),
            torch.arange(len(token_ids))[None],
            torch.from_numpy(hidden_gate)[None],
            torch.from_numpy(thought_gate)[None],
        )
    return run.logits[0]


def greedy(
    model: ReferenceModel,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    plain: bool = False,
    stop_ids: Collection[int] = (),
) -> OracleRun:
    """Continue a prompt with the likeliest token, one step and one recomputation of everything at a time."""
    sequence = list(prompt_ids)
    chosen_from: list[Tensor] = []
    while len(chosen_from) < max_new_tokens:
        logits = teacher_forced(model, sequence, len(prompt_ids), plain)[-1]
        chosen_from.append(logits)
        sequence.append(int(logits.argmax()))
        if sequence[-1] in stop_ids:
            break
    empty = torch.zeros(0, model.config.vocab_size)
    return OracleRun(
        token_ids=tuple(sequence[len(prompt_ids) :]), logits=torch.stack(chosen_from) if chosen_from else empty
    )


def _gate_pair(spec: DmtdSpec, prompt_len: int, position: int, plain: bool) -> tuple[int, int]:
    if plain:
        return (0, 1)
    if spec.cycle_origin == "absolute":
        if spec.prompt_input != "cyclical":
            raise ModelError(f"prompt input {spec.prompt_input} with cycle origin absolute is undefined")
        return (1, 1) if position % spec.cycle_length == 0 else (1, 0)
    if position >= prompt_len:
        return (1, 1) if (position - prompt_len) % spec.cycle_length == 0 else (1, 0)
    if spec.prompt_input == "thinking":
        return (0, 1)
    if spec.prompt_input == "sum":
        return (1, 1)
    raise ModelError(f"prompt input {spec.prompt_input} with cycle origin prompt is undefined")


def _check_ids(model: ReferenceModel, token_ids: Sequence[int]) -> None:
    if not token_ids:
        raise ModelError("token ids: got an empty sequence, expected at least one token")
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= model.config.vocab_size:
        worst = low if low < 0 else high
        raise ModelError(f"token ids: got {worst}, expected 0 to {model.config.vocab_size - 1}")
