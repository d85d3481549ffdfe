"""Held-out text as windows of token ids, and where text comes from: a file, or a directory of data files.

--text FILE --> TextItem --> TextWindow --> perplexity, run lengths
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dmtd_errors.words import reason
from dmtd_export.evaluate.errors import EvaluateError
from dmtd_export.evaluate.options import MIN_SCORED
from dmtd_models.data.chat import TextTokenizer
from dmtd_models.data.examples import Examples, checked_text, form_of
from dmtd_models.data.items import TextItem
from dmtd_models.data.rows import SUFFIXES, read_rows
from dmtd_models.errors import ModelError

CANDIDATES = 8  # tokens cut into windows for each one that is taken


@dataclass(frozen=True, slots=True, kw_only=True)
class TextWindow:
    """A run of a document's tokens, behind the tokens that the tokenizer puts before every text; or a chat with its answer.

    The first ``context_len`` tokens are fed and not scored: they are the prompt where cycles count from its end. That of a chat
    is its own; that of a text is the evaluation's choice.
    """

    source: str
    text_id: str
    token_ids: tuple[int, ...]
    context_len: int
    is_chat: bool = False


def read_texts(name: str) -> Iterator[TextItem]:
    """Held-out documents of data files (objects with ``text``), or one plain file.

    Chats are ``chat_windows``'s business.

    Raises:
        EvaluateError: not there, or not readable.
    """
    path = Path(name)
    if _is_data(path):
        yield from _records(path)
        return
    yield _whole_file(path)


def check_text(name: str) -> None:
    """Refuse a --text that is not there, or whose first record has no known form: before anything is opened for it.

    Raises:
        EvaluateError: so it is.
    """
    if not Path(name).exists():
        raise EvaluateError(
            f"{name}: no such file or directory; give a text file, or {', '.join(SUFFIXES)} data as --data of "
            "dmtd finetune takes",
            param="texts",
        )
    is_chats(name)


def _is_data(path: Path) -> bool:
    """Records rather than one text: a file with such a suffix, or a directory."""
    return path.is_dir() or (path.is_file() and path.suffix in SUFFIXES)


def _whole_file(path: Path) -> TextItem:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluateError(
            f"{path}: cannot be read as UTF-8 text ({reason(error)}); give a text or .jsonl file"
        ) from None
    return TextItem(source=path.name, text_id=path.name, text=text)


def _records(path: Path) -> Iterator[TextItem]:
    """Documents of a data file, read as training reads them: a text may hold any line separator of Unicode."""
    try:
        for row in read_rows(path):
            text = row.values.get("text")
            if not isinstance(text, str):
                raise EvaluateError(
                    f'{row.where}: expected {{"text": ...}} with a string, as in the first record', param="texts"
                )
            number = row.where.removeprefix(path.name).lstrip(":, ")
            yield TextItem(
                source=path.name,
                text_id=str(row.values.get("id", number)),
                text=checked_text(text, f"{row.where}: text"),
            )
    except ModelError as error:
        raise EvaluateError(f"{error}", param="texts") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowPlan:
    """How text is cut, and how many tokens of a window are its context. The context of a chat is its prompt."""

    window_len: int
    context_len: int
    max_tokens: int  # of all windows, contexts included; a first window is taken whatever its length
    seed: int


def cut_windows(
    texts: Iterable[TextItem], encode: Callable[[str], list[int]], plan: WindowPlan
) -> tuple[TextWindow, ...]:
    """Windows of at most ``window_len`` tokens, a seeded choice of ``max_tokens`` in their order.

    ``encode`` adds the tokens that the tokenizer puts before a text; every window gets them.
    """
    prefix = encode("")
    room = plan.window_len - len(prefix)
    assert room > plan.context_len + MIN_SCORED, f"window of {plan.window_len} leaves nothing to score"
    return _chosen(_windows(texts, encode, prefix, room, plan), plan)


def _chosen(windows: Iterable[TextWindow], plan: WindowPlan) -> tuple[TextWindow, ...]:
    candidates = _within(windows, CANDIDATES * plan.max_tokens)
    order = np.random.default_rng(plan.seed).permutation(len(candidates)).tolist()
    taken = len(_within((candidates[i] for i in order), plan.max_tokens))
    return tuple(candidates[i] for i in sorted(order[:taken]))


def _within(windows: Iterable[TextWindow], max_tokens: int) -> list[TextWindow]:
    """The first of ``windows`` that together have at most ``max_tokens`` tokens, and at least one."""
    taken: list[TextWindow] = []
    tokens = 0
    for window in windows:
        tokens += len(window.token_ids)
        if taken and tokens > max_tokens:
            break
        taken.append(window)
    return taken


def _windows(
    texts: Iterable[TextItem],
    encode: Callable[[str], list[int]],
    prefix: Sequence[int],
    room: int,
    plan: WindowPlan,
) -> Iterator[TextWindow]:
    for item in texts:
        ids = encode(item.text)[len(prefix) :]
        for start in range(0, len(ids), room):
            piece = ids[start : start + room]
            if len(piece) >= plan.context_len + MIN_SCORED:
                yield TextWindow(
                    source=item.source,
                    text_id=item.text_id,
                    token_ids=(*prefix, *piece),
                    context_len=plan.context_len,
                )


def is_chats(name: str) -> bool:
    """Whether a --text holds chats (``messages``, or ``prompt_ids`` with ``answer_ids``): its first record tells.

    Raises:
        EvaluateError: a first record of no known form.
    """
    if not _is_data(Path(name)):
        return False
    try:
        row = next(read_rows(Path(name)), None)
        return row is not None and form_of(row) != "text"
    except ModelError as error:
        raise EvaluateError(f"{error}", param="texts") from error


def chat_windows(name: str, tokenizer: TextTokenizer, plan: WindowPlan) -> tuple[TextWindow, ...]:
    """The answers of a file of chats, each behind its prompt; a longer chat than ``window_len`` loses its end.

    Raises:
        EvaluateError: a record that is no chat.
    """
    examples = Examples(tokenizer=tokenizer, max_length=plan.window_len, whole_chats=False)
    source = Path(name).name
    try:
        return _chosen(
            (
                TextWindow(
                    source=source,
                    text_id=row.where,
                    token_ids=tuple(int(token) for token in example.input_ids),
                    context_len=max(1, example.prompt_len),  # without a prompt the first token is fed all the same
                    is_chat=True,
                )
                for row in read_rows(Path(name))
                for example in examples.of_row(row)
                if len(example.input_ids) >= max(1, example.prompt_len) + MIN_SCORED
            ),
            plan,
        )
    except ModelError as error:
        raise EvaluateError(f"{error}", param="texts") from error


def collect_windows(
    names: Sequence[str],
    encode: Callable[[str], list[int]],
    chats: Callable[[], TextTokenizer],
    plan: WindowPlan,
) -> tuple[TextWindow, ...]:
    """Windows of several texts, the budget shared evenly. ``chats`` gives the tokenizer with its chat template.

    Raises:
        EvaluateError: a text of which nothing is long enough, or that is not there.
    """
    found: list[TextWindow] = []
    for name in names:
        share = WindowPlan(
            window_len=plan.window_len,
            context_len=plan.context_len,
            max_tokens=plan.max_tokens // len(names),
            seed=plan.seed,
        )
        if is_chats(name):
            windows = chat_windows(name, chats(), share)
        else:
            windows = cut_windows(read_texts(name), encode, share)
        if not windows:
            raise EvaluateError(
                f"{name}: no document has {plan.context_len + MIN_SCORED} tokens; give a longer text", param="texts"
            )
        found += windows
    return tuple(found)
