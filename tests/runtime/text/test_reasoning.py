"""Reasoning apart from the answer, in pieces as in the whole."""

from __future__ import annotations

import pytest

from dmtd_runtime.text.reasoning import ReasoningDelta, ReasoningStream, split_reasoning, starts_in_reasoning

CASES = [
    ("", False, "", ""),
    ("plain text", False, "", "plain text"),
    ("  plain ", False, "", "  plain "),
    ("<think>\nhm, 1 < 2\n</think>\n\nYes. ", False, "hm, 1 < 2", "Yes. "),
    (" \n<think>a</think>b</think>c", False, "a", "b</think>c"),
    ("<think>\n\n</think>\n\nYes", False, "", "Yes"),  # what Qwen 3 writes without thinking
    ("<think>cut sho", False, "cut sho", ""),
    ("<think>cut </thi", False, "cut </thi", ""),
    ("<thi", False, "", "<thi"),
    ("<thin air", False, "", "<thin air"),
    ("text <think>a</think>", False, "", "text <think>a</think>"),
    ("a\nb</think>c", True, "a\nb", "c"),
    ("a </think", True, "a </think", ""),
    ("", True, "", ""),
]


@pytest.mark.parametrize(("text", "started", "reasoning", "content"), CASES)
def test_whole_and_in_pieces(text: str, started: bool, reasoning: str, content: str) -> None:
    wanted = ReasoningDelta(reasoning=reasoning, content=content)
    assert split_reasoning(text, started=started) == wanted
    for size in range(1, len(text) + 1):
        stream = ReasoningStream(started=started)
        deltas = [*(stream.push(text[i : i + size]) for i in range(0, len(text), size)), stream.flush()]
        assert "".join(delta.reasoning for delta in deltas) == reasoning
        assert "".join(delta.content for delta in deltas) == content


def test_a_prompt_that_begins_the_reasoning() -> None:
    assert starts_in_reasoning("<|im_start|>assistant\n<think>\n")
    assert not starts_in_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n")
