"""The token choice of one sequence: logits of the last position -> token id, with its log probability if asked.

Flow: backend -> logits [vocab] -> ``Sampler.choose`` -> ``Choice`` -> ``StopRules`` (stops.py) and the next step.
The rules, in order:

0. Where the answer must have a form, tokens that it does not allow next are masked.
1. ``logit_bias`` is added.
2. Until ``min_tokens`` tokens are out, stop ids and (unless ``ignore_eos``) end-of-sequence ids are masked.
   Where a form must be kept: so long as it allows anything else, and with ``ignore_eos`` for good.
3. Repetition penalty over prompt and output (a positive logit is divided by it, another one multiplied), then
   ``frequency_penalty * count`` and ``presence_penalty * (count > 0)`` over the output are subtracted.
4. Greedy: the largest logit, of equals the lowest id. The end.
5. Candidates are the ``MAX_CANDIDATES`` largest logits in descending order, of equals the lowest id first. No other
   token can be drawn, whatever the options.
6. Temperature divides the logits.
7. Of the candidates stay: those at least ``min_p`` times as likely as the first; of them the first ``top_k``; of them,
   with the probabilities of what is left scaled to sum 1, those before which less than ``top_p`` has been summed. The
   first candidate always stays.
8. One uniform number, ``uniform(seed, sequence, token_index)``, picks from the cumulative sum in descending order.

Log probabilities are those of the model itself: log-softmax of the logits as they came in, before rule 0.
The graph ``sample_token`` (dmtd_export.graphs.token_choice) follows the same rules on a device, over numbers and tables that
``Sampler`` hands out. It does not decide when to stop and knows no text.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dmtd_runtime.bundle import contract
from dmtd_runtime.errors import BackendError, RequestError
from dmtd_runtime.sampling.grammar import GrammarState
from dmtd_runtime.sampling.params import SamplingParams
from dmtd_runtime.sampling.penalties import Penalties

MAX_CANDIDATES = 1024

_WORD = (1 << 64) - 1
_PHILOX_ROUNDS = 10
_PHILOX_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_PHILOX_KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)

NOT_FINITE, NO_CHOICE = -1, -2
"""What a device says instead of a token id: its logits were not finite, or the options left nothing to choose from."""
BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))

Logits = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One chosen token.

    Attributes:
        token_id: The token.
        logprob: Its natural-log probability under the model; None where ``logprobs`` was not asked.
        top_logprobs: (token id, log probability) of the most likely tokens, descending, lower id first among equals.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def uniform(seed: int, sequence: int, token_index: int) -> float:
    """The uniform number for one sampled token: a pure function, the same on every backend and in any order of calls.

    Philox4x64-10 (Salmon et al., 2011) of the counter ``(token_index, sequence, 0, 0)`` under the key ``(seed, 0)``;
    the upper 53 bits of its first word, divided by 2**53.

    Args:
        seed: The request's seed, taken modulo 2**64.
        sequence: Which of the request's ``n`` sequences.
        token_index: Number of tokens generated before this one.

    Returns:
        A number in [0, 1).
    """
    c0, c1, c2, c3 = token_index & _WORD, sequence & _WORD, 0, 0
    k0, k1 = seed & _WORD, 0
    for _ in range(_PHILOX_ROUNDS):
        product0 = c0 * _PHILOX_MULTIPLIERS[0]
        product1 = c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (product1 >> 64) ^ c1 ^ k0, product1 & _WORD, (product0 >> 64) ^ c3 ^ k1, product0 & _WORD
        k0 = (k0 + _PHILOX_KEY_STEPS[0]) & _WORD
        k1 = (k1 + _PHILOX_KEY_STEPS[1]) & _WORD
    return float(c0 >> 11) * 2.0**-53


class Sampler:
    """Chooses the tokens of one sequence and remembers what the penalties need."""

    def __init__(
        self,
        params: SamplingParams,
        *,
        vocab_size: int,
        prompt_ids: Sequence[int],
        seed: int,
        sequence: int = 0,
        eos_token_ids: Sequence[int] = (),
        form: GrammarState | None = None,
    ) -> None:
        """Makes the sampler of one sequence.

        Args:
            params: The request's options.
            vocab_size: Number of logits in a row.
            prompt_ids: The prompt, read by the repetition penalty only.
            seed: ``params.seed``, or the one the engine drew.
            sequence: Which of the request's ``n`` sequences.
            eos_token_ids: The model's end-of-sequence ids.
            form: A fresh state of the grammar that the answer must follow.

        Raises:
            RequestError: A token id in ``params`` or the prompt that the model does not have.
        """
        params.validate_for(vocab_size)
        self._params = params
        self._vocab_size = vocab_size
        self._seed = seed
        self._sequence = sequence
        self._num_chosen = 0
        self._form = form
        self._penalties = Penalties.for_request(params, vocab_size=vocab_size, prompt_ids=prompt_ids)
        bias = params.logit_bias or {}
        self._bias_ids = np.fromiter(bias.keys(), np.int64, len(bias))
        self._bias = np.fromiter(bias.values(), np.float32, len(bias))
        # Ids that the model's tokenizer has and its head lacks cannot be chosen and need no mask.
        self._ends = frozenset((*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)))
        self._end_ids = np.array(sorted(i for i in self._ends if 0 <= i < vocab_size), dtype=np.int64)
        self._eos_ids = np.array([i for i in eos_token_ids if 0 <= i < vocab_size], dtype=np.int64)

    @property
    def needs_logits(self) -> bool:
        """Whether more than the arg-max of the next logits is wanted."""
        mask_ends = self._num_chosen < self._params.min_tokens and self._end_ids.size > 0
        adjusted = bool(self._bias_ids.size) or mask_ends or self._penalties is not None
        return adjusted or not self._params.greedy or self.needs_host

    @property
    def needs_host(self) -> bool:
        """Whether the logits are needed here, for every token, wherever tokens are chosen: log probabilities, a form."""
        return self._params.logprobs is not None or self._form is not None

    @property
    def complete(self) -> bool:
        """Whether the answer has its form, and nothing may follow."""
        return self._form is not None and self._form.complete

    def ends(self, token_id: int) -> bool:
        """Whether the sequence ends with this token, if it is taken."""
        return token_id in self._ends

    @property
    def num_chosen(self) -> int:
        """Tokens chosen or observed so far; the next draw's ``token_index``."""
        return self._num_chosen

    def choose(self, logits: Logits) -> Choice:
        """Chooses the next token and counts it.

        Args:
            logits: float32 [vocab]; read only.

        Returns:
            The token, with log probabilities as asked.

        Raises:
            BackendError: The logits hold NaN or infinity.
            RequestError: The options mask every token.
        """
        assert logits.shape == (self._vocab_size,), f"a row of logits is [{self._vocab_size}], got {list(logits.shape)}"
        assert logits.dtype == np.float32, f"logits are float32, got {logits.dtype}"
        raw_best = best_token(logits)
        if raw_best == NOT_FINITE:
            raise self._not_finite()
        adjusted = self._adjusted(logits)
        if self._params.greedy:
            token_id = raw_best if adjusted is logits else int(adjusted.argmax())
        else:
            token_id = self._draw(adjusted)
        if adjusted is not logits and not np.isfinite(adjusted[token_id]):
            raise self._no_choice()
        choice = self._described(token_id, logits)
        self.observe(token_id)
        return choice

    def take(self, token_id: int) -> Choice:
        """Counts what a device chose; allowed where ``needs_host`` is not.

        Args:
            token_id: The token, or NOT_FINITE or NO_CHOICE.

        Raises:
            BackendError: The logits held NaN or infinity.
            RequestError: The options mask every token.
        """
        assert not self.needs_host, "log probabilities and forms need logits"
        if token_id < 0:
            raise self._no_choice() if token_id == NO_CHOICE else self._not_finite()
        self.observe(token_id)
        return Choice(token_id=token_id)

    def device_numbers(self) -> Mapping[str, float]:
        """The options that are one number, by the names of sample_token's inputs."""
        params = self._params
        return {
            contract.TEMPERATURE: 0.0 if params.greedy else params.temperature,
            contract.TOP_K: max(params.top_k, 0),
            contract.TOP_P: params.top_p,
            contract.MIN_P: params.min_p,
            contract.REPETITION_PENALTY: params.repetition_penalty,
            contract.FREQUENCY_PENALTY: params.frequency_penalty,
            contract.PRESENCE_PENALTY: params.presence_penalty,
        }

    def device_step(self, ahead: int) -> Mapping[str, float]:
        """What differs from token to token, ``ahead`` of them after the next one: the uniform number, the ends' mask."""
        index = self._num_chosen + ahead
        return {
            # float32 would round the largest numbers up to 1.
            contract.UNIFORMS: min(uniform(self._seed, self._sequence, index), BELOW_ONE),
            contract.MASK_ENDS: index < self._params.min_tokens,
        }

    def fill_tables(self, tables: "Mapping[str, NDArray[np.generic]]") -> None:
        """Write what sample_token reads for every token id.

        Args:
            tables: [vocab] each, by the names of the graph's inputs: logit_bias and output_counts float32, end_ids and
                prompt_seen bool. Overwritten whole.
        """
        for table in tables.values():
            table[:] = 0
        tables[contract.LOGIT_BIAS][self._bias_ids] = self._bias
        tables[contract.END_IDS][self._end_ids] = True
        if self._penalties is not None:
            self._penalties.fill(tables[contract.PROMPT_SEEN], tables[contract.OUTPUT_COUNTS])

    def _no_choice(self) -> RequestError:
        return RequestError(
            f"logits: the options leave nothing to choose from for token {self._num_chosen} of sequence "
            f"{self._sequence}; lower min_tokens, or check stop_token_ids, logit_bias and the penalties"
        )

    def _not_finite(self) -> BackendError:
        return BackendError(
            f"logits: got NaN or infinity for token {self._num_chosen} of sequence {self._sequence}, expected "
            "finite numbers; run dmtd verify on the bundle, and export a float16 one again with --dtype float32"
        )

    def observe(self, token_id: int) -> None:
        """Counts a token that was chosen elsewhere (on the device).

        Args:
            token_id: The token, within the vocabulary.
        """
        self._num_chosen += 1
        if self._penalties is not None:
            self._penalties.observe(token_id)
        if self._form is not None:
            self._form.observe(token_id)

    def _adjusted(self, logits: Logits) -> Logits:
        """Rules 0 to 3; the array itself where none applies."""
        mask_ends = self._num_chosen < self._params.min_tokens and self._end_ids.size > 0
        if self._form is not None:
            adjusted, mask_ends = np.where(self._allowed(self._form), logits, np.float32(-np.inf)), False
        elif self._bias_ids.size or mask_ends or self._penalties is not None:
            adjusted = logits.copy()
        else:
            return logits
        adjusted[self._bias_ids] += self._bias
        if mask_ends:
            adjusted[self._end_ids] = -np.inf
        if self._penalties is not None:
            self._penalties.apply(adjusted)
        return adjusted

    def _allowed(self, form: GrammarState) -> NDArray[np.bool_]:
        """Rule 0, and rule 2 where a form must be kept: bool [vocab]."""
        allowed = form.allowed()
        unwelcome = self._end_ids if self._num_chosen < self._params.min_tokens else self._end_ids[:0]
        if self._params.ignore_eos:
            unwelcome = np.concatenate([unwelcome, self._eos_ids])
        if not unwelcome.size:
            return allowed
        others = allowed.copy()
        others[unwelcome] = False
        return others if others.any() else allowed

    def _draw(self, logits: Logits) -> int:
        """Rules 5 to 8."""
        top_k = self._params.top_k
        ids = top_ids(logits, min(top_k, MAX_CANDIDATES) if top_k > 0 else MAX_CANDIDATES)
        values = logits[ids].astype(np.float64)
        if not np.isfinite(values[0]):  # everything is masked: choose() says so
            return int(ids[0])
        weights = np.exp((values - values[0]) / self._params.temperature)  # descending, the first is 1
        keep = len(weights)
        if self._params.min_p > 0:
            keep = int(np.count_nonzero(weights >= self._params.min_p))
        cumulative = np.cumsum(weights[:keep])
        if self._params.top_p < 1:
            keep = 1 + int(np.searchsorted(cumulative[:-1], self._params.top_p * cumulative[-1], side="left"))
            cumulative = cumulative[:keep]
        # At most 1 - 2**-53, so the product stays below the sum: the index is in range, and never at a width of zero.
        point = uniform(self._seed, self._sequence, self._num_chosen) * cumulative[-1]
        return int(ids[np.searchsorted(cumulative, point, side="right")])

    def _described(self, token_id: int, logits: Logits) -> Choice:
        num_top = self._params.logprobs
        return Choice(token_id=token_id) if num_top is None else described(token_id, logits, num_top)


def best_tokens(logits: Iterable[Logits]) -> NDArray[np.int64]:
    """:func:`best_token` of many rows, each float32 [vocab]: int64 [rows]."""
    return np.array([best_token(row) for row in logits], np.int64)


def best_token(logits: Logits) -> int:
    """What :meth:`Sampler.choose` takes where no option changes anything.

    Args:
        logits: float32 [vocab].

    Returns:
        The largest logit, of equals the lowest id; NOT_FINITE where any is NaN or infinite.
    """
    best, least = int(logits.argmax()), int(logits.argmin())  # a NaN wins both, +inf the one and -inf the other
    return best if math.isfinite(logits.item(best)) and math.isfinite(logits.item(least)) else NOT_FINITE


def described(token_id: int, logits: Logits, num_top: int) -> Choice:
    """A token with its log probability under the model, and those of the ``num_top`` likeliest, from logits [vocab]."""
    best = logits.max()
    with np.errstate(over="ignore"):  # a difference beyond float32 is a probability of 0
        normaliser = float(best) + float(np.log(np.exp(logits - best).sum(dtype=np.float64)))
    top = top_ids(logits, num_top) if num_top else ()
    return Choice(
        token_id=token_id,
        logprob=float(logits[token_id]) - normaliser,
        top_logprobs=tuple((int(i), float(logits[i]) - normaliser) for i in top),
    )


def top_ids(logits: Logits, count: int) -> NDArray[np.int64]:
    """Ids of the largest logits, descending, the lowest id first among equals.

    Args:
        logits: [vocab], no NaN.
        count: At least 1; more than the vocabulary gives the whole of it.

    Returns:
        int64 [min(count, vocab)].
    """
    if count < len(logits):
        # A partition by value and a scan by id make ties at the edge go to the lower ids, which arg-partition does not.
        edge = np.partition(logits, len(logits) - count)[len(logits) - count]
        ids = np.flatnonzero(logits >= edge)
    else:
        ids = np.arange(len(logits))
    order = np.argsort(-logits[ids], kind="stable")
    return ids[order[:count]]
