"""``LLM``: a bundle opened for use. Prompts in, text out; everything else is behind it.

    with LLM("bundle") as llm:
        [output] = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=20))
        print(output.outputs[0].text)

It may be called from several threads: what they ask for at the same time shares batches. It prints nothing, keeps no
global state (but for two variables: they keep ONNX Runtime's telemetry off and number GPUs as nvidia-smi does), and logs
under ``dmtd``. ``AsyncLLM`` is the same for an event loop.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from dmtd_runtime.errors import RequestError
from dmtd_runtime.sampling.params import SamplingParams
from dmtd_runtime.serving.outputs import Delta, RequestOutput
from dmtd_runtime.serving.request import Request
from dmtd_runtime.serving.service import Service
from dmtd_runtime.text.prompt import Message, Prompt, as_prompts


class LLM(Service):
    __doc__ = Service.__doc__

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every request, stop the worker and free its memory. Safe to call twice."""
        self._close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        timeout_s: float | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        score_from: int | None = None,
    ) -> list[RequestOutput]:
        """Complete one prompt or a list of them (text, or token ids).

        Args:
            prompts: a prompt is a string or a list of token ids.
            params: one for all or one for each; None: the bundle's generation_config.json.
            timeout_s: requests not done by then end with ``finish_reason`` "deadline" and what they have.
            priority: of those that wait, lower goes first.
            cache_salt: cached prefixes are shared among requests of the same salt alone.
            score_from: the tokens of each prompt from this place on are read as a reply in cycles, which ``prompt_logprobs``
                then scores; None: all of it as a prompt.

        Returns:
            One output a prompt, in order.

        Raises:
            RequestError: a prompt or an option that cannot be served; nothing is started then.
            QueueFullError: more would wait than may; nothing is started then.
        """
        listed = as_prompts(prompts)
        each = list(params) if isinstance(params, Sequence) else [params] * len(listed)
        if len(each) != len(listed):
            raise RequestError(
                f"got {len(each)} for {len(listed)} prompts, expected one for all or one for each", param="params"
            )
        return self._finish(
            [
                self._request(
                    prompt, one, timeout_s=timeout_s, priority=priority, cache_salt=cache_salt, score_from=score_from
                )
                for prompt, one in zip(listed, each, strict=True)
            ]
        )

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them; see :meth:`generate`, and :meth:`render_chat` for what it is given."""
        several = bool(messages) and isinstance(messages[0], Sequence)
        conversations: Sequence[Any] = messages if several else [messages]
        prompts = [
            self.render_chat(each, tools=tools, documents=documents, chat_template_kwargs=chat_template_kwargs)
            for each in conversations
        ]
        return self._finish(
            [
                self._request(
                    prompt, params, timeout_s=timeout_s, priority=priority, cache_salt=cache_salt, from_template=True
                )
                for prompt in prompts
            ]
        )

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        timeout_s: float | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> Stream:
        """Complete one prompt piece by piece. Closing the iterator early cancels the request.

        ``request_id`` names it for :meth:`abort`. Errors as in :meth:`generate`, raised here and not at the first piece.
        """
        request = self._request(
            prompt, params, request_id=request_id, timeout_s=timeout_s, priority=priority, cache_salt=cache_salt
        )
        return self._pieces(request)

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> Stream:
        """Answer a conversation piece by piece; see :meth:`stream` and :meth:`render_chat`."""
        request = self._request(
            self.render_chat(messages, tools=tools, documents=documents, chat_template_kwargs=chat_template_kwargs),
            params,
            request_id=request_id,
            timeout_s=timeout_s,
            priority=priority,
            cache_salt=cache_salt,
            from_template=True,
        )
        return self._pieces(request)

    def _finish(self, requests: Sequence[Request]) -> list[RequestOutput]:
        """Run requests to their ends; Ctrl-C in the caller cancels them."""
        try:
            self._start(requests)
            for request in requests:
                request.wait()
            return [request.result() for request in requests]
        finally:
            self._forget(requests)

    def _pieces(self, request: Request) -> Stream:
        self._start([request])
        return Stream(request, lambda: self._forget([request]))


class Stream(Iterator[Delta]):
    """Pieces of one request. Closing it, leaving its ``with`` block or dropping it early cancels the request."""

    def __init__(self, request: Request, forget: Callable[[], None]) -> None:
        self.request_id = request.request_id
        self._request = request
        self._deltas = request.deltas()
        self._close = weakref.finalize(self, forget)

    def __next__(self) -> Delta:
        try:
            return next(self._deltas)
        except BaseException:
            self.close()
            raise

    def result(self) -> RequestOutput:
        """Wait for the end, and give the whole output with its metrics, pieces taken before included."""
        for _ in self:
            pass
        return self._request.result()

    def close(self) -> None:
        """Cancel what is left of the request."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
