"""``LLM``: a bundle opened for use. Prompts in, text out; everything else is behind it.

    with LLM("bundle") as llm:
        [output] = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=20))
        print(output.outputs[0].text)

It may be called from several threads: what they ask for at the same time shares batches. It prints nothing, keeps no
global state (but for two variables: they keep ONNX Runtime's telemetry off and number GPUs as nvidia-smi does), and logs
under ``dmtd``.
"""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Number
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from dmtd_runtime.backends.base import BackendName, BackendOptions, FullPass
from dmtd_runtime.backends.opening import ROOM_HINT, memory_needs, open_backend
from dmtd_runtime.bundle.opening import open_bundle, read_generation_config
from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.errors import RequestError
from dmtd_runtime.machine.memory import one_line_memory
from dmtd_runtime.sampling.params import SamplingParams
from dmtd_runtime.serving.outputs import Delta, RequestOutput
from dmtd_runtime.serving.request import Request
from dmtd_runtime.serving.worker import Engine
from dmtd_runtime.text.chat_template import ChatTemplate
from dmtd_runtime.text.tokenizer import Tokenizer

logger = logging.getLogger("dmtd.llm")

Prompt = str | Sequence[int]
Message = Mapping[str, Any]
DEFAULT_MAX_NUM_SEQS = 1


class LLM:
    """One bundle on one device.

    Args:
        bundle: directory made by `dmtd export`.
        backend: ``onnxruntime`` runs the bundle's graphs; ``tensorrt``, ``tensorrt-rtx`` and ``simulator`` run the engines that
            `dmtd build` made of it, the simulator on the CPU.
        cuda_graphs: on a GPU, capture work once and replay it: whole cycles of engines, steps of ONNX Runtime.
        warm_up: on a GPU, run every shape once at opening, so that no request waits for kernels to be compiled or chosen.
        device: ``cpu``, or ``cuda`` for ONNX Runtime's CUDA provider (a float16 or bfloat16 bundle).
        device_id: which GPU.
        dialect: which graphs; None takes ONNX Runtime's own where the bundle has them.
        full_pass: ``staged`` (T, D and lm_head in memory once) or ``fused`` (one graph, encoding layers read once); None takes
            fused where the split has encoding layers.
        max_num_seqs: sequences that may run at a time. 1, the default, is the fastest for a single sequence.
        max_model_len: prompt and answer together, at most the bundle's own limit, the default.
        threads: of the computation; None takes one for each core this process may use.
        plain: run every layer for every token: the baseline, and the original model if the weights are the original's.

    Raises:
        BundleError: the bundle is missing, damaged or too new.
        BackendError: the library or device asked for is not usable.
        RequestError: an option out of range.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        *,
        backend: BackendName = "onnxruntime",
        cuda_graphs: bool = True,
        warm_up: bool = False,
        device: Literal["cpu", "cuda"] = "cpu",
        device_id: int = 0,
        dialect: Literal["standard", "onnxruntime"] | None = None,
        full_pass: FullPass | None = None,
        max_num_seqs: int | None = None,
        max_model_len: int | None = None,
        threads: int | None = None,
        plain: bool = False,
    ) -> None:
        if not isinstance(plain, bool):
            raise RequestError(f"got {plain!r}, expected True or False", param="plain")
        directory = Path(bundle)
        self.manifest = open_bundle(directory)
        self.tokenizer = Tokenizer.from_directory(directory)
        self.default_params = SamplingParams.from_generation_config(read_generation_config(directory))
        self._template = ChatTemplate.from_directory(directory) if self.tokenizer else None
        plan = CyclePlan(cycle=self.manifest.cycle, plain=plain)
        options = BackendOptions(
            backend=backend,
            cuda_graphs=cuda_graphs,
            warm_up=warm_up,
            device=device,
            device_id=device_id,
            dialect=dialect,
            full_pass=full_pass,
            max_num_seqs=DEFAULT_MAX_NUM_SEQS if max_num_seqs is None else max_num_seqs,
            max_model_len=max_model_len,
            threads=threads,
        )
        opened = open_backend(directory, self.manifest, replace(options, warm_up=False))
        self.max_model_len = opened.max_model_len
        self._at_limit = opened.max_model_len == self.manifest.model.max_model_len
        self.stats = opened.stats
        tokenizer_eos = self.tokenizer.eos_token_ids if self.tokenizer else ()
        self._eos = tuple(dict.fromkeys((*self.manifest.model.eos_token_ids, *tokenizer_eos)))
        self._ids = itertools.count()
        self._requests: dict[str, Request] = {}
        with one_line_memory(memory_needs(self.manifest, options), ROOM_HINT):
            self._engine = Engine(opened, plan, warm_up=options.warm_up)
        self._close = weakref.finalize(self, Engine.close, self._engine)
        if not self.manifest.cycle.dmtd_trained and not plain:
            logger.info("%s: weights not trained for DMTD; its late steps choose poor words", directory)

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
    ) -> list[RequestOutput]:
        """Complete one prompt or a list of them (text, or token ids).

        Args:
            prompts: a prompt is a string or a list of token ids.
            params: one for all or one for each; None: the bundle's generation_config.json.
            timeout_s: requests not done by then end with ``finish_reason`` "deadline" and what they have.

        Returns:
            One output a prompt, in order.

        Raises:
            RequestError: a prompt or an option that cannot be served; nothing is started then.
        """
        listed = _as_prompts(prompts)
        each = [params] * len(listed) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(listed):
            raise RequestError(
                f"got {len(each)} for {len(listed)} prompts, expected one for all or one for each", param="params"
            )
        requests = [self._request(p, s, timeout_s, None) for p, s in zip(listed, each, strict=True)]
        return self._finish(requests)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them, each a list of {"role", "content"}; see :meth:`generate`."""
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = messages if several else [messages]
        prompts = [self.render_chat(conversation) for conversation in conversations]
        return self._finish([self._request(p, params, timeout_s, None, from_template=True) for p in prompts])

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> Stream:
        """Complete one prompt piece by piece. Closing the iterator early cancels the request.

        ``request_id`` names it for :meth:`abort`. Errors as in :meth:`generate`, raised here and not at the first piece.
        """
        return self._pieces(self._request(prompt, params, timeout_s, request_id))

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> Stream:
        """Answer a conversation piece by piece; see :meth:`stream`."""
        prompt = self.render_chat(messages)
        return self._pieces(self._request(prompt, params, timeout_s, request_id, from_template=True))

    def render_chat(self, messages: Sequence[Message]) -> str:
        """The prompt that the bundle's chat template makes of a conversation."""
        if self._template is None:
            raise RequestError(
                "this bundle has no chat template; use generate with a prompt of your own", param="messages"
            )
        return self._template.render(messages, add_generation_prompt=True)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def abort(self, request_id: str) -> bool:
        """Cancel a request between two steps; False if it is not known or done. Its outputs end with reason "abort"."""
        request = self._requests.get(request_id)
        if request is None or request.finished:
            return False
        request.cancel("abort")
        return True

    def _request(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        timeout_s: float | None,
        request_id: str | None,
        *,
        from_template: bool = False,
    ) -> Request:
        params = params or self.default_params
        ids = self._token_ids(prompt, add_special_tokens=not from_template)
        if not isinstance(params, SamplingParams):
            raise RequestError(f"got {type(params).__name__}, expected SamplingParams", param="params")
        if timeout_s is not None and not (isinstance(timeout_s, int | float) and timeout_s > 0):
            raise RequestError(f"got {timeout_s!r}, expected more than 0 seconds", param="timeout_s")
        request_id = request_id or next(name for i in self._ids if (name := f"request-{i}") not in self._requests)
        return Request(
            request_id=request_id,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_ids=ids,
            params=params,
            seed=params.seed if params.seed is not None else secrets.randbits(63),
            vocab_size=self.manifest.model.vocab_size,
            eos_token_ids=self._eos,
            room=self.max_model_len - len(ids),
            tokenizer=self.tokenizer,
            deadline=None if timeout_s is None else time.monotonic() + timeout_s,
            closing=self._engine.is_closing,
        )

    def _token_ids(self, prompt: Prompt, *, add_special_tokens: bool) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError(
                    "this bundle has no tokenizer: give token ids, or export a checkpoint with tokenizer.json",
                    param="prompt",
                )
            ids = self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        else:
            ids = _as_ids(prompt, self.manifest.model.vocab_size)
        if not ids:
            raise RequestError("got no tokens, expected at least one", param="prompt")
        if len(ids) >= self.max_model_len:
            raise RequestError(
                f"got {len(ids)} tokens, expected at most {self.max_model_len - 1}, one less than the model length; "
                + ("shorten it" if self._at_limit else "shorten it, or open the bundle with a larger max_model_len"),
                param="prompt",
            )
        return ids

    def _start(self, requests: Sequence[Request]) -> None:
        for request in requests:
            # One step, so that of two threads with the same name one is refused.
            if self._requests.setdefault(request.request_id, request) is not request:
                raise RequestError(
                    f"{request.request_id!r} is in use; choose another or leave it out", param="request_id"
                )
        self._engine.submit([sequence for request in requests for sequence in request.sequences])

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
        try:
            self._start([request])
        except BaseException:
            self._forget([request])
            raise
        return Stream(request, lambda: self._forget([request]))

    def _forget(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if self._requests.get(request.request_id) is request:
                self.abort(request.request_id)
                self._requests.pop(request.request_id, None)


class Stream(Iterator[Delta]):
    """Pieces of one request. Closing it, leaving its ``with`` block or dropping it early cancels the request."""

    def __init__(self, request: Request, forget: Callable[[], None]) -> None:
        self.request_id = request.request_id
        self._deltas = request.deltas()
        self._close = weakref.finalize(self, forget)

    def __next__(self) -> Delta:
        try:
            return next(self._deltas)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Cancel what is left of the request."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, from one prompt or several."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes | bytearray | Mapping) or not isinstance(prompts, Iterable):
        raise RequestError(
            f"got {type(prompts).__name__}, expected text, token ids, or a list of them", param="prompts"
        )
    listed: list[Any] = list(prompts)
    if not listed:
        raise RequestError("got an empty list, expected at least one prompt", param="prompts")
    return [listed] if isinstance(listed[0], Number) else listed


def _as_ids(prompt: Sequence[int], vocab_size: int) -> list[int]:
    """Token ids as plain integers within the vocabulary."""
    if isinstance(prompt, bytes | bytearray | Mapping) or not isinstance(prompt, Iterable):
        raise RequestError(f"got {type(prompt).__name__}, expected text or a list of token ids", param="prompt")
    ids = []
    for token_id in prompt:
        whole = isinstance(token_id, Integral) and not isinstance(token_id, bool)
        if not whole or not 0 <= token_id < vocab_size:
            raise RequestError(
                f"got token id {token_id!r}, expected integers from 0 to {vocab_size - 1}", param="prompt"
            )
        ids.append(int(token_id))
    return ids
