"""Records to training examples: token ids and how many of them are the prompt. Every rule about a user's data is here.

Flow: ``rows.read_rows`` -> ``Examples.of_row`` -> ``read_data.py`` writes them. A record has one of three forms:

    {"messages": [{"role": ..., "content": ...}, ...]}   a chat, rendered with the model's own template
    {"text": ...}                                        a document
    {"prompt_ids": [...], "answer_ids": [...]}           tokens of this model's tokenizer

and all records of a source have the same. Nothing here packs, masks or knows phases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dmtd_errors.words import kind_of, shown
from dmtd_models.data.chat import TextTokenizer
from dmtd_models.data.errors import DataError
from dmtd_models.data.rows import Row

ROLES = ("system", "user", "assistant", "tool")
MIN_TOKENS = 2
"""A shorter example has nothing to predict."""

_FORMS = {"messages": ("messages",), "text": ("text",), "ids": ("prompt_ids", "answer_ids")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One sequence to train on."""

    input_ids: Sequence[int]
    prompt_len: int
    """Tokens before the answer; 0 for a document."""


@dataclass(slots=True, kw_only=True)
class Tally:
    """What happened to the records so far."""

    records: int = 0
    examples: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    cut_texts: int = 0
    cut_answers: int = 0
    dropped_prompts: int = 0
    dropped_short: int = 0


@dataclass(slots=True, kw_only=True)
class Examples:
    """Makes examples of records and counts; ``form`` is that of the first record."""

    tokenizer: TextTokenizer
    max_length: int
    """Tokens of an example, at most."""
    whole_chats: bool
    """One example a chat (its prompt ends at the first answer), in place of one for each answer."""
    tally: Tally = field(default_factory=Tally)
    form: str | None = None

    def of_row(self, row: Row) -> Iterator[Example]:
        """The examples of one record.

        Raises:
            DataError: a record of no known form, of another form than the first, or with something wrong inside.
        """
        form = form_of(row)
        if self.form is not None and form != self.form:
            raise DataError(
                f"{row.where}: got a record with `{_FORMS[form][0]}` after records with `{_FORMS[self.form][0]}`, "
                "expected one form; split the file by form and train on one"
            )
        self.form = form
        self.tally.records += 1
        if form == "text":
            yield from self.of_document(row.where, row.values["text"])
        elif form == "ids":
            yield from self._of_ids(row)
        else:
            yield from self._of_chat(row)

    def of_document(self, where: str, text: object) -> Iterator[Example]:
        """A document in pieces of at most ``max_length`` tokens."""
        if not isinstance(text, str):
            raise DataError(f"{where}: text: got {kind_of(text)}, expected text")
        if not text.strip():
            raise DataError(f"{where}: text: got empty text, expected words; remove the record")
        [ids] = self.tokenizer.encode_texts([checked_text(text, f"{where}: text")])
        self.tally.cut_texts += len(ids) > self.max_length
        for start in range(0, len(ids), self.max_length):
            yield from self._counted(ids[start : start + self.max_length], 0)

    def _of_ids(self, row: Row) -> Iterator[Example]:
        prompt, answer = (_checked_ids(row, name, self.tokenizer.vocab_size) for name in _FORMS["ids"])
        if not answer:
            raise DataError(f"{row.where}: answer_ids: got no tokens, expected an answer; remove the record")
        yield from self._answered(prompt, answer)

    def _of_chat(self, row: Row) -> Iterator[Example]:
        messages = checked_messages(row.values["messages"], row.where)
        ends = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        try:
            if self.whole_chats:
                yield from self._rendered(messages[: ends[-1] + 1], ends[0])
            else:
                for end in ends:
                    yield from self._rendered(messages[: end + 1], end)
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from error

    def _rendered(self, messages: Sequence[dict[str, str]], prompt_messages: int) -> Iterator[Example]:
        """The prompt is tokenised by itself, as when the model is used, and what follows it by itself."""
        prompt = self.tokenizer.render(messages[:prompt_messages], add_generation_prompt=True)
        whole = self.tokenizer.render(messages, add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise DataError(
                "chat template: the rendered prompt is not the beginning of the rendered chat, so the answer cannot "
                f"be found (prompt ends in {prompt[-40:]!r}); give prompt_ids and answer_ids, or another template"
            )
        answer = self.tokenizer.without_tail(whole[len(prompt) :])
        yield from self._answered(self.tokenizer.encode_rendered(prompt), self.tokenizer.encode_rendered(answer))

    def _answered(self, prompt: Sequence[int], answer: Sequence[int]) -> Iterator[Example]:
        if len(prompt) >= self.max_length:
            self.tally.dropped_prompts += 1
            return
        self.tally.cut_answers += len(prompt) + len(answer) > self.max_length
        yield from self._counted([*prompt, *answer][: self.max_length], len(prompt))

    def _counted(self, ids: Sequence[int], prompt_len: int) -> Iterator[Example]:
        if len(ids) < MIN_TOKENS:
            self.tally.dropped_short += 1
            return
        self.tally.examples += 1
        self.tally.tokens += len(ids)
        self.tally.answer_tokens += len(ids) - prompt_len
        yield Example(input_ids=ids, prompt_len=prompt_len)


def form_of(row: Row) -> str:
    """Which of the forms a record has: "messages", "text" or "ids".

    Raises:
        DataError: none of them, or several.
    """
    found = [form for form, columns in _FORMS.items() if any(column in row.values for column in columns)]
    if len(found) == 1:
        missing = [column for column in _FORMS[found[0]] if column not in row.values]
        if missing:
            raise DataError(f"{row.where}: got no {missing[0]}, expected prompt_ids and answer_ids together")
        return found[0]
    expected = "expected one of `messages`, `text`, or `prompt_ids` with `answer_ids`"
    if found:
        names = ", ".join(f"`{_FORMS[form][0]}`" for form in found)
        raise DataError(f"{row.where}: got {names} in one record, {expected}; remove the others")
    names = ", ".join(f"`{name}`" for name in sorted(row.values)[:8]) or "an empty object"
    raise DataError(f"{row.where}: got {names}, {expected}; rename or add the field")


def checked_messages(value: object, where: str) -> list[dict[str, str]]:
    """A chat with both sides, each message with a known role and text.

    What stands after the last answer is left in place: nothing asks for it.

    Raises:
        DataError: anything else, in one line.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise DataError(f"{where}: messages: got {kind_of(value)}, expected a list of {{role, content}} objects")
    messages = [_checked_message(message, f"{where}: messages[{index}]") for index, message in enumerate(value)]
    roles = [message["role"] for message in messages]
    for role, side in (("user", "question"), ("assistant", "answer")):
        if role not in roles:
            raise DataError(
                f"{where}: messages: got no {role} message, expected a chat with both sides; "
                f"add the {side} or remove the record"
            )
    if "user" not in roles[: roles.index("assistant")]:
        raise DataError(f"{where}: messages: got an answer before any user message; put the question before it")
    return messages


def _checked_message(value: object, where: str) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: got {kind_of(value)}, expected an object with role and content")
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        raise DataError(f"{where}.role: got {shown(role)}, expected one of {', '.join(ROLES)}")
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        content = "\n".join(_part_text(part, where) for part in content)
    if not isinstance(content, str):
        calls = "; tool calls are not learnt, remove the chat" if value.get("tool_calls") else ""
        raise DataError(f"{where}.content: got {kind_of(content)}, expected text{calls}")
    if not content.strip():
        raise DataError(f"{where}.content: got empty text, expected words; remove the chat")
    return {"role": str(role), "content": checked_text(content, f"{where}.content")}


def checked_text(text: str, where: str) -> str:
    """The text, which JSON may have given halves of a character: no tokenizer takes them.

    Raises:
        DataError: it holds one.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: got half a character ({text[error.start]!r}, the {error.start + 1}th), expected Unicode text; "
            "write the character whole or remove the record"
        ) from error
    return text


def _part_text(part: object, where: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
    if not isinstance(text, str):
        raise DataError(f"{where}.content: got a part that is not text, expected {{'type': 'text', 'text': ...}}")
    return text


def _checked_ids(row: Row, name: str, vocab_size: int) -> list[int]:
    value: Any = row.values[name]
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise DataError(f"{row.where}: {name}: got {kind_of(value)}, expected a list of token ids")
    for number in value:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < vocab_size:
            raise DataError(
                f"{row.where}: {name}: got {shown(number)}, expected ids from 0 to {vocab_size - 1}; "
                "tokenise the data with this model's tokenizer"
            )
    return list(value)
