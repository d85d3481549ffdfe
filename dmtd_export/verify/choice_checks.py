"""The graphs that choose tokens on a device, run in ONNX Runtime against numpy: arg-max, and the product's own sampler."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dmtd_export.verify.graph_runs import open_onnxruntime
from dmtd_export.verify.margins import Array
from dmtd_export.verify.report import Check, Divergence, Level
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import GraphInfo, Manifest
from dmtd_runtime.ort.session import first_line
from dmtd_runtime.sampling.confidence import confidence
from dmtd_runtime.sampling.params import SamplingParams
from dmtd_runtime.sampling.sampler import Sampler

SAMPLED = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8, top_k=7, top_p=0.9),
    SamplingParams(temperature=1.3, min_p=0.05, repetition_penalty=1.3),
    SamplingParams(temperature=1.0, frequency_penalty=0.7, presence_penalty=0.4, logit_bias={0: 2.5}),
)
DRAWS = 24
# A uniform number may lie so close to an edge between two candidates that float32 and float64 sums fall apart there.
DRAWS_APART = 1
CONFIDENCE_MARGIN = 1e-5


def check_choose_token(directory: Path, manifest: Manifest, level: Level) -> list[Check]:
    """The arg-max graph and its confidence on logits with equal values, infinities and NaN; nothing where the bundle has none."""
    graph = next((graph for graph in manifest.graphs if graph.name == contract.CHOOSE_TOKEN), None)
    if graph is None:
        return []
    logits = np.random.default_rng(2).standard_normal((5, 2, manifest.model.vocab_size)).astype(np.float32)
    logits[1, 0, [1, -1]] = 9.0  # the first of equal values
    logits[2, 1, 0] = np.nan
    logits[3, 0, -1] = np.inf
    logits[4, 1, 0] = -np.inf
    finite: Array = np.logical_and.reduce(np.isfinite(logits), axis=-1)
    found: Divergence | None = None
    try:
        session = open_onnxruntime(directory / graph.file)
        outputs = [contract.TOKEN_IDS, contract.IS_FINITE, contract.CONFIDENCE]
        tokens, is_finite, sure = session.run(outputs, {contract.LOGITS: logits})
        wrong: Array = np.not_equal(is_finite, finite) | (finite & np.not_equal(tokens, logits.argmax(-1)))
        if wrong.any():
            at = np.unravel_index(int(wrong.argmax()), wrong.shape)
            got = f"token {tokens[at]}, finite {is_finite[at]}"
            expected = f"token {logits[at].argmax()}, finite {finite[at]}"
            found = Divergence(graph=graph.file, dialect=graph.dialect, expected=expected, got=got, detail="arg-max")
        found = found or _unlike(graph, sure[finite], logits[finite])
    except Exception as error:  # noqa: BLE001 - ONNX Runtime raises its own kinds
        detail = f"{graph.file}: cannot be run: {first_line(error)}"
        found = Divergence(graph=graph.file, dialect=graph.dialect, detail=detail)
    return [
        Check(
            name=f"{graph.file} against arg-max",
            level=level,
            ok=found is None,
            cases=finite.size,
            detail=str(found or ""),
            divergence=found,
        )
    ]


def _unlike(graph: GraphInfo, sure: Array, logits: Array) -> Divergence | None:
    """How sure a graph is of rows of finite logits [n, vocab], against numpy's softmax of them."""
    wanted = np.array([confidence(row) for row in logits])
    worst = int(np.abs(sure - wanted).argmax())
    if abs(sure[worst] - wanted[worst]) <= CONFIDENCE_MARGIN:
        return None
    return Divergence(
        graph=graph.file, dialect=graph.dialect, expected=wanted[worst], got=float(sure[worst]), detail="confidence"
    )


def check_sample_token(directory: Path, manifest: Manifest, level: Level) -> list[Check]:
    """The sampling graph against the sampler, its own counts fed back; nothing where the bundle has no such graph."""
    graph = next((graph for graph in manifest.graphs if graph.name == contract.SAMPLE_TOKEN), None)
    if graph is None:
        return []
    apart: list[Divergence] = []
    try:
        apart = _draw_beside(directory, graph, manifest.model.vocab_size)
    except Exception as error:  # noqa: BLE001 - ONNX Runtime raises its own kinds
        detail = f"cannot be run: {first_line(error)}"
        apart = [Divergence(graph=graph.file, dialect=graph.dialect, detail=detail)] * (DRAWS_APART + 1)
    found = apart[0] if len(apart) > DRAWS_APART else None
    return [
        Check(
            name=f"{graph.file} against the sampler",
            level=level,
            ok=found is None,
            cases=DRAWS * len(SAMPLED),
            detail=str(found or ""),
            divergence=found,
            near_ties=len(apart) if found is None else 0,
        )
    ]


def _draw_beside(directory: Path, graph: GraphInfo, vocab_size: int) -> list[Divergence]:
    """Every draw in which graph and sampler chose differently; both go on with the sampler's token."""
    session = open_onnxruntime(directory / graph.file)
    dtypes = {info.name: info.dtype for info in graph.inputs}
    tables = (contract.LOGIT_BIAS, contract.END_IDS, contract.PROMPT_SEEN, contract.OUTPUT_COUNTS)
    samplers = [Sampler(p, vocab_size=vocab_size, prompt_ids=(0, 1), seed=i) for i, p in enumerate(SAMPLED)]
    feeds: dict[str, Array] = {name: np.zeros((len(SAMPLED), vocab_size), dtypes[name]) for name in tables}
    numbers: dict[str, Array] = {
        name: np.zeros(len(SAMPLED), kind) for name, kind in dtypes.items() if name not in feeds
    }
    for row, sampler in enumerate(samplers):
        sampler.fill_tables({name: feeds[name][row] for name in tables})
    rng, apart = np.random.default_rng(4), []
    for draw in range(DRAWS):
        logits = rng.standard_normal((len(SAMPLED), 1, vocab_size)).astype(np.float32) * 2
        for row, sampler in enumerate(samplers):
            for name, number in {**sampler.device_numbers(), **sampler.device_step(0)}.items():
                numbers[name][row] = number
        outputs = [contract.TOKEN_IDS, contract.NEXT_OUTPUT_COUNTS, contract.CONFIDENCE]
        tokens, counts, sure = session.run(outputs, {**feeds, **numbers, contract.LOGITS: logits})
        if (unlike := _unlike(graph, sure[:, 0], logits[:, 0])) is not None:
            return [unlike] * (DRAWS_APART + 1)
        for row, sampler in enumerate(samplers):
            expected, got = sampler.choose(logits[row, 0]).token_id, int(tokens[row, 0])
            counts[row, got] -= 1
            counts[row, expected] += 1
            if got != expected:
                detail = f"draw {draw} with {SAMPLED[row].temperature:g} and options of row {row}"
                apart.append(
                    Divergence(
                        graph=graph.file,
                        dialect=graph.dialect,
                        expected=f"token {expected}",
                        got=f"token {got}",
                        detail=detail,
                    )
                )
        feeds[contract.OUTPUT_COUNTS] = counts
    return apart
