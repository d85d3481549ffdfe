"""Schedules of sequences that come and go, by the hundred thousand: each sequence is held to what it gets alone.

A *world* is a bundle, a backend and a cycle. Opened once it plays many schedules, and the requests in them come from a few
*manners*: a prompt and how tokens are chosen. What a sequence does is a function of its manner and its world, so each runs
alone once, up to ``LONGEST`` tokens, and whoever comes with it, whenever and for however many tokens, is held to that.

Everything is drawn from numbers: a world's schedule 17 is the same in every run of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any

import numpy as np
from runtime_support import CONVENTIONS, MARGIN, MAX_BATCH, Array, TinyBundle, make_bundle
from serving_support import Guest, Visit, alone, serve

from dmtd_runtime.backends.base import Backend, RunOutput, SlotStep, rounded_rows
from dmtd_runtime.backends.kv_cache import HostKvCache
from dmtd_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.serving.options import ServingOptions

LONGEST = 12  # tokens of an answer
MANNERS = 8  # in a world
UNTOUCHED = 1e3  # finite, as all in a cache must be, and like nothing that a model writes
VALUES: Mapping[str, tuple[Any, ...]] = {
    "family": ("qwen3", "llama"),
    "encoding_layers": (0, 1),
    "dialect": ("onnxruntime", "onnxruntime", "standard"),
    "full_pass": ("staged", "fused", None),
    "slots": (1, 3, MAX_BATCH),
    "tau": (1, 2, 3, 4, 5, 6),
    "convention": CONVENTIONS,
    "plain": (False, False, False, True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A combination of ``VALUES``."""

    family: str
    encoding_layers: int
    dialect: Any
    full_pass: Any
    slots: int
    tau: int
    convention: tuple[Any, Any]
    plain: bool


@dataclass(slots=True, kw_only=True)
class Tally:
    """What was compared."""

    schedules: int = 0
    sequences: int = 0
    tokens: int = 0
    dropped: int = 0  # late steps
    ended: int = 0  # sequences, from outside, before they had all their tokens
    ties: int = 0  # sequences that another order of sums made choose another token, from there on not compared

    def __iadd__(self, other: Tally) -> Tally:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self


def make_small_bundle(root: Path, family: str, encoding_layers: int) -> TinyBundle:
    """As small as a bundle can be that has all groups of layers and room for the longest sequence."""
    return make_bundle(root, family, encoding_layers, layers=3, decoding_layers=1, max_positions=96)


def worlds(count: int, instead: Mapping[str, tuple[Any, ...]] = MappingProxyType({})) -> list[World]:
    """Drawn combinations, in which the values of a field are all equally frequent; ``instead`` of ``VALUES``, by field."""
    columns = {}
    for name, values in {**VALUES, **instead}.items():
        columns[name] = [values[i % len(values)] for i in range(count)]
        Random(name).shuffle(columns[name])
    return [World(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]


def play(world: World, backend: Backend, plan: CyclePlan, schedules: int) -> Tally:
    """Let sequences come and go on a backend that is as wide as the world says, and hold each to itself alone."""
    rng, tally = Random(f"{world}"), Tally(schedules=schedules)
    manners = [_manner(rng, may_leave=plan.may_leave and not plan.plain) for _ in range(MANNERS)]
    known: dict[tuple[Visit, int], Guest] = {}
    for number in range(schedules):
        visits, options = _schedule(Random(f"{number} of {world}"), manners)
        try:
            with within_their_slots(backend) if isinstance(backend, OnnxRuntimeBackend) else nullcontext():
                guests = serve(backend, plan, visits, options)
            for guest in guests:
                manner = _at_leisure(guest.visit)
                if (key := (manner, guest.index)) not in known:
                    known[key] = alone(backend, plan, *key)
                want, exact = known[key], world.dialect == "onnxruntime"
                clear = len(guest.tokens) if exact else _until_a_tie(backend, plan, guest, want)
                _hold(guest, want, clear, exact=exact)
                if guest.visit.enough is not None:  # what is left of a cycle is heard still
                    most = guest.visit.enough + (plan.cycle.cycle_length - 1 if backend.runs_cycles else 0)
                    assert len(guest.tokens) <= most, f"it went on: {guest.visit}"
                tally.ties += clear < len(guest.tokens)
                tally.sequences += 1
                tally.tokens += len(guest.tokens)
                tally.dropped += guest.sequence.dropped_tokens
                tally.ended += guest.events[-1].finish_reason == guest.visit.reason
        except Exception as error:
            error.add_note(f"schedule {number} of {world}: {visits}, {options}")
            raise
    return tally


@contextmanager
def within_their_slots(backend: OnnxRuntimeBackend) -> Iterator[None]:
    """Whether rows are written where runs are told to, and by padding behind that, and nowhere else; the simulator has rules."""
    cache = backend._caches
    assert isinstance(cache, HostKvCache), "it runs on the host"
    for buffer in cache._buffers.values():
        buffer[:] = UNTOUCHED
    reach, run = [0] * backend._cache_slots, backend.run

    def watched(steps: Sequence[SlotStep], committed: Sequence[int], **options: Any) -> RunOutput:
        widest = rounded_rows(max(len(rows) for s in steps for rows in (s.step.window, s.step.late)))
        stops = {slot: (committed[slot] if slot < len(committed) else 0) for slot in range(len(reach))}
        stops |= {s.slot: s.step.late.stop for s in steps}
        for slot, stop in stops.items():
            reach[slot] = max(reach[slot], stop + widest)
        return run(steps, committed, **options)

    backend.run = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        backend.run = run  # type: ignore[method-assign]
    for (layer, kind), buffer in cache._buffers.items():
        for slot, rows in enumerate(reach):
            assert (buffer[slot, :, rows:] == UNTOUCHED).all(), (
                f"{kind} {layer}, slot {slot}: written from row {rows} on"
            )


def _until_a_tie(backend: Backend, plan: CyclePlan, guest: Guest, want: Guest) -> int:
    """How many tokens are to be the same: all of them, or those before a choice that logits within the margin do not decide."""
    pairs = enumerate(zip(guest.tokens, want.tokens, strict=False))
    other = next((index for index, (got, expected) in pairs if got != expected), None)
    if other is None:
        return len(guest.tokens)
    seen = alone(backend, plan, replace(want.visit, logprobs=1), want.index)
    before, token = want.tokens[:other], guest.tokens[other]
    tied = seen.tokens[:other] == before and is_tie(want, before, seen.sampler.rows[other], token)
    return other if tied else len(guest.tokens)


def is_tie(guest: Guest, before: Sequence[int], row: Array, token: int) -> bool:
    """Whether logits [vocab] within the margin of these would have the guest choose the token behind those ``before``."""
    delta = np.float32(MARGIN * np.abs(row).max())
    likelier, less_likely = row > row[token], row < row[token]
    for shaken in (np.where(likelier, row - delta, row + delta), np.where(less_likely, row - delta, row + delta)):
        sampler = Guest(guest.visit, guest.index).sampler
        for known in before:
            sampler.observe(known)
        if sampler.choose(shaken).token_id == token:
            return True
    return False


def _hold(guest: Guest, want: Guest, count: int, *, exact: bool) -> None:
    """Whether company changed nothing in the first ``count`` tokens.

    ``exact``: to the last bit; else sums may have another order, within the margin.
    """
    visit, told = guest.visit, len(guest.tokens)
    assert guest.tokens[:count] == want.tokens[:count], f"company changed the tokens of {visit}"
    assert guest.steps[:count] == want.steps[:count], f"company changed the steps of {visit}"
    reason = guest.events[-1].finish_reason
    assert reason == ("length" if told == visit.tokens else visit.reason)
    assert reason == "length" or (visit.leaves, visit.enough) != (None, None), f"nobody ended {visit}"
    if not count or not (guest.sampler.records or visit.logprobs is not None):  # a device chose, which does not tell
        return
    got, expected = guest.sampler.rows[:count], want.sampler.rows[:count]
    assert len(got) == count, "a row for every token"
    if exact:
        np.testing.assert_array_equal(_bits(got), _bits(expected), f"bits of {visit}")
    else:
        bound = MARGIN * np.abs(expected).max()
        np.testing.assert_allclose(np.stack(got), np.stack(expected), rtol=0, atol=bound, err_msg=f"logits of {visit}")


def _bits(rows: list[Array]) -> Array:
    return np.stack(rows).view(np.uint32)


def _at_leisure(visit: Visit) -> Visit:
    """The same manner, alone: nobody before it, nobody who ends it."""
    return replace(visit, at=0, tokens=LONGEST, priority=0, salt=None, leaves=None, enough=None, reason="abort")


def _manner(rng: Random, *, may_leave: bool) -> Visit:
    temperature = rng.choice((0.0, 0.0, 1.5))
    return Visit(
        at=0,
        shared=rng.choice((0, 5, 16, 32, 48)),
        own=rng.randint(1, 24),
        tokens=LONGEST,
        temperature=temperature,
        seed=rng.randrange(1 << 20),
        priority=0,
        salt=None,
        logprobs=rng.choice((None, None, None, 1)),
        n=rng.choice((1, 1, 1, 3)),
        min_confidence=rng.choice((0.0, 0.0, 0.1, 0.2, 0.5, 0.6, 1.0)) if may_leave else 0.0,
        top_p=rng.choice((1.0, 0.8)) if temperature else 1.0,
        repetition_penalty=rng.choice((1.0, 1.0, 1.0, 1.3)),
    )


def _schedule(rng: Random, manners: list[Visit]) -> tuple[list[Visit], ServingOptions]:
    return list(_comings(rng, manners)), ServingOptions(
        max_num_batched_tokens=rng.choice((None, 8, 64)),
        long_prefill_token_threshold=rng.choice((None, 2, 16)),
        max_num_partial_prefills=rng.randint(1, 3),
        prefix_cache_bytes=rng.choice((0, 100_000, 1 << 28)),
    )


def _comings(rng: Random, manners: list[Visit]) -> Iterator[Visit]:
    for _ in range(rng.randint(1, 12)):
        yield replace(
            rng.choice(manners),
            at=rng.randint(0, 15),
            tokens=rng.randint(1, LONGEST),
            priority=rng.randint(0, 1),
            salt=rng.choice((None, None, "a")),
            leaves=rng.choice((*[None] * 9, 0, 3, 6, 12)),
            enough=rng.choice((*[None] * 8, 1, 4)),
            reason=rng.choice(("abort", "deadline")),
        )
