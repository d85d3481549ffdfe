"""One cycle on a device, from the first refill to the last token choice, with nothing for the host to do in between.

    full step:  thinking (refill and head) -> late_decode -> token choice          (fused: full_pass -> token choice)
    late step:  late_decode -> token choice                                        (the token is the next step's input)
    the end:    what was chosen becomes the ids of the next cycle's window

Everything but tokens is known when the cycle starts, and lies in one block that one upload fills (``control``); what was
chosen lies in another, that one download brings back (``results``). All addresses are fixed, so that the whole may be
captured once and replayed. In plain mode every step is a full one, over one row.

The numbers come from ``cycle.py``'s steps; when to start a cycle and what to do with its tokens is ``serving/loop.py``'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dmtd_runtime.backends.base import RunOutput, SlotCycle
from dmtd_runtime.backends.engines.engine_set import EngineSet
from dmtd_runtime.backends.layouts.blocks import BlockLayout
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.contract import GraphName
from dmtd_runtime.bundle.engine_record import PassKind
from dmtd_runtime.bundle.manifest import DTYPE_BYTES
from dmtd_runtime.device.base import Address, Array, Capture
from dmtd_runtime.sampling.sampler import NO_CHOICE, NOT_FINITE

WINDOW_IDS, HEAD_IDS = "window_ids", "head_ids"
NUMBERS = {
    contract.TEMPERATURE: "float32",
    contract.TOP_P: "float32",
    contract.MIN_P: "float32",
    contract.REPETITION_PENALTY: "float32",
    contract.FREQUENCY_PENALTY: "float32",
    contract.PRESENCE_PENALTY: "float32",
    contract.TOP_K: "int64",
}
CHOSEN = (contract.TOKEN_IDS, contract.CONFIDENCE, contract.IS_FINITE)
"""What both graphs that choose tokens give for each row."""
STEP_NUMBERS = {contract.UNIFORMS: "float32", contract.MASK_ENDS: "bool"}
THINKING_ROWS, LATE_ROW = contract.write_indices("thinking"), contract.write_indices("late")
WINDOW_POSITIONS, LATE_POSITIONS = f"window_{contract.POSITION_IDS}", f"late_{contract.POSITION_IDS}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CycleShape:
    """What decides the addresses and shapes of a cycle's work: cycles of one shape share a captured graph.

    ``window_len`` rows go through T in the first step, and one in every later full step. ``sampled`` is False where every
    sequence takes the arg-max.
    """

    batch: int
    visible_len: int
    full: tuple[bool, ...]  # of each step
    window_len: int
    sampled: bool

    def window_of(self, step: int) -> int:
        return self.window_len if step == 0 else 1


def control_layout(shape: CycleShape) -> BlockLayout:
    """The inputs of a cycle that the host writes. The ids stand first: a cycle that follows another leaves them out."""
    batch, steps = shape.batch, range(len(shape.full))
    arrays: list[tuple[str, Sequence[int], str]] = [
        (WINDOW_IDS, (batch, shape.window_len), "int64"),
        (HEAD_IDS, (batch, 1), "int64"),
        (contract.LOGIT_ROWS, (batch, 1), "int64"),
    ]
    for k in steps:
        if shape.full[k]:
            arrays += [
                (f"{WINDOW_POSITIONS}.{k}", (batch, shape.window_of(k)), "int64"),
                (f"{THINKING_ROWS}.{k}", (batch,), "int64"),
                (f"{contract.LATE_ROWS}.{k}", (batch, 1), "int64"),
            ]
        arrays += [
            (f"{LATE_POSITIONS}.{k}", (batch, 1), "int64"),
            (f"{LATE_ROW}.{k}", (batch,), "int64"),
            (f"{contract.GATE_HIDDEN}.{k}", (batch, 1), "bool"),
            (f"{contract.GATE_THOUGHT}.{k}", (batch, 1), "bool"),
        ]
        if shape.sampled:
            arrays += [(f"{name}.{k}", (batch,), dtype) for name, dtype in STEP_NUMBERS.items()]
    if shape.sampled:
        arrays += [(name, (batch,), dtype) for name, dtype in NUMBERS.items()]
    return BlockLayout.of(arrays)


def results_layout(shape: CycleShape) -> BlockLayout:
    """What a cycle chose, step by step."""
    kinds = [(contract.TOKEN_IDS, "int64"), (contract.CONFIDENCE, "float32"), (contract.IS_FINITE, "bool")]
    kinds += [(contract.HAS_CHOICE, "bool")] if shape.sampled else []
    steps = range(len(shape.full))
    return BlockLayout.of([(f"{name}.{k}", (shape.batch, 1), dtype) for name, dtype in kinds for k in steps])


class CycleProgram:
    """The work of one shape. It is enqueued call by call, or recorded once and replayed: the same work either way."""

    def __init__(self, engines: EngineSet, shape: CycleShape, control: Address, results: Address) -> None:
        self.shape = shape
        self.control, self.results = control_layout(shape), results_layout(shape)
        self.capture: Capture | None = None
        self.has_run = False
        self._engines = engines
        self._control_base, self._results_base = control, results
        self._fused = engines.has_engine(contract.FULL_PASS)

    @property
    def control_from(self) -> int:
        """Where the part of the control block begins that a following cycle uploads."""
        return self.control.regions[contract.LOGIT_ROWS].offset

    def fill(self, arrays: Mapping[str, Array], slots: Sequence[SlotCycle], committed: Sequence[int]) -> None:
        """Write the control block; slots that take no part write behind their committed rows."""
        for array in arrays.values():
            array[...] = 0
        for k in range(len(self.shape.full)):
            arrays[f"{contract.GATE_HIDDEN}.{k}"][:] = True
        if self.shape.sampled:
            arrays[contract.REPETITION_PENALTY][:] = 1
        self._fill_idle(arrays, committed)
        if not slots:
            return  # warming up: all is padding
        window, own = self.shape.window_len, [s.slot for s in slots]
        for s in slots:
            assert len(s.steps) == len(self.shape.full), f"{len(s.steps)} steps for a cycle of {len(self.shape.full)}"
            assert 1 <= len(s.steps[0].window) <= window, f"a window of {len(s.steps[0].window)} rows for {window}"
            arrays[WINDOW_IDS][s.slot, : len(s.ids)] = s.ids
        arrays[HEAD_IDS][own, 0] = [s.ids[-1] if s.ids else 0 for s in slots]
        for k, full in enumerate(self.shape.full):
            steps = [s.steps[k] for s in slots]
            late = np.array([step.late.start for step in steps])
            arrays[f"{LATE_POSITIONS}.{k}"][own, 0] = arrays[f"{LATE_ROW}.{k}"][own] = late
            arrays[f"{contract.GATE_HIDDEN}.{k}"][own] = [step.gate_hidden for step in steps]
            arrays[f"{contract.GATE_THOUGHT}.{k}"][own] = [step.gate_thought for step in steps]
            if full:
                first = np.array([step.window.start for step in steps])
                arrays[f"{WINDOW_POSITIONS}.{k}"][own] = first[:, None] + np.arange(self.shape.window_of(k))
                arrays[f"{THINKING_ROWS}.{k}"][own] = first
                arrays[f"{contract.LATE_ROWS}.{k}"][own, 0] = late - first
        if self.shape.sampled:
            self._fill_choice(arrays, slots)

    def _fill_idle(self, arrays: Mapping[str, Array], committed: Sequence[int]) -> None:
        """Every slot as if it took no part."""
        free = np.array([*committed, *(0,) * self.shape.batch][: self.shape.batch], np.int64)
        for k, full in enumerate(self.shape.full):
            arrays[f"{LATE_POSITIONS}.{k}"][:, 0] = arrays[f"{LATE_ROW}.{k}"][:] = free
            if full:
                arrays[f"{THINKING_ROWS}.{k}"][:] = free
                arrays[f"{WINDOW_POSITIONS}.{k}"][:] = free[:, None] + np.arange(self.shape.window_of(k))

    def _fill_choice(self, arrays: Mapping[str, Array], slots: Sequence[SlotCycle]) -> None:
        """Numbers of the sampling graph: options of each sequence, and what differs from token to token."""
        for s in slots:
            for name, number in s.sampler.device_numbers().items():
                arrays[name][s.slot] = number
            for k in range(len(s.steps)):
                for name, number in s.sampler.device_step(s.unseen + k).items():
                    arrays[f"{name}.{k}"][s.slot] = number

    def enqueue(self) -> None:
        """Enqueue the whole cycle over the control block on the device."""
        for k, full in enumerate(self.shape.full):
            if full and self._fused:
                self._run(contract.FULL_PASS, k)
            else:
                if full:
                    self._run(contract.THINKING, k)
                self._run(contract.LATE_DECODE, k)
            self._choose(k)
        last, item = len(self.shape.full) - 1, DTYPE_BYTES["int64"]
        window = self.shape.window_len
        for column in range(window):
            self._engines.device.copy(
                Address(self._input(WINDOW_IDS) + column * item),
                self._result(f"{contract.TOKEN_IDS}.{last + 1 - window + column}"),
                row_bytes=item,
                rows=self.shape.batch,
                target_pitch=window * item,
                source_pitch=item,
            )
        chosen = self._result(f"{contract.TOKEN_IDS}.{last}")
        self._engines.device.copy(self._input(HEAD_IDS), chosen, row_bytes=self.shape.batch * item)

    def chosen(self, arrays: Mapping[str, Array], slots: Sequence[int]) -> RunOutput:
        """Tokens and confidence [steps, slots] of a downloaded block; a token is negative where there was none to give."""
        tokens, confidence = [], []
        for k in range(len(self.shape.full)):
            ids = arrays[f"{contract.TOKEN_IDS}.{k}"][:, 0]
            if self.shape.sampled:
                ids = np.where(arrays[f"{contract.HAS_CHOICE}.{k}"][:, 0], ids, NO_CHOICE)
            tokens.append(np.where(arrays[f"{contract.IS_FINITE}.{k}"][:, 0], ids, NOT_FINITE)[list(slots)])
            confidence.append(arrays[f"{contract.CONFIDENCE}.{k}"][list(slots), 0])
        return RunOutput(tokens=np.stack(tokens), confidence=np.stack(confidence))

    def _run(self, graph: GraphName, k: int) -> None:
        """Enqueue one decoder engine of step ``k``."""
        shape, late = self.shape, graph == contract.LATE_DECODE
        sizes = {"batch": shape.batch, "late_len": 1, "visible_len": shape.visible_len}
        if not late:
            sizes["window_len"] = shape.window_of(k)
        if graph != contract.THINKING:
            sizes["num_logits"] = 1
        kind: PassKind = "step" if late else "refill"
        context = self._engines.context(graph, kind, sizes, shape)
        for name, address in self._step_inputs(late, k):
            if self._engines.has_input(graph, name):
                context.set_address(name, address)
        context.enqueue()

    def _step_inputs(self, late: bool, k: int) -> Iterator[tuple[str, Address]]:
        if k == 0:
            yield contract.INPUT_IDS, self._input(HEAD_IDS if late else WINDOW_IDS)
        else:
            yield contract.INPUT_IDS, self._result(f"{contract.TOKEN_IDS}.{k - 1}")
        yield contract.POSITION_IDS, self._input(f"{LATE_POSITIONS if late else WINDOW_POSITIONS}.{k}")
        yield contract.LOGIT_ROWS, self._input(contract.LOGIT_ROWS)
        names = (LATE_ROW, contract.GATE_HIDDEN, contract.GATE_THOUGHT)
        for name in names if late else (*names, THINKING_ROWS, contract.LATE_ROWS):
            yield name, self._input(f"{name}.{k}")

    def _choose(self, k: int) -> None:
        """Enqueue the token choice of step ``k``, and let it count the token where counts are kept."""
        sampled, batch = self.shape.sampled, self.shape.batch
        if not sampled:
            sizes = {"batch": batch, "num_logits": 1}
            context = self._engines.context(contract.CHOOSE_TOKEN, "choose", sizes, self.shape)
        else:
            context = self._engines.context(contract.SAMPLE_TOKEN, "choose", {"batch": batch}, self.shape)
            for name in NUMBERS:
                context.set_address(name, self._input(name))
            for name in STEP_NUMBERS:
                context.set_address(name, self._input(f"{name}.{k}"))
            context.set_address(contract.HAS_CHOICE, self._result(f"{contract.HAS_CHOICE}.{k}"))
        for name in CHOSEN:
            context.set_address(name, self._result(f"{name}.{k}"))
        context.enqueue()
        if sampled:
            counted = batch * self._engines.vocab_size * DTYPE_BYTES["float32"]
            new, old = (self._engines.buffer(n) for n in (contract.NEXT_OUTPUT_COUNTS, contract.OUTPUT_COUNTS))
            self._engines.device.copy(old, new, row_bytes=counted)

    def _input(self, name: str) -> Address:
        return self.control.address(self._control_base, name)

    def _result(self, name: str) -> Address:
        return self.results.address(self._results_base, name)
