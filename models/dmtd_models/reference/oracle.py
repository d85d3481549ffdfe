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
first generated token, which is always a head. Under ``prompt`` a cycle may also be left early: then heads are listed, the
first generated position among them and no two of them further apart than a cycle is long.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

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


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveRun:
    """A greedy continuation that leaves its cycles where it is unsure.

    ``heads`` are the positions that were heads, ``late_steps`` those taken, ``dropped`` those of them whose choice was not kept.
    """

    token_ids: tuple[int, ...]
    logits: Tensor  # [steps, vocab], of the kept choices
    heads: tuple[int, ...]
    late_steps: int
    dropped: int


def gates(
    spec: DmtdSpec, *, prompt_len: int, total_len: int, plain: bool = False, heads: Collection[int] | None = None
) -> tuple[Gate, Gate]:
    """What the decoding layers read at each position.

    Args:
        spec: cycle length and convention.
        prompt_len: positions 0 .. prompt_len - 1 are the prompt.
        total_len: number of positions, prompt included.
        plain: every position a full pass of the plain model.
        heads: the generated positions that are heads; None: every ``cycle_length``-th. Those from ``total_len`` on do not count.

    Returns:
        (gate_hidden, gate_thought), each int64 [total_len] of 0 and 1.
    """
    if not 0 <= prompt_len <= total_len:
        raise ModelError(f"prompt_len: got {prompt_len}, expected 0 to total_len {total_len}")
    rows = [_gate_pair(spec, prompt_len, position, plain) for position in range(total_len)]
    if heads is not None and not plain:
        known = sorted(head for head in heads if head < total_len)
        _check_heads(spec, prompt_len, total_len, known)
        rows[prompt_len:] = [(1, 1) if position in known else (1, 0) for position in range(prompt_len, total_len)]
    table = np.array(rows, dtype=np.int64).reshape(total_len, 2)
    return table[:, 0].copy(), table[:, 1].copy()


def teacher_forced(
    model: ReferenceModel,
    token_ids: Sequence[int],
    prompt_len: int,
    plain: bool = False,
    heads: Collection[int] | None = None,
) -> Tensor:
    """Logits [n, vocab] at every position of a known sequence whose first ``prompt_len`` tokens are the prompt."""
    _check_ids(model, token_ids)
    hidden_gate, thought_gate = gates(
        model.spec, prompt_len=prompt_len, total_len=len(token_ids), plain=plain, heads=heads
    )
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


def adaptive(
    model: ReferenceModel,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    min_confidence: float,
    stop_ids: Collection[int] = (),
) -> AdaptiveRun:
    """Continue a prompt with the likeliest token, leaving a cycle where a late step gives its own less than ``min_confidence``.

    The next position is a head then. Where it gives its own less than ``min_confidence`` - 0.4, its choice is dropped: its own
    position becomes the head, and the pass there chooses, sure or not. A confidence of 1 is never reached: every position is
    a head, and no late step is tried.
    """
    sequence, heads, chosen_from = list(prompt_ids), list[int](), list[Tensor]()
    late_steps = dropped = 0
    left = False
    while len(chosen_from) < max_new_tokens:
        at = len(sequence) - 1  # the position whose token is fed now
        head = not heads or left or at - heads[-1] == model.spec.cycle_length or min_confidence >= 1
        left = False
        if at >= len(prompt_ids) and head:
            heads.append(at)
        logits = teacher_forced(model, sequence, len(prompt_ids), heads=heads)[-1]
        if at >= len(prompt_ids) and not head:
            late_steps += 1
            sure = float(logits.softmax(-1).max())
            if sure < min_confidence - 0.4:
                dropped += 1
                heads.append(at)
                logits = teacher_forced(model, sequence, len(prompt_ids), heads=heads)[-1]
            left = min_confidence - 0.4 <= sure < min_confidence
        chosen_from.append(logits)
        sequence.append(int(logits.argmax()))
        if sequence[-1] in stop_ids:
            break
    return AdaptiveRun(
        token_ids=tuple(sequence[len(prompt_ids) :]),
        logits=torch.stack(chosen_from) if chosen_from else torch.zeros(0, model.config.vocab_size),
        heads=tuple(heads),
        late_steps=late_steps,
        dropped=dropped,
    )


def _check_heads(spec: DmtdSpec, prompt_len: int, total_len: int, heads: Sequence[int]) -> None:
    if spec.cycle_origin != "prompt":
        raise ModelError(
            f"heads: got a list with cycle origin {spec.cycle_origin}, which puts them where its count does"
        )
    if prompt_len < total_len and (not heads or heads[0] != prompt_len):
        raise ModelError(f"heads: got {heads[:1]} first, expected the first generated position, {prompt_len}")
    for one, following in pairwise([*heads, *([total_len] if heads else [])]):
        if following - one > spec.cycle_length:
            raise ModelError(f"heads: got none from {one} to {following}, expected one in every {spec.cycle_length}")


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
