"""What generate and chat hand to the bundle's chat template beside the messages."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from dmtd_errors.words import reason
from dmtd_runtime.cli.options.groups import Group, option
from dmtd_runtime.errors import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenTemplate:
    """What was given on the command line; None: not given."""

    chat_template_kwargs: str | None = None
    tools: Path | None = None

    def arguments(self) -> dict[str, Any]:
        """The arguments of ``LLM.render_chat``.

        Raises:
            RequestError: no JSON, or a file that cannot be read.
        """
        given: dict[str, Any] = {}
        if self.chat_template_kwargs is not None:
            expected = '{"enable_thinking": false}'
            given["chat_template_kwargs"] = _parsed(self.chat_template_kwargs, dict, "chat_template_kwargs", expected)
        if self.tools is not None:
            try:
                text = self.tools.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise RequestError(
                    f"{self.tools} cannot be read ({reason(error)}); name a JSON file in UTF-8", param="tools"
                ) from None
            given["tools"] = _parsed(text, list, "tools", '[{"type": "function", "function": {"name": ...}}]')
        return given


TEMPLATE = Annotated[
    GivenTemplate,
    Group(
        {
            "chat_template_kwargs": option(
                'Names for the template: JSON, such as {"enable_thinking": false}. By default none.',
                "--chat-template-kwargs",
            ),
            "tools": option("JSON file with a list of functions that the model may call. By default none.", "--tools"),
        }
    ),
]


def _parsed(text: str, kind: type, param: str, expected: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, kind):
        shown = " ".join(text.split())[:60]
        raise RequestError(f"got {shown!r}, expected JSON such as {expected}", param=param)
    return value
