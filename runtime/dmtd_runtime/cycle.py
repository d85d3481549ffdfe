"""The law of DMTD in pure integers: which rows, positions and gates every step needs. All its rules in the product live here.

Words: a sequence has ``fed`` tokens (rows in E's and D's caches) and ``thought`` rows in T's cache, ``thought <= fed``.

1. Prefill: prompt rows run through everything, in chunks; their gates follow ``prompt_input``.
2. A cycle head at position c runs T over ``thought .. c`` (the refill and the head itself) and D over c alone.
3. Every other generated position runs D only; T is not touched.
4. Plain mode, the baseline: every generated token is a full pass and D reads T's output alone.
5. Where cycles count from the prompt's end, a sequence may leave one before its end: any set of heads is lawful that holds the
   first generated position and has gaps of at most the cycle length. A late step may be taken back with that: its position
   becomes the head, and E and D write its row again.

The oracle in dmtd_models has rules of its own, and a test holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    had been generated. 0: the prompt alone. Cycles count from ``counts_from``, a head, unless they are ``absolute``: the first
    generated position (0), until the sequence leaves one.
    """

    prompt_len: int
    given_len: int = 0
    fed: int = 0
    thought: int = 0
    counts_from: int = 0

    def __post_init__(self) -> None:
        self.given_len = self.given_len or self.prompt_len
        self.counts_from = self.counts_from or self.prompt_len

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

    def leave_cycle(self, take_back: Sequence[Step] = ()) -> None:
        """Let the next position be a head, wherever in a cycle it stands.

        ``take_back``: the last steps that were committed, in their order and the first of them late: their rows count no more,
        and the head is where that one stood.
        """
        assert not take_back or take_back[0].kind == "late", "a cycle is left at a late step"
        for step in reversed(take_back):
            assert step.late.stop == self.fed, f"row {self.fed} was written last, the step ended at {step.late.stop}"
            self.fed = step.late.start
            self.thought = step.window.start if step.window else self.thought
        assert not self.in_prefill, "a sequence that reads its prompt is in no cycle"
        self.counts_from = self.fed


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

    @property
    def may_leave(self) -> bool:
        """Whether sequences may leave cycles: not where heads stand where the count from the sequence's start puts them."""
        return self.cycle.cycle_origin == "prompt"

    def at_head(self, at: Position) -> bool:
        """Whether the next generated position starts a cycle (every one does in plain mode)."""
        return self._is_head(at.fed, at.counts_from)

    def gates(self, position: int, prompt_len: int) -> tuple[bool, bool]:
        """(gate_hidden, gate_thought) of a position in cycles of full length."""
        return self._gates(position, prompt_len, prompt_len)

    def _is_head(self, position: int, counts_from: int) -> bool:
        origin = counts_from if self.cycle.cycle_origin == "prompt" else 0
        return self.plain or (position - origin) % self.cycle.cycle_length == 0

    def _gates(self, position: int, prompt_len: int, counts_from: int) -> tuple[bool, bool]:
        if self.plain:
            return False, True
        if position < prompt_len and self.cycle.prompt_input == "thinking":
            return False, True
        if position < prompt_len and self.cycle.prompt_input == "sum":
            return True, True
        return True, self._is_head(position, counts_from)

    def next_step(self, at: Position, max_rows: int) -> Step:
        """The step that feeds the next token, or the next chunk of at most ``max_rows`` prompt tokens."""
        if at.in_prefill:
            rows = range(at.fed, min(at.given_len, at.fed + max_rows))
            gates = [self._gates(position, at.prompt_len, at.counts_from) for position in rows]
            return Step(
                kind="prefill",
                window=rows,
                late=rows,
                gate_hidden=tuple(h for h, _ in gates),
                gate_thought=tuple(t for _, t in gates),
                wants_logits=rows.stop == at.given_len,
            )
        head = self.at_head(at)
        gate_hidden, gate_thought = self._gates(at.fed, at.prompt_len, at.counts_from)
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
        assert not at.in_prefill and self.at_head(at), "a cycle begins at a head"
        ahead, steps = replace(at), []
        for _ in range(self.cycle.cycle_length):
            steps.append(self.next_step(ahead, 1))
            ahead.commit(steps[-1])
        return steps
