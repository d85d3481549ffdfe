"""What is served: a bundle's engine with its names, template and bounds; made when the bundle is opened."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmtd_errors.words import reason
from dmtd_runtime.async_llm import AsyncLLM
from dmtd_runtime.backends.base import OF_THE_BACKEND_ALONE, BackendOptions
from dmtd_runtime.errors import RequestError
from dmtd_runtime.server.errors import ApiError, context_overflow, invalid
from dmtd_runtime.server.lifecycle import Lifecycle
from dmtd_runtime.server.metrics import EngineMetrics, Metrics
from dmtd_runtime.server.options import Limits, ServerOptions
from dmtd_runtime.serving.options import ServingOptions
from dmtd_runtime.text.chat_template import ChatTemplate
from dmtd_runtime.text.tokenizer import Tokenizer

DMTD, PLAIN = "dmtd", "plain"
"""Engines, as metrics name them."""


@dataclass(slots=True, kw_only=True)
class Served:
    """One model. ``plain``: the same bundle in plain mode, where clients may ask for it."""

    llm: AsyncLLM
    plain: AsyncLLM | None
    names: tuple[str, ...]
    template: ChatTemplate | None
    options: ServerOptions
    limits: Limits
    lifecycle: Lifecycle
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer.

        Raises:
            ApiError: 400; it has none.
        """
        if self.llm.tokenizer is None:
            raise invalid(None, "this bundle has no tokenizer: only token ids can be sent to /v1/completions")
        return self.llm.tokenizer

    @property
    def most_prompt_tokens(self) -> int:
        """Tokens that a prompt may have, one for the answer left."""
        return min(self.limits.max_prompt_tokens or self.llm.max_model_len, self.llm.max_model_len - 1)

    def check_model(self, name: str | None) -> str:
        """The model's name as it was asked for.

        Raises:
            ApiError: 404; another model was asked for.
        """
        if name is None or name in self.names:
            return name or self.names[0]
        raise ApiError(
            404,
            f"the model {name[:100]!r} is not served here, expected {' or '.join(self.names)}",
            param="model",
            code="model_not_found",
        )

    def engine(self, *, plain: bool) -> AsyncLLM:
        """What answers.

        Raises:
            ApiError: 400; plain mode is not open to clients.
        """
        if not plain:
            return self.llm
        if self.plain is None:
            raise invalid("dmtd.plain", "this server was started without --allow-plain; leave it out")
        return self.plain

    def metrics_of(self, *, plain: bool) -> EngineMetrics:
        """Where requests of an engine are counted."""
        return self.metrics.engines[PLAIN if plain else DMTD]

    def check_prompt(self, ids: list[int], param: str) -> None:
        """Raise ApiError 400 for a prompt that leaves no room, or is longer than this server takes."""
        if len(ids) >= self.llm.max_model_len:
            raise context_overflow(len(ids), self.llm.max_model_len, param=param)
        if len(ids) > self.most_prompt_tokens:
            raise invalid(
                param,
                f"got {len(ids)} tokens, expected at most {self.most_prompt_tokens}, this server's limit; shorten it",
                code="context_length_exceeded",
            )


def open_served(
    bundle: Path,
    *,
    options: ServerOptions,
    limits: Limits,
    backend: BackendOptions,
    serving: ServingOptions,
    lifecycle: Lifecycle,
) -> Served:
    """Open the bundle; this takes as long as reading it does.

    Raises:
        DmtdError: the bundle, the backend or an option is not usable.
    """
    given: dict[str, Any] = {
        each: getattr(group, each)
        for group in (backend, serving)
        for each in group.__slots__
        if each not in OF_THE_BACKEND_ALONE
    }
    given["max_num_seqs"] = options.max_num_seqs
    template = _template(bundle, options)
    llm = AsyncLLM(bundle, **given)
    names = tuple(options.served_model_name or (bundle.resolve().name,))
    try:
        plain = AsyncLLM(bundle, **given | {"plain": True}) if options.allow_plain else None
    except BaseException:
        llm._close()
        raise
    return Served(
        llm=llm,
        plain=plain,
        names=names,
        template=template,
        options=options,
        limits=limits,
        lifecycle=lifecycle,
        metrics=Metrics(names[0], {name: each.snapshot for name, each in ((DMTD, llm), (PLAIN, plain)) if each}),
    )


def _template(bundle: Path, options: ServerOptions) -> ChatTemplate | None:
    if options.chat_template is None:
        return ChatTemplate.from_directory(bundle)
    try:
        source = options.chat_template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{options.chat_template} cannot be read ({reason(error)})", param="chat_template") from None
    return ChatTemplate.from_directory(bundle, given=source)
