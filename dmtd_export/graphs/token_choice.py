"""The two graphs that choose tokens on a device: arg-max, and the whole of the sampler's rules.

They stand behind late_decode: its logits stay on the device, and the ids chosen here are the next late step's input, so a
cycle runs without the host. Standard ONNX, one file serves every backend; ``dmtd_runtime.sampling.sampler`` states the rules, and
its numpy code is what these graphs are tested against. Neither graph draws random numbers: uniforms are handed in.

choose_token:

| name | dims | dtype |
|---|---|---|
| logits | [batch, num_logits, vocab] | float32 |
| token_ids (out) | [batch, num_logits] | int64 |
| is_finite (out) | [batch, num_logits] | bool |
| confidence (out) | [batch, num_logits] | float32, the probability of the likeliest token |

sample_token, one row a sequence:

| name | dims | dtype |
|---|---|---|
| logits | [batch, 1, vocab] | float32 |
| temperature, top_p, min_p, uniforms | [batch] | float32 |
| top_k (0: off) | [batch] | int64 |
| repetition_penalty, frequency_penalty, presence_penalty | [batch] | float32 |
| mask_ends | [batch] | bool |
| logit_bias | [batch, vocab] | float32 |
| end_ids, prompt_seen | [batch, vocab] | bool |
| output_counts | [batch, vocab] | float32, whole numbers: how often the sequence's output has each token |
| token_ids (out) | [batch, 1] | int64, within the vocabulary whatever the logits hold |
| is_finite (out) | [batch, 1] | bool, False where the row holds NaN or infinity |
| has_choice (out) | [batch, 1] | bool, False where the options leave nothing to choose from |
| confidence (out) | [batch, 1] | float32, the probability of the likeliest token of the logits as they came in |
| next_output_counts (out) | [batch, vocab] | float32, ``output_counts`` with the chosen token counted |

Cumulative sums are float32 here and float64 in numpy: the tokens are equal unless the uniform number lies within 1e-5 of an
edge between two candidates. Of equal logits the lowest id comes first in ONNX; TensorRT does not promise an order.
"""

from __future__ import annotations

import numpy as np

from dmtd_export.graphs.writer import ONNX_DTYPES, GraphWriter
from dmtd_runtime.bundle import contract
from dmtd_runtime.sampling.params import MIN_TEMPERATURE

LARGEST = float(np.finfo(np.float32).max)


def write_choose_token(writer: GraphWriter, vocab_size: int) -> None:
    """token_ids = arg-max of each row; is_finite is False where a row holds NaN or infinity."""
    rows: list[int | str] = ["batch", "num_logits"]
    logits = writer.input(contract.LOGITS, [*rows, vocab_size], "float32")
    attrs = {"axis": -1, "keepdims": 0}
    token_ids = writer.output(contract.TOKEN_IDS, rows, "int64")
    best = writer.op("ArgMax", [logits], "/choose_token", attrs=attrs)
    _within_vocabulary(writer, best, vocab_size, "/choose_token", token_ids)
    _write_is_finite(writer, logits, rows, "/choose_token")
    _write_confidence(writer, logits, token_ids, rows, "/choose_token")


def write_sample_token(writer: GraphWriter, vocab_size: int, max_candidates: int) -> None:
    """Write rules 1 to 8 of ``dmtd_runtime.sampling.sampler`` over the ``max_candidates`` largest logits."""
    rows: list[int | str] = ["batch", 1]
    logits = writer.input(contract.LOGITS, [*rows, vocab_size], "float32")
    path = "/sample_token"
    flat = writer.op("Squeeze", [logits, writer.constant([1], "int64")], path)
    adjusted, counts = _adjusted(writer, flat, vocab_size)
    candidates = min(max_candidates, vocab_size)
    values, ids = writer.node(
        "TopK", [adjusted, writer.constant([candidates], "int64")], f"{path}/candidates", outputs=2, attrs={"axis": -1}
    )
    best = writer.op("Slice", [values, *(writer.constant([i], "int64") for i in (0, 1, 1))], f"{path}/best")
    rank, found = _draw(writer, values, best, candidates)
    drawn = writer.op("GatherElements", [ids, rank], f"{path}/drawn", attrs={"axis": 1})
    token_ids = writer.output(contract.TOKEN_IDS, rows, "int64")
    _within_vocabulary(writer, drawn, vocab_size, path, token_ids)
    _write_is_finite(writer, logits, rows, path)
    writer.op("Identity", [found], f"{path}/has_choice", output=writer.output(contract.HAS_CHOICE, rows, "bool"))
    every_id = _count_up(writer, vocab_size, f"{path}/vocabulary", "int64")
    one_more = writer.op("Equal", [every_id, token_ids], f"{path}/counts/chosen")
    one_more = writer.op("Cast", [one_more], f"{path}/counts", attrs={"to": ONNX_DTYPES["float32"]})
    likeliest = writer.op("ArgMax", [logits], f"{path}/likeliest", attrs={"axis": -1, "keepdims": 0})
    _write_confidence(
        writer, logits, _within_vocabulary(writer, likeliest, vocab_size, f"{path}/likeliest"), rows, path
    )
    next_counts = writer.output(contract.NEXT_OUTPUT_COUNTS, ["batch", vocab_size], "float32")
    writer.op("Add", [counts, one_more], f"{path}/counts", output=next_counts)


def _adjusted(w: GraphWriter, logits: str, vocab_size: int) -> tuple[str, str]:
    """Rules 1 to 3 over [batch, vocab]; also the name of the counts' input."""
    table: list[int | str] = ["batch", vocab_size]
    path = "/sample_token/adjust"
    bias = w.input(contract.LOGIT_BIAS, table, "float32")
    end_ids, prompt_seen = (w.input(name, table, "bool") for name in (contract.END_IDS, contract.PROMPT_SEEN))
    counts = w.input(contract.OUTPUT_COUNTS, table, "float32")
    zero, lowest = w.constant(0.0, "float32"), w.constant(float("-inf"), "float32")

    biased = w.op("Add", [logits, bias], f"{path}/bias")
    masked = w.op("And", [_column(w, contract.MASK_ENDS, "bool"), end_ids], f"{path}/masked")
    biased = w.op("Where", [masked, lowest, biased], f"{path}/ends")
    repetition = _column(w, contract.REPETITION_PENALTY, "float32")
    divided, multiplied = (w.op(op, [biased, repetition], f"{path}/repetition") for op in ("Div", "Mul"))
    positive = w.op("Greater", [biased, zero], f"{path}/repetition")
    penalised = w.op("Where", [positive, divided, multiplied], f"{path}/repetition/penalised")
    generated = w.op("Greater", [counts, zero], f"{path}/generated")
    seen = w.op("Or", [prompt_seen, generated], f"{path}/seen")
    repeated = w.op("Where", [seen, penalised, biased], f"{path}/repetition/seen")
    frequency = w.op("Mul", [_column(w, contract.FREQUENCY_PENALTY, "float32"), counts], f"{path}/frequency")
    once = w.op("Cast", [generated], f"{path}/presence", attrs={"to": ONNX_DTYPES["float32"]})
    presence = w.op("Mul", [_column(w, contract.PRESENCE_PENALTY, "float32"), once], f"{path}/presence")
    subtracted = w.op("Add", [frequency, presence], f"{path}/subtracted")
    return w.op("Sub", [repeated, subtracted], path), counts


def _draw(w: GraphWriter, values: str, best: str, candidates: int) -> tuple[str, str]:
    """Rules 4 and 6 to 8: (rank int64 [batch, 1] among the candidates, bool [batch, 1] whether there is any)."""
    path = "/sample_token/draw"
    columns = {
        name: _column(w, name, "float32")
        for name in (contract.TEMPERATURE, contract.MIN_P, contract.TOP_P, contract.UNIFORMS)
    }
    top_k = _column(w, contract.TOP_K, "int64")
    zero, one, last = w.constant(0.0, "float32"), w.constant(1.0, "float32"), w.constant([-1], "int64")
    # A candidate of probability 0 (masked, or far below the first) has no width and must not be taken by rounding.
    lowest_temperature = w.constant(MIN_TEMPERATURE, "float32")
    divisor = w.op("Max", [columns[contract.TEMPERATURE], lowest_temperature], f"{path}/temperature")
    scaled = w.op("Div", [w.op("Sub", [values, best], f"{path}/distance"), divisor], f"{path}/scaled")
    weights = w.op("Exp", [scaled], f"{path}/weights")
    kept = w.op("Greater", [weights, zero], f"{path}/has_width")

    ranks = _count_up(w, candidates, f"{path}/ranks", "int64")
    off = w.op("LessOrEqual", [top_k, w.constant(0, "int64")], f"{path}/top_k/off")
    within = w.op("Or", [off, w.op("Less", [ranks, top_k], f"{path}/top_k")], f"{path}/top_k/kept")
    likely = w.op("GreaterOrEqual", [weights, columns[contract.MIN_P]], f"{path}/min_p")
    kept = w.op("And", [w.op("And", [kept, within], f"{path}/top_k/and"), likely], f"{path}/min_p/and")
    left = w.op("Where", [kept, weights, zero], f"{path}/min_p/weights")

    axis, sums = w.constant(1, "int64"), {"keepdims": 1}
    total = w.op("ReduceSum", [left, last], f"{path}/top_p/total", attrs=sums)
    before = w.op("CumSum", [left, axis], f"{path}/top_p/before", attrs={"exclusive": 1})
    top_p = columns[contract.TOP_P]
    reached = w.op("Less", [before, w.op("Mul", [total, top_p], f"{path}/top_p/share")], f"{path}/top_p")
    all_of_it = w.op("GreaterOrEqual", [top_p, one], f"{path}/top_p/off")
    kept = w.op("And", [kept, w.op("Or", [reached, all_of_it], f"{path}/top_p/kept")], f"{path}/top_p/and")
    left = w.op("Where", [kept, weights, zero], f"{path}/top_p/weights")

    cumulative = w.op("CumSum", [left, axis], f"{path}/cumulative")
    mass = w.op("Slice", [cumulative, *(w.constant([i], "int64") for i in (-1, 1 << 31, 1))], f"{path}/mass")
    point = w.op("Mul", [columns[contract.UNIFORMS], mass], f"{path}/point")
    passed = _count_true(w, w.op("LessOrEqual", [cumulative, point], f"{path}/passed"), f"{path}/passed")
    # The product may round up to the mass: the last kept candidate is meant then.
    final = w.op("Sub", [_count_true(w, kept, f"{path}/kept"), w.constant(1, "int64")], f"{path}/final")
    rank = w.op("Max", [w.op("Min", [passed, final], f"{path}/clip"), w.constant(0, "int64")], f"{path}/clip")
    greedy = w.op("Less", [columns[contract.TEMPERATURE], lowest_temperature], f"{path}/greedy")
    rank = w.op("Where", [greedy, w.constant(0, "int64"), rank], path)
    return rank, _is_finite(w, best, f"{path}/has_choice")


def _column(w: GraphWriter, name: str, dtype: str) -> str:
    """Declare an input [batch] and give it as [batch, 1]."""
    declared = w.input(name, ["batch"], dtype)
    return w.op("Unsqueeze", [declared, w.constant([1], "int64")], f"/sample_token/{name}")


def _count_up(w: GraphWriter, count: int, path: str, dtype: str) -> str:
    """0 .. count - 1, [count]."""
    return w.op("Range", [w.constant(i, dtype) for i in (0, count, 1)], path)


def _count_true(w: GraphWriter, flags: str, path: str) -> str:
    """How many of each row are true, int64 [batch, 1]."""
    numbers = w.op("Cast", [flags], f"{path}/numbers", attrs={"to": ONNX_DTYPES["float32"]})
    counted = w.op("ReduceSum", [numbers, w.constant([-1], "int64")], f"{path}/count", attrs={"keepdims": 1})
    return w.op("Cast", [counted], f"{path}/count", attrs={"to": ONNX_DTYPES["int64"]})


def _is_finite(w: GraphWriter, x: str, path: str) -> str:
    """|x| <= the largest float32: false for infinity, and for NaN, which no comparison holds for.

    Not ``x - x == 0``, which an optimiser may fold to true.
    """
    return w.op("LessOrEqual", [w.op("Abs", [x], path), w.constant(LARGEST, "float32")], path)


def _write_is_finite(w: GraphWriter, logits: str, rows: list[int | str], path: str) -> None:
    wrong = w.op("Not", [_is_finite(w, logits, f"{path}/finite")], f"{path}/finite")
    number = w.op("Cast", [wrong], f"{path}/finite", attrs={"to": ONNX_DTYPES["float32"]})
    # A sum and not ReduceMax, for which ONNX Runtime loads cuDNN.
    num_wrong = w.op("ReduceSum", [number, w.constant([-1], "int64")], f"{path}/finite", attrs={"keepdims": 0})
    output = w.output(contract.IS_FINITE, rows, "bool")
    w.op("Less", [num_wrong, w.constant(0.5, "float32")], f"{path}/is_finite", output=output)


def _write_confidence(w: GraphWriter, logits: str, likeliest: str, rows: list[int | str], path: str) -> None:
    """1 / sum(exp(logits - logits[likeliest])), ``likeliest`` [*rows] within the vocabulary.

    The axis counts from the front: onnx's evaluator takes GatherElements no other way.
    """
    path, last = f"{path}/confidence", w.constant([-1], "int64")
    largest = w.op("GatherElements", [logits, w.op("Unsqueeze", [likeliest, last], path)], path, attrs={"axis": 2})
    weights = w.op("Exp", [w.op("Sub", [logits, largest], path)], path)
    total = w.op("ReduceSum", [weights, last], path, attrs={"keepdims": 0})
    w.op("Div", [w.constant(1.0, "float32"), total], path, output=w.output(contract.CONFIDENCE, rows, "float32"))


def _within_vocabulary(w: GraphWriter, ids: str, vocab_size: int, path: str, output: str | None = None) -> str:
    """The next step looks the id up before anybody has seen it: whatever an arg-max makes of NaN, it stays in range."""
    low, high = w.constant(0, "int64"), w.constant(vocab_size - 1, "int64")
    return w.op("Min", [w.op("Max", [ids, low], f"{path}/clip"), high], f"{path}/clip", output=output)
