"""``Service``: a bundle opened for use, and all that ``LLM`` and ``AsyncLLM`` share.

It opens the bundle, holds prompts and options to what can be served, makes requests of them, and ends them. How callers wait
for what comes is the business of the two.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import secrets
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar

from dmtd_runtime.backends.base import BackendName, BackendOptions, FullPass
from dmtd_runtime.backends.opening import ROOM_HINT, memory_needs, open_backend
from dmtd_runtime.bundle.manifest import Manifest
from dmtd_runtime.bundle.opening import open_bundle, read_generation_config
from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.errors import DmtdError, RequestError
from dmtd_runtime.machine.memory import one_line_memory
from dmtd_runtime.sampling.grammar import GrammarCompiler
from dmtd_runtime.sampling.params import SamplingParams
from dmtd_runtime.serving.counts import Counts
from dmtd_runtime.serving.options import ServingOptions
from dmtd_runtime.serving.request import Request
from dmtd_runtime.serving.worker import Worker
from dmtd_runtime.text.chat_template import ChatTemplate
from dmtd_runtime.text.prompt import Message, Prompt, token_ids_of
from dmtd_runtime.text.special_tokens import eos_token_ids_of
from dmtd_runtime.text.tokenizer import Tokenizer

logger = logging.getLogger("dmtd.llm")

_BACKEND, _SERVING = BackendOptions(), ServingOptions()
_Options = TypeVar("_Options", BackendOptions, ServingOptions)


class Service:
    """One bundle on one device, with one worker.

    Args:
        bundle: directory made by `dmtd export`.
        backend: ``onnxruntime`` runs the bundle's graphs; ``tensorrt``, ``tensorrt-rtx`` and ``simulator`` run the engines that
            `dmtd build` made of it, the simulator on the CPU.
        cuda_graphs: on a GPU, capture work once and replay it: whole cycles of engines, steps of ONNX Runtime.
        warm_up: on a GPU, run every shape once at opening, so that no request waits for kernels to be compiled or chosen.
        device: ``cpu``, or ``cuda`` for ONNX Runtime's CUDA provider (a float16 or bfloat16 bundle).
        device_id: which GPU.
        dialect: which graphs; None takes ONNX Runtime's own where the bundle has them.
        full_pass: ``staged`` (T, D and lm_head in memory once) or ``fused`` (one graph, encoding layers read once). None: on the
            CPU the cycle graph runs all; elsewhere fused where the split has encoding layers.
        max_num_seqs: sequences that may run at a time. None: of ``LLM`` 1, the fastest for a single sequence; of ``AsyncLLM``,
            made for services, as many as the bundle was exported for, at most 8.
        max_model_len: prompt and answer together, at most the bundle's own limit, the default.
        threads: of the computation; None takes one for each core this process may use.
        max_num_batched_tokens: rows of a full pass, cycle heads and prompts together; None: what the backend takes.
        long_prefill_token_threshold: rows of prompts in a pass that running sequences wait for; None: the scheduler's default.
        max_num_partial_prefills: prompts that are read at a time, unless more of them fit whole into one pass.
        max_num_queued_reqs: sequences that may wait; one more is refused with QueueFullError. None: no bound.
        max_num_queued_tokens: the same of their prompt tokens.
        prefix_cache_bytes: host memory for keys and values of earlier prompts; 0 keeps none.
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
        backend: BackendName = _BACKEND.backend,
        cuda_graphs: bool = _BACKEND.cuda_graphs,
        warm_up: bool = _BACKEND.warm_up,
        device: Literal["cpu", "cuda"] = _BACKEND.device,
        device_id: int = _BACKEND.device_id,
        dialect: Literal["standard", "onnxruntime"] | None = _BACKEND.dialect,
        full_pass: FullPass | None = _BACKEND.full_pass,
        max_num_seqs: int | None = None,
        max_model_len: int | None = _BACKEND.max_model_len,
        threads: int | None = _BACKEND.threads,
        max_num_batched_tokens: int | None = _SERVING.max_num_batched_tokens,
        long_prefill_token_threshold: int | None = _SERVING.long_prefill_token_threshold,
        max_num_partial_prefills: int = _SERVING.max_num_partial_prefills,
        max_num_queued_reqs: int | None = _SERVING.max_num_queued_reqs,
        max_num_queued_tokens: int | None = _SERVING.max_num_queued_tokens,
        prefix_cache_bytes: int = _SERVING.prefix_cache_bytes,
        plain: bool = False,
    ) -> None:
        given = dict(locals())
        if not isinstance(bundle, str | os.PathLike):
            raise RequestError(f"got {bundle!r}, expected the directory of a bundle", param="bundle")
        self.manifest = open_bundle(Path(bundle))
        if max_num_seqs is None:
            given["max_num_seqs"] = self._usual_num_seqs(self.manifest)
        self._open(Path(bundle), _made_of(BackendOptions, given), _made_of(ServingOptions, given), plain=plain)

    def _open(self, directory: Path, options: BackendOptions, serving: ServingOptions, *, plain: bool) -> None:
        self.tokenizer = Tokenizer.from_directory(directory, model_vocab_size=self.manifest.model.vocab_size)
        self.default_params = SamplingParams.from_generation_config(read_generation_config(directory))
        self._template = ChatTemplate.from_directory(directory) if self.tokenizer else None
        opened = open_backend(directory, self.manifest, replace(options, warm_up=False))
        self.max_model_len = opened.max_model_len
        self.stats = opened.stats
        self._gives_all_rows = opened.gives_all_rows
        tokenizer_eos = self.tokenizer.eos_token_ids if self.tokenizer else eos_token_ids_of(directory)
        self._eos = tuple(dict.fromkeys((*self.manifest.model.eos_token_ids, *tokenizer_eos)))
        self._grammars = GrammarCompiler(
            self.tokenizer, vocab_size=self.manifest.model.vocab_size, eos_token_ids=self._eos
        )
        self._plan, self._ids = CyclePlan(cycle=self.manifest.cycle, plain=plain), itertools.count()
        self._requests: dict[str, Request] = {}
        with one_line_memory(memory_needs(self.manifest, options), ROOM_HINT):
            self._worker = Worker(
                opened,
                self._plan,
                options=serving,
                warm_up=options.warm_up,
                after_step=self._after_step(),
            )
        self._close = weakref.finalize(self, Worker.close, self._worker)
        if not self.manifest.cycle.dmtd_trained and not plain:
            logger.info("%s: weights not trained for DMTD; its late steps choose poor words", directory)

    @property
    def has_chat_template(self) -> bool:
        """Whether the bundle can answer conversations."""
        return self._template is not None

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt that the bundle's chat template makes of a conversation, each message a {"role", "content"}.

        ``tools``, ``documents`` and ``chat_template_kwargs`` (``{"enable_thinking": False}``) are handed to the template.
        """
        if self._template is None:
            raise RequestError(
                "this bundle has no chat template; use generate with a prompt of your own", param="messages"
            )
        return self._template.render(
            messages, tools=tools, documents=documents, chat_template_kwargs=chat_template_kwargs
        )

    def abort(self, request_id: str) -> bool:
        """Cancel a request between two steps; False if it is not known or done. Its outputs end with reason "abort"."""
        request = self._requests.get(request_id)
        if request is None or request.finished:
            return False
        request.cancel("abort")
        return True

    def snapshot(self) -> Counts:
        """What the worker does and has done, as of its last step. Takes microseconds and no lock of the worker's."""
        return self._worker.snapshot()

    @property
    def failure(self) -> DmtdError | None:
        """What ended the worker, if it has failed: nothing can be served any more."""
        return self._worker.failure

    def _usual_num_seqs(self, manifest: Manifest) -> int:
        """Sequences at a time where nobody said how many."""
        return 1

    def _after_step(self) -> Callable[[], None]:
        """What the worker calls after each step. It must not keep this object alive."""
        return lambda: None

    def _request(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        *,
        request_id: str | None = None,
        timeout_s: float | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        score_from: int | None = None,
        from_template: bool = False,
    ) -> Request:
        """A request that has not started; everything about it that can be refused is refused here."""
        params = self.default_params if params is None else params
        if not isinstance(params, SamplingParams):
            raise RequestError(f"got {type(params).__name__}, expected SamplingParams", param="params")
        _check_terms(request_id, timeout_s, priority, cache_salt)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        vocab_size = self.manifest.model.vocab_size
        ids = token_ids_of(prompt, self.tokenizer, vocab_size=vocab_size, add_special_tokens=not from_template)
        if len(ids) >= self.max_model_len:
            at_limit = self.max_model_len == self.manifest.model.max_model_len
            raise RequestError(
                f"got {len(ids)} tokens, expected at most {self.max_model_len - 1}, one less than the model length; "
                + ("shorten it" if at_limit else "shorten it, or open the bundle with a larger max_model_len"),
                param="prompt",
            )
        self._check_backend_gives(params)
        if score_from is not None and not (isinstance(score_from, Integral) and 1 <= score_from < len(ids)):
            raise RequestError(
                f"got {score_from!r}, expected 1 to {len(ids) - 1}, the place of a token behind the first",
                param="score_from",
            )
        return Request(
            request_id=request_id or next(n for i in self._ids if (n := f"request-{i}") not in self._requests),
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_ids=ids,
            params=params,
            seed=params.seed if params.seed is not None else secrets.randbits(63),
            vocab_size=vocab_size,
            eos_token_ids=self._eos,
            room=self.max_model_len - len(ids),
            tokenizer=self.tokenizer,
            grammar=self._grammars.compile(params.structured_outputs) if params.structured_outputs else None,
            deadline=deadline,
            priority=int(priority),
            cache_salt=cache_salt,
            score_from=score_from,
            min_confidence=0.0 if self._plan.plain else params.min_confidence,
            closing=self._worker.is_closing,
        )

    def _check_backend_gives(self, params: SamplingParams) -> None:
        """Raise RequestError for what this bundle or its backend has not."""
        if params.prompt_logprobs is not None and not self._gives_all_rows:
            raise RequestError(
                "engines give the logits of last rows alone; leave it out, or use the backend onnxruntime",
                param="prompt_logprobs",
            )
        if params.min_confidence and not (self._plan.may_leave or self._plan.plain):
            raise RequestError(
                f"got {params.min_confidence:g} with a bundle of cycle_origin absolute, whose heads stand where the count of "
                "positions puts them, expected 0; leave it out, or export with --cycle-origin prompt",
                param="min_confidence",
            )

    def _start(self, requests: Sequence[Request]) -> None:
        """Queue requests, all or none."""
        try:
            for request in requests:
                # One step, so that of two threads with the same name one is refused.
                if self._requests.setdefault(request.request_id, request) is not request:
                    raise RequestError(
                        f"{request.request_id!r} is in use; choose another or leave it out", param="request_id"
                    )
            self._worker.submit([sequence for request in requests for sequence in request.sequences])
        except BaseException:
            self._forget(requests)
            raise

    def _forget(self, requests: Sequence[Request]) -> None:
        """Cancel what is left of requests. Takes no lock: a finalizer may call it."""
        for request in requests:
            if self._requests.get(request.request_id) is request:
                self.abort(request.request_id)
                self._requests.pop(request.request_id, None)


def _made_of(kind: type[_Options], given: Mapping[str, Any]) -> _Options:
    """Options from those arguments that are their fields."""
    return kind(**{each.name: given[each.name] for each in fields(kind) if each.name in given})


def _check_terms(request_id: object, timeout_s: Any, priority: object, cache_salt: object) -> None:
    if request_id is not None and not (isinstance(request_id, str) and request_id):
        raise RequestError(f"got {request_id!r}, expected a text that is not empty", param="request_id")
    if timeout_s is not None:
        is_number = isinstance(timeout_s, Real) and not isinstance(timeout_s, bool)
        if not (is_number and 0 < float(timeout_s) < math.inf):  # NaN is not
            raise RequestError(
                f"got {timeout_s!r}, expected more than 0 seconds; leave it out for no limit", param="timeout_s"
            )
    if not isinstance(priority, Integral) or isinstance(priority, bool):
        raise RequestError(f"got {priority!r}, expected a whole number, lower goes first", param="priority")
    if cache_salt is not None and not (isinstance(cache_salt, str) and cache_salt):
        raise RequestError(f"got {cache_salt!r}, expected a text that is not empty, or None", param="cache_salt")
