"""What chats and completions have in common: from a body to a running ``Run``, and the parts of their answers."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from dmtd_runtime.server.generation import Run
from dmtd_runtime.server.params import Wanted, check_room
from dmtd_runtime.server.schema import ResponsesBody, SamplingBody
from dmtd_runtime.server.served import Served
from dmtd_runtime.server.streaming import answer, unless_gone


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What every answer and every chunk of one request begins with."""

    id: str
    kind: str
    created: int
    model: str

    @staticmethod
    def of(http: HttpRequest, prefix: str, kind: str, model: str, request_id: str | None = None) -> Head:
        """``request_id``: the client's own name for it."""
        name = f"{prefix}-{request_id or http.state.request_id}"
        return Head(id=name, kind=kind, created=int(time.time()), model=model)

    def body(self, **more: Any) -> dict[str, Any]:
        return {"id": self.id, "object": self.kind, "created": self.created, "model": self.model, **more}


def usage(run: Run, *, completion_tokens: int | None = None) -> dict[str, Any]:
    """Tokens of a request so far."""
    completion = run.completion_tokens if completion_tokens is None else completion_tokens
    return {
        "prompt_tokens": run.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": run.prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": run.cached_tokens},
    }


async def start(
    served: Served,
    body: SamplingBody | ResponsesBody,
    head: Head,
    prompts: Sequence[list[int]],
    wanted: Wanted,
    *,
    param: str,
    asked: tuple[str, int | None],
) -> Run:
    """A request in the engine's queue. ``param`` names the prompt's field, ``asked`` the answer's length as it was given.

    Raises:
        ApiError: it cannot be served, or not now; nothing has started then.
    """
    for ids in prompts:
        served.check_prompt(ids, param)
        check_room(len(ids), served.llm.max_model_len, asked=asked)
    run = Run(
        served, prompts, wanted, name=head.id, plain=body.dmtd.plain, priority=body.priority, salt=body.cache_salt
    )
    return await run.start()


async def whole(http: HttpRequest, run: Run, write: Callable[[Run], Awaitable[dict[str, Any]]]) -> Response:
    """The answer at once; the request is cancelled when the client goes.

    Raises:
        ClientGoneError: it went.
    """
    try:
        return answer(await unless_gone(http.receive, write(run)))
    finally:
        await run.aclose()


def measured(run: Run, body: SamplingBody | ResponsesBody) -> dict[str, Any]:
    """An ended request's ``dmtd``: its steps behind the prompts, and what log probabilities of a prompt are those of, where
    they are told: its tokens as a prompt, or from a place on as a reply in cycles.
    """
    steps, start = run.steps(), run.wanted.score_from
    told: dict[str, Any] = {
        "full_passes": steps.full_passes,
        "late_steps": steps.late_steps,
        "dropped_tokens": steps.dropped_tokens,
        "tokens_per_full_pass": steps.tokens_per_full_pass,
    }
    if body.scores_prompt:
        as_prompt = "plain" if run.served.llm.manifest.cycle.cycle_origin == "prompt" else "cycles"
        told |= {"prompt_logprobs": as_prompt if start is None else "cycles", "score_from": start}
    return told


def wants_usage(body: SamplingBody) -> tuple[bool, bool]:
    """Whether a stream ends with a chunk of usage, and whether every chunk carries it."""
    options = body.stream_options
    return bool(options and options.include_usage), bool(options and options.continuous_usage_stats)
