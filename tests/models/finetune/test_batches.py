"""Documents to batches: nothing lost, positions and phases of each document its own, the right rows learnt."""

from __future__ import annotations

import numpy as np
import pytest
from finetune_support import CONVENTIONS, documents_of, spec_of
from hypothesis import given
from hypothesis import strategies as st

from dmtd_models.finetune.batches import Collator, PackedRows, Row, make_batch, pack
from dmtd_models.finetune.options import BatchOptions
from dmtd_models.reference.oracle import gates

STILL = BatchOptions(vary_phase=False)
by_convention = pytest.mark.parametrize("convention", CONVENTIONS, ids="+".join)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@given(st.lists(st.integers(2, 40), min_size=1, max_size=200), st.integers(40, 90), st.integers(0, 3))
def test_every_document_lies_in_one_row_that_holds_it(lengths: list[int], row_len: int, seed: int) -> None:
    rows = pack(lengths, row_len, seed)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= row_len for row in rows)
    assert rows == pack(lengths, row_len, seed)


def test_rows_are_filled() -> None:
    lengths = [int(n) for n in np.random.default_rng(1).integers(20, 300, size=400)]
    rows = pack(lengths, 1024, 0)
    assert sum(lengths) / (len(rows) * 1024) > 0.95
    assert rows != pack(lengths, 1024, 1)


@by_convention
def test_each_document_begins_anew_wherever_it_lies(convention: tuple[str, str]) -> None:
    spec = spec_of(convention, cycle=3)
    documents = documents_of([(11, 4), (7, 2), (10, 1)])
    batch = make_batch(documents, spec, STILL, rng())
    assert batch["starts"].tolist() == [0, 11, 18, 28]
    assert batch["positions"].tolist() == [*range(11), *range(7), *range(10)]
    assert batch["input_ids"].tolist() == [token for document in documents for token in document.token_ids]
    assert batch["rows"].tolist() == list(range(28))
    for document, start in zip(documents, (0, 11, 18), strict=True):
        end = start + len(document.token_ids)
        expected = gates(spec, prompt_len=document.prompt_len, total_len=len(document.token_ids))
        assert batch["gate_hidden"][start:end].tolist() == expected[0].tolist()
        assert batch["gate_thought"][start:end].tolist() == expected[1].tolist()


@by_convention
@pytest.mark.parametrize("learn_prompt", [False, True])
def test_answers_are_learnt_from_the_last_token_of_the_prompt_on(
    convention: tuple[str, str], learn_prompt: bool
) -> None:
    spec = spec_of(convention, cycle=3)
    first, second = documents_of([(8, 3), (6, 4)])
    batch = make_batch([first, second], spec, BatchOptions(learn_prompt=learn_prompt, vary_phase=False), rng())
    rows = ([*range(7)], [*range(5)]) if learn_prompt else ([2, 3, 4, 5, 6], [3, 4])
    assert batch["loss_rows"].tolist() == [*rows[0], *(8 + row for row in rows[1])]
    assert batch["labels"].tolist() == [
        *(int(first.token_ids[row + 1]) for row in rows[0]),
        *(int(second.token_ids[row + 1]) for row in rows[1]),
    ]


def test_phases_by_hand() -> None:
    prompt = make_batch(
        documents_of([(8, 3)]), spec_of(cycle=3), BatchOptions(learn_prompt=True, vary_phase=False), rng()
    )
    assert prompt["phase"].tolist() == [-1, -1, -1, 0, 1, 2, 0]
    absolute = make_batch(documents_of([(8, 3)]), spec_of(CONVENTIONS[0], cycle=3), STILL, rng())
    assert absolute["loss_rows"].tolist() == [2, 3, 4, 5, 6]
    assert absolute["phase"].tolist() == [2, 0, 1, 2, 0]


@by_convention
def test_a_row_with_loss_has_the_phase_that_its_gates_say(convention: tuple[str, str]) -> None:
    spec = spec_of(convention, cycle=4)
    batch = make_batch(documents_of([(30, 9), (25, 0), (12, 2)]), spec, BatchOptions(learn_prompt=True), rng())
    hidden, thought = (batch[name][batch["loss_rows"]] for name in ("gate_hidden", "gate_thought"))
    phase = batch["phase"]
    inside = phase >= 0
    assert ((hidden == 1) & (thought == 1))[phase == 0].all()
    assert ((hidden == 1) & (thought == 0))[phase > 0].all()
    assert inside.all() if convention[0] == "absolute" else bool((~inside).any())
    assert (thought[~inside] == 1).all()


def test_varying_the_phase_moves_only_the_first_head() -> None:
    spec, documents = spec_of(cycle=4), documents_of([(40, 7)])
    still = make_batch(documents, spec, STILL, rng())
    seen = set()
    for seed in range(40):
        moved = make_batch(documents, spec, BatchOptions(), np.random.default_rng(seed))
        for name in ("input_ids", "positions", "loss_rows", "labels", "starts"):
            assert moved[name].tolist() == still[name].tolist()
        shift = int(moved["gate_hidden"].argmax()) - 7
        expected = gates(spec, prompt_len=7 + shift, total_len=40)
        assert moved["gate_thought"].tolist() == expected[1].tolist()
        seen.add(shift)
    assert seen == {0, 1, 2, 3}


def test_cycles_of_varied_lengths_are_those_that_may_be_left() -> None:
    """Gates and phases as the oracle has them for the same heads; every length is drawn, and nothing else moves."""
    spec, documents = spec_of(cycle=4), documents_of([(60, 7), (50, 0)])
    still, lengths = make_batch(documents, spec, STILL, rng()), set()
    for seed in range(20):
        options = BatchOptions(vary_phase=False, cycle_lengths="varied")
        batch = make_batch(documents, spec, options, np.random.default_rng(seed))
        for name in ("input_ids", "positions", "labels", "starts"):
            assert name == "labels" or batch[name].tolist() == still[name].tolist()
        hidden, thought = batch["gate_hidden"][:60].numpy(), batch["gate_thought"][:60].numpy()
        heads = np.flatnonzero(hidden & thought)
        assert heads[0] == 7
        expected = gates(spec, prompt_len=7, total_len=60, heads=heads.tolist())  # refuses gaps above the cycle length
        np.testing.assert_array_equal(hidden, expected[0])
        np.testing.assert_array_equal(thought, expected[1])
        rows = batch["loss_rows"][: 60 - 7].numpy()
        wanted = [-1 if row < 7 else row - heads[heads <= row].max() for row in rows]
        assert batch["phase"][: 60 - 7].tolist() == wanted
        lengths |= set(np.diff(heads).tolist())
    assert lengths == {1, 2, 3, 4}


def test_a_short_answer_keeps_a_head() -> None:
    for seed in range(20):
        batch = make_batch(documents_of([(6, 5)]), spec_of(cycle=8), BatchOptions(), np.random.default_rng(seed))
        assert batch["gate_hidden"].tolist() == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("learn_prompt", [False, True])
def test_part_of_a_free_text_stands_for_its_prompt(learn_prompt: bool) -> None:
    spec, firsts = spec_of(cycle=4), set()
    for seed in range(40):
        options = BatchOptions(learn_prompt=learn_prompt, vary_phase=False)
        batch = make_batch(documents_of([(30, 0)]), spec, options, np.random.default_rng(seed))
        head = int(batch["gate_hidden"].argmax())
        assert 1 <= head < 15
        assert batch["loss_rows"].tolist() == list(range(0 if learn_prompt else head - 1, 29))
        expected = gates(spec, prompt_len=head, total_len=30)
        assert batch["gate_thought"].tolist() == expected[1].tolist()
        firsts.add(head)
    assert len(firsts) > 5
    shortest = make_batch(documents_of([(2, 0)]), spec, STILL, rng())
    assert shortest["loss_rows"].tolist() == [0] and shortest["gate_hidden"].tolist() == [0, 1]


def test_a_row_made_again_is_the_same_and_another_epoch_moves_its_phases() -> None:
    documents = documents_of([(30, 5), (28, 6), (30, 3), (25, 9)])
    rows = PackedRows(documents, [[0, 1], [2, 3]])

    def heads(seed: int, epoch: int, index: int) -> tuple[int, ...]:
        rows.set_epoch(epoch)
        batch = Collator(spec_of(cycle=4), BatchOptions(), seed)([rows[index]])
        return tuple(batch["gate_hidden"].tolist())

    assert heads(1, 2, 0) == heads(1, 2, 0)
    assert len({heads(1, epoch, 0) for epoch in range(12)}) > 4
    assert len({heads(seed, 0, 1) for seed in range(12)}) > 4
    assert [len(rows[index].documents) for index in range(len(rows))] == [2, 2]


def test_the_cycle_length_may_change_between_batches() -> None:
    collate = Collator(spec_of(CONVENTIONS[0], cycle=4), STILL, 0)
    row = Row(epoch=0, index=0, documents=documents_of([(9, 0)]))
    collate.set_cycle_length(2)
    assert collate([row])["gate_thought"].tolist() == [1, 0, 1, 0, 1, 0, 1, 0, 1]
    collate.set_cycle_length(4)
    assert collate([row])["gate_thought"].tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 1]
