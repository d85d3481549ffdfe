"""The law of DMTD in pure integers: which rows, positions and gates every step needs. All its rules in the product live here.

Words: a sequence has ``fed`` tokens (rows in E's and D's caches) and ``thought`` rows in T's cache, ``thought <= fed``.

1. Prefill: prompt rows run through everything, in chunks; their gates follow ``prompt_input``.
2. A cycle head at position c runs T over ``thought .. c`` (the refill and the head itself) and D over c alone.
3. Every other generated position runs D only; T is not touched.
4. Plain mode, the baseline: every generated token is a full pass and D reads T's output alone.

The oracle in dmtd_models has rules of its own, and a test holds the two against each other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from dmtd_runtime.bundle.manifest import CycleInfo
from dmtd_runtime.errors import BundleError

StepKind = Literal["prefill", "full", "late"]
CONVENTIONS = (("absolute", "cyclical"), ("prompt", "thinking"), ("prompt", "sum"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one sequence does in one run. ``window`` are T's rows (empty in a late step), ``late`` D's rows, its tail."""

    kind: StepKind
    window: range
    late: range
    gate_hidden: tuple[bool, ...]  # one entry a late row
    gate_thought: tuple[bool, ...]
    wants_logits: bool  # of the last late row


@dataclass(slots=True, kw_only=True)
class Position:
    """Where a sequence stands; :meth:`commit` after a step has run.

    ``given_len`` tokens are given and read in chunks: the prompt, and what of a reply is known already, to be scored as if it
    had been generated. 0: the prompt alone.
    """

    prompt_len: int
    given_len: int = 0
    fed: int = 0
    thought: int = 0

    def __post_init__(self) -> None:
        self.given_len = self.given_len or self.prompt_len

    @property
    def in_prefill(self) -> bool:
        return self.fed < self.given_len

    def commit(self, step: Step) -> None:
        """Take the step's rows as written."""
        assert step.late.start == self.fed, f"step writes from row {step.late.start}, {self.fed} rows are committed"
        self.fed = step.late.stop
        if step.window:
            assert step.window.start == self.thought, (
                f"T's window starts at {step.window.start}, {self.thought} rows exist"
            )
            self.thought = step.window.stop


@dataclass(frozen=True, slots=True, kw_only=True)
class CyclePlan:
    """The rules for one bundle and mode. Raises BundleError for a convention that has no defined gates."""

    cycle: CycleInfo
    plain: bool = False

    def __post_init__(self) -> None:
        convention = (self.cycle.cycle_origin, self.cycle.prompt_input)
        if convention not in CONVENTIONS:
            raise BundleError(
                f"manifest.cycle: cycle_origin {convention[0]} with prompt_input {convention[1]} is undefined, expected "
                f"{', '.join(map(' + '.join, CONVENTIONS))}; export the bundle again"
            )

    def is_head(self, position: int, prompt_len: int) -> bool:
        """Whether a generated position starts a cycle (every one does in plain mode)."""
        origin = prompt_len if self.cycle.cycle_origin == "prompt" else 0
        return self.plain or (position - origin) % self.cycle.cycle_length == 0

    def gates(self, position: int, prompt_len: int) -> tuple[bool, bool]:
        """(gate_hidden, gate_thought) of a position."""
        if self.plain:
            return False, True
        if position < prompt_len and self.cycle.prompt_input == "thinking":
            return False, True
        if position < prompt_len and self.cycle.prompt_input == "sum":
            return True, True
        return True, self.is_head(position, prompt_len)

    def next_step(self, at: Position, max_rows: int) -> Step:
        """The step that feeds the next token, or the next chunk of at most ``max_rows`` prompt tokens."""
        if at.in_prefill:
            rows = range(at.fed, min(at.given_len, at.fed + max_rows))
            gates = [self.gates(position, at.prompt_len) for position in rows]
            return Step(
                kind="prefill",
                window=rows,
                late=rows,
                gate_hidden=tuple(h for h, _ in gates),
                gate_thought=tuple(t for _, t in gates),
                wants_logits=rows.stop == at.given_len,
            )
        head = self.is_head(at.fed, at.prompt_len)
        gate_hidden, gate_thought = self.gates(at.fed, at.prompt_len)
        return Step(
            kind="full" if head else "late",
            window=range(at.thought, at.fed + 1) if head else range(0),
            late=range(at.fed, at.fed + 1),
            gate_hidden=(gate_hidden,),
            gate_thought=(gate_thought,),
            wants_logits=True,
        )

    def lasting_rows(self, prompt_len: int, rows: int) -> int:
        """How many of a sequence's first ``rows`` rows any prompt that begins with the same tokens has too, to the last gate.

        Where cycles count from the sequence's start, or there are none, gates are the position's alone: all. Where they count
        from the prompt's end, a reply that becomes part of a prompt is read with other gates: the prompt's.
        """
        anywhere = self.plain or self.cycle.cycle_origin == "absolute"
        return rows if anywhere else min(rows, prompt_len)

    def cycle_steps(self, at: Position) -> list[Step]:
        """The steps of the whole cycle that begins at the head ``at``.

        Every step feeds the token that the step before it chose, so nothing but tokens is unknown when the cycle starts.
        """
        assert not at.in_prefill and self.is_head(at.fed, at.prompt_len), "a cycle begins at a head"
        ahead, steps = replace(at), []
        for _ in range(self.cycle.cycle_length):
            steps.append(self.next_step(ahead, 1))
            ahead.commit(steps[-1])
        return steps
