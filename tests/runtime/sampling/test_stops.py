"""Stop rules: ids, limits, stop strings over several tokens, and what streaming may show."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dmtd_runtime.errors import RequestError
from dmtd_runtime.sampling.params import SamplingParams
from dmtd_runtime.sampling.stops import StopRules, StopStep, StopStringMatcher


class Pieces:
    """A text source in which token ``i`` gives ``pieces[i]``, and the end gives ``tail``."""

    def __init__(self, pieces: Sequence[str], tail: str = "") -> None:
        self.pieces = pieces
        self.tail = tail

    def push(self, token_id: int) -> str:
        return self.pieces[token_id]

    def flush(self) -> str:
        tail, self.tail = self.tail, ""
        return tail


def run(
    pieces: Sequence[str], *, tail: str = "", eos: Sequence[int] = (), room: int | None = None, **options: Any
) -> list[StopStep]:
    """Steps of tokens 0, 1, 2, ... until the sequence ends."""
    rules = StopRules(SamplingParams(**options), eos_token_ids=eos, room=room, text=Pieces(pieces, tail))
    steps = []
    for token_id in range(len(pieces)):
        steps.append(rules.push(token_id))
        assert rules.num_tokens == token_id + 1
        assert rules.finished == (steps[-1].finish_reason is not None)
        if rules.finished:
            break
    return steps


def texts(steps: Sequence[StopStep]) -> list[str]:
    return [step.text for step in steps]


def end(steps: Sequence[StopStep]) -> tuple[str | None, str | int | None]:
    assert all(step.finish_reason is None and step.stop_reason is None for step in steps[:-1])
    return steps[-1].finish_reason, steps[-1].stop_reason


def test_goes_on_without_a_reason() -> None:
    steps = run(["a", "b"])
    assert steps == [StopStep(text="a"), StopStep(text="b")]


def test_end_of_sequence_id() -> None:
    steps = run(["a", "b", "</s>", "c"], eos=[7, 2])
    assert texts(steps) == ["a", "b", ""]
    assert end(steps) == ("stop", 2)
    steps = run(["a", "b", "</s>", "c"], eos=[2], include_stop_str_in_output=True)
    assert texts(steps) == ["a", "b", "</s>"]
    assert end(steps) == ("stop", 2)


def test_ignore_eos_keeps_stop_ids() -> None:
    steps = run(["a", "</s>", "b", "END", "c"], eos=[1], stop_token_ids=[3], ignore_eos=True)
    assert texts(steps) == ["a", "</s>", "b", ""]
    assert end(steps) == ("stop", 3)


@pytest.mark.parametrize(("max_tokens", "room", "expected"), [(2, None, 2), (None, 3, 3), (2, 3, 2), (4, 1, 1)])
def test_length(max_tokens: int | None, room: int | None, expected: int) -> None:
    steps = run(["a"] * 9, room=room, max_tokens=max_tokens)
    assert len(steps) == expected
    assert end(steps) == ("length", None)


def test_stop_beats_length_on_the_last_token() -> None:
    assert end(run(["a", "b"], eos=[1], max_tokens=2)) == ("stop", 1)
    assert end(run(["a", "b"], stop="ab", max_tokens=2)) == ("stop", "ab")


def test_stop_string_over_several_tokens() -> None:
    pieces = ["Hi\n", "\nUs", "er", ": x"]
    steps = run(pieces, stop=["\n\nUser:", "never"])
    assert texts(steps) == ["Hi", "", "", ""]
    assert end(steps) == ("stop", "\n\nUser:")
    steps = run(pieces, stop=["\n\nUser:"], include_stop_str_in_output=True)
    assert texts(steps) == ["Hi", "", "", "\n\nUser:"]


def test_text_held_back_comes_out_when_it_was_no_stop() -> None:
    assert texts(run(["a", "aa", "b", "c"], stop="aaab")) == ["", "", ""]
    assert texts(run(["a", "aaa", "b", "c"], stop="aaab", include_stop_str_in_output=True)) == ["", "a", "aaab"]
    assert texts(run(["x#", "#", "y", "#"], stop="###")) == ["x", "", "##y", ""]


def test_held_text_comes_out_at_the_end() -> None:
    assert texts(run(["x#", "#"], stop="###", max_tokens=2)) == ["x", "##"]
    assert texts(run(["x#", "</s>"], stop="###", eos=[1])) == ["x", "#"]


def test_the_tail_of_a_cut_character_comes_out_at_the_end() -> None:
    assert texts(run(["x", ""], tail="\ufffd", max_tokens=2)) == ["x", "\ufffd"]
    assert texts(run(["x", "</s>"], tail="\ufffd", eos=[1])) == ["x", "\ufffd"]


def test_first_completed_stop_wins_then_the_longest() -> None:
    assert end(run(["abcd"], stop=["bcd", "c"])) == ("stop", "c")
    assert texts(run(["abcd"], stop=["bcd", "c"])) == ["ab"]
    assert end(run(["abcd"], stop=["c", "abc", "bc"])) == ("stop", "abc")
    assert texts(run(["abcd"], stop=["c", "abc", "bc"])) == [""]


def test_min_tokens_lets_stops_sleep() -> None:
    steps = run(["a", "b", "a", "b"], stop="ab", stop_token_ids=[0, 1], min_tokens=2)
    assert texts(steps) == ["", "ab", "", ""]
    assert end(steps) == ("stop", "ab")
    assert end(run(["a", "b", "c", "d"], eos=[0, 1, 3], min_tokens=2)) == ("stop", 3)
    # Begun while asleep, ended while awake: it counts.
    assert end(run(["a", "b"], stop="ab", min_tokens=1)) == ("stop", "ab")
    assert texts(run(["xaa", "ab"], stop="aa", min_tokens=1)) == ["xa", ""]
    assert end(run(["xaa", "ab"], stop="aa", min_tokens=1)) == ("stop", "aa")
    assert end(run(["ab", "c"], stop="ab", min_tokens=1, max_tokens=2)) == ("length", None)


def test_without_a_tokenizer() -> None:
    rules = StopRules(SamplingParams(max_tokens=5, stop_token_ids=[9]), eos_token_ids=[2])
    assert rules.push(4) == StopStep()
    assert rules.push(9) == StopStep(finish_reason="stop", stop_reason=9)
    with pytest.raises(RequestError, match="no tokenizer to make text; use stop_token_ids"):
        StopRules(SamplingParams(stop="x"))


def test_flush_from_outside() -> None:
    rules = StopRules(SamplingParams(stop="##"), text=Pieces(["a#"], tail="\ufffd"))
    assert rules.push(0).text == "a"
    assert rules.flush() == "#\ufffd"
    assert rules.finished
    assert rules.flush() == ""
    with pytest.raises(AssertionError, match="no token follows"):
        rules.push(0)


def first_match(text: str, stops: Sequence[str]) -> tuple[int, int] | None:
    """(start, end) of the stop that ends first, of those the longest, by trying every place."""
    for stop_end in range(1, len(text) + 1):
        for start in range(stop_end):
            if text[start:stop_end] in stops:
                return start, stop_end
    return None


PIECES = st.lists(st.text("ab", max_size=4), max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)


@settings(deadline=None, max_examples=400)
@given(pieces=PIECES, stops=STOPS, include=st.booleans())
@example(pieces=["aabaa", "baab"], stops=["aabaab"], include=False)
@example(pieces=["abab", "abb"], stops=["ababb"], include=True)
def test_any_cut_into_pieces_gives_the_text_before_the_stop(pieces: list[str], stops: list[str], include: bool) -> None:
    matcher = StopStringMatcher(stops, include=include)
    whole = "".join(pieces)
    expected = first_match(whole, stops)
    shown, seen, matched = "", "", None
    for piece in pieces:
        seen += piece
        text, matched = matcher.push(piece)
        shown += text
        if matched is not None:
            break
        # Handed out now: nothing that could belong to a stop, and no less than that.
        held = max(
            length
            for stop in stops
            for length in range(len(stop))
            if length <= len(seen) and seen.endswith(stop[:length])
        )
        assert shown == seen[: len(seen) - held]
    if expected is None:
        assert matched is None
        assert shown + matcher.release() == whole
    else:
        start, stop_end = expected
        assert matched == whole[start:stop_end]
        assert shown == whole[: stop_end if include else start]
        assert matcher.release() == ""


def test_a_long_stop_string_of_one_letter() -> None:
    matcher = StopStringMatcher(["a" * 1024] * 2 + ["a" * 1023 + "b"])
    text, matched = matcher.push("xb" + "a" * 1023 + "b")
    assert (text, matched) == ("xb", "a" * 1023 + "b")
