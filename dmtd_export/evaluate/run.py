"""One evaluation from beginning to end: model and base opened, texts and tasks read, everything measured, one report.

EvaluateOptions --> evaluate() --> EvaluationReport (report.py renders it, plots.py draws it)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from dmtd_errors import at_fault
from dmtd_export.evaluate import generation, multiple_choice
from dmtd_export.evaluate.conventions import ConventionResult, measure_conventions
from dmtd_export.evaluate.dial import DialResult, measure_dial
from dmtd_export.evaluate.errors import EvaluateError
from dmtd_export.evaluate.fluency import FluencyResult, everyday_items, measure_fluency
from dmtd_export.evaluate.generation import GenerationResult, GenerationRun
from dmtd_export.evaluate.lm_eval_run import HarnessResult, run_harness
from dmtd_export.evaluate.multiple_choice import ChoiceResult
from dmtd_export.evaluate.offsets import OffsetResult, measure_offsets
from dmtd_export.evaluate.options import MIN_SCORED, EvaluateOptions
from dmtd_export.evaluate.report import EvaluationReport, TaskResult, scores_of
from dmtd_export.evaluate.run_lengths import CHAT, TEXT, RunLengths, draw_prefixes, measure_run_lengths
from dmtd_export.evaluate.statistics import Bootstrap, retention
from dmtd_export.evaluate.subject import Subject, open_subject
from dmtd_export.evaluate.tasks import read_task
from dmtd_export.evaluate.text_metrics import TextResult, measure_text
from dmtd_export.evaluate.texts import TextWindow, WindowPlan, check_text, collect_windows
from dmtd_export.evaluate.weight_formats import FormatCost, measure_format_cost
from dmtd_models.data.items import GenerationItem, MultipleChoiceItem
from dmtd_models.data.task_file import Items
from dmtd_models.progress import Progress, counter, silent
from dmtd_runtime.text.chat_template import ChatTemplate


def evaluate(
    model: Path,
    base: Path | None,
    options: EvaluateOptions,
    progress: Progress = silent,
) -> EvaluationReport:
    """Measure ``model`` against the plain ``base`` (None: the model itself in plain mode).

    Raises:
        DmtdError, ModelError: something cannot be opened, read or compared; one line says what.
    """
    _check_sources(options)
    tasks = [read_task(name, options.limit) for name in options.tasks]
    with contextlib.ExitStack() as opened:
        progress("open", 0, 0)
        subject = opened.enter_context(open_subject(model, options.open))
        against = subject
        if base is not None:
            with at_fault("base"):
                against = opened.enter_context(open_subject(base, options.open.of_base, plain_only=True))
        run = _Run(subject=subject, base=against, options=options, progress=progress)
        windows = run.windows()
        shortened = run.longest if windows and run.longest < options.window_len else None
        run.check_base(windows, tasks)
        conventions = run.conventions(windows)
        offsets = run.offsets(windows)
        text, runs = run.text(windows), run.run_lengths(windows, tasks)
        formats = run.formats(windows)
        measured: list[TaskResult] = [run.task(items) for items in tasks]
        fluency, dial = run.fluency(), run.dial()
        harness, unscored = run.harness()
        measured += harness
        generated = fluency is not None or dial is not None or bool(harness)
        generated |= any(isinstance(result, GenerationResult) for result in measured)
    bootstrap = run.bootstrap
    return EvaluationReport(
        model=model,
        model_kind=subject.kind,
        adapter=subject.adapter,
        base=base,
        base_kind=against.kind,
        cycle=subject.cycle,
        convention_recorded=subject.convention_recorded,
        text=text,
        formats=formats,
        runs=runs,
        tasks=tuple(measured),
        fluency=fluency,
        dial=dial,
        retention=retention([scores_of(result) for result in measured], bootstrap) if measured else None,
        conventions=conventions,
        offsets=offsets,
        bootstrap=bootstrap,
        context_len=options.context_len,
        notes=(
            *_notes(subject, base, generated=generated),
            *([f"windows of text have {shortened} tokens: the model takes no more"] if shortened else []),
            *(f"{name} of lm-eval scores no single items; run the harness itself for it" for name in unscored),
        ),
    )


def _check_sources(options: EvaluateOptions) -> None:
    if not (options.texts or options.tasks or options.harness.lm_eval or options.fluency or options.min_confidence):
        raise EvaluateError(
            "nothing to evaluate on: give --text FILE, --task FILE, --fluency, --min-confidence or --lm-eval TASKS"
        )
    for kind, names in (("texts", options.texts), ("tasks", options.tasks)):
        stems = [Path(name).stem for name in names]
        for name, stem in zip(names, stems, strict=True):
            if stems.count(stem) > 1:
                raise EvaluateError(f"{name} is given twice, or two files of one name; results go by name", param=kind)
    for name in options.texts:
        check_text(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What the parts of one evaluation share."""

    subject: Subject
    base: Subject
    options: EvaluateOptions
    progress: Progress

    @property
    def bootstrap(self) -> Bootstrap:
        return Bootstrap(resamples=self.options.resamples, seed=self.options.seed)

    def windows(self) -> tuple[TextWindow, ...]:
        """Held-out text as both models can take it."""
        options = self.options
        if not options.texts:
            return ()
        longest = self.longest
        if longest < options.context_len + 2 * MIN_SCORED:
            raise EvaluateError(
                f"the model takes {longest} tokens, the context of {options.context_len} leaves nothing to score; lower "
                "--context-len"
            )
        self.progress("read text", 0, 0)
        plan = WindowPlan(
            window_len=longest,
            context_len=options.context_len,
            max_tokens=options.max_tokens,
            seed=options.seed,
        )
        return collect_windows(options.texts, self.subject.encode, self.subject.chats, plan)

    @property
    def longest(self) -> int:
        """Tokens of a window."""
        return min(self.options.window_len, self.subject.scorer.max_len, self.base.scorer.max_len)

    def check_base(self, windows: Sequence[TextWindow], tasks: Sequence[Items]) -> None:
        """The base must be of the same build and read the same tokens: it is another model otherwise.

        Raises:
            EvaluateError: other dimensions, or another tokenizer.
        """
        subject, base = self.subject, self.base
        if subject is base:
            return
        for name in _DIMENSIONS:
            expected, got = getattr(subject.dimensions, name), getattr(base.dimensions, name)
            if got != expected:
                raise EvaluateError(
                    f"{base.path}: got {name} {got}, expected {expected} as in {subject.path}: another model; give the one "
                    "that it was trained from",
                    param="base",
                )
        if base.tokenizer is None:
            return
        samples = [_PROBE, *(item.prompt for items in tasks for item in items if isinstance(item, MultipleChoiceItem))]
        for sample in samples[:20]:
            if subject.encode(sample) != base.encode(sample):
                raise EvaluateError(
                    f"{base.path}: its tokenizer reads {sample[:40]!r} otherwise than that of {subject.path}; give "
                    "the model that it was trained from",
                    param="base",
                )

    def conventions(self, windows: Sequence[TextWindow]) -> ConventionResult | None:
        """Every legal convention on the same rows, if asked for."""
        if not self.options.compare_conventions:
            return None
        if not windows:
            raise EvaluateError("measures perplexity: give --text", param="compare_conventions")
        return measure_conventions(
            self.subject,
            self.base.scorer,
            windows,
            bootstrap=self.bootstrap,
            on_done=self._counter("conventions", 3 * len(windows)),
        )

    def offsets(self, windows: Sequence[TextWindow]) -> OffsetResult | None:
        """The first head at every place of a cycle, if asked for."""
        if not self.options.offsets:
            return None
        if not windows:
            raise EvaluateError("measures perplexity: give --text", param="offsets")
        return measure_offsets(
            self.subject.scorer,
            self.base.scorer,
            windows,
            bootstrap=self.bootstrap,
            on_done=self._counter("offsets", len(windows)),
        )

    def text(self, windows: Sequence[TextWindow]) -> TextResult | None:
        if not windows:
            return None
        return measure_text(
            self.subject.scorer,
            self.base.scorer,
            windows,
            bootstrap=self.bootstrap,
            on_done=self._counter("perplexity", len(windows)),
        )

    def formats(self, windows: Sequence[TextWindow]) -> FormatCost | None:
        """What the formats of weights and caches cost, where the base is a bundle of the same split in other formats."""
        subject, base = self.subject, self.base
        bundles = subject.formats is not None and base.formats is not None
        if not windows or not bundles or subject.formats == base.formats or subject.cycle != base.cycle:
            return None
        return measure_format_cost(
            subject.scorer,
            base.scorer,
            windows,
            bootstrap=self.bootstrap,
            on_done=self._counter("formats", 2 * len(windows)),
        )

    def run_lengths(self, windows: Sequence[TextWindow], tasks: Sequence[Items]) -> dict[str, RunLengths]:
        """From beginnings of text, and from the questions of generation tasks."""
        options = self.options
        room = min(self.subject.scorer.max_len, self.base.scorer.max_len)
        prefixes = {
            TEXT: draw_prefixes(windows, options.prefixes, options.seed) if windows else [],
            CHAT: self._questions(tasks, room // 2)[: options.prefixes],
        }
        return {
            kind: measure_run_lengths(
                self.subject.scorer,
                self.base.scorer,
                some,
                most=max(1, min(options.max_run, room - max(map(len, some)))),
                bootstrap=self.bootstrap,
                on_done=self._counter(f"run lengths: {kind}", len(some)),
            )
            for kind, some in prefixes.items()
            if some
        }

    def _questions(self, tasks: Sequence[Items], longest: int) -> list[tuple[int, ...]]:
        """Token ids of the generation tasks' rendered questions; none without a template, which generation itself reports."""
        items = [item for items in tasks for item in items if isinstance(item, GenerationItem)]
        template = ChatTemplate.from_directory(self.subject.assets) if items else None
        tokenizer = self.subject.tokenizer
        if template is None or tokenizer is None:
            return []
        rendered = (template.render(list(item.messages), add_generation_prompt=True) for item in items)
        ids = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in rendered]
        return [one for one in ids if len(one) <= longest]

    def task(self, items: Items) -> ChoiceResult | GenerationResult:
        """One task with model and base."""
        name = items[0].task
        if isinstance(items[0], MultipleChoiceItem):
            choices = cast("Sequence[MultipleChoiceItem]", items)
            return multiple_choice.measure_choices(
                self.subject.scorer,
                self.base.scorer,
                choices,
                self.subject.encode,
                on_done=self._counter(name, len(choices)),
            )
        questions = cast("Sequence[GenerationItem]", items)
        counter = self._counter(name, 2 * sum(len(question.wordings) for question in questions))
        answers = []
        for subject, plain in ((self.subject, False), (self.base, True)):
            run = self._generation(subject, plain=plain)
            answers.append(generation.write_answers(run, questions, counter))
        return generation.compare_answers(questions, *answers)

    def harness(self) -> tuple[list[HarnessResult], list[str]]:
        """Tasks of lm-eval, if asked for."""
        options = self.options
        if not options.harness.lm_eval:
            return [], []
        return run_harness(
            (self.subject, options.open),
            (self.base, options.open.of_base if self.base is not self.subject else options.open),
            options.harness,
            limit=options.limit,
            seed=options.seed,
            on_done=self._counter("lm-eval", 2),
        )

    def fluency(self) -> FluencyResult | None:
        """Texts on the everyday prompts, if asked for."""
        if not self.options.fluency:
            return None
        return measure_fluency(
            self._generation(self.subject, plain=False),
            self._generation(self.base, plain=True),
            self.base.scorer,
            self.bootstrap,
            self._counter("fluency", 2 * len(everyday_items())),
        )

    def dial(self) -> DialResult | None:
        """Quality and speed by confidence, if asked for."""
        wanted = self.options.min_confidence
        if not wanted:
            return None
        return measure_dial(
            self._generation(self.subject, plain=False),
            self._generation(self.base, plain=True),
            self.base.scorer,
            wanted,
            self.bootstrap,
            self._counter("dial", (1 + len({0.0, *wanted})) * len(everyday_items())),
        )

    def _generation(self, subject: Subject, *, plain: bool) -> GenerationRun:
        opening = self.options.open
        return GenerationRun(
            bundle=subject.generation_bundle(), plain=plain, device=opening.device, threads=opening.threads
        )

    def _counter(self, stage: str, total: int) -> Callable[[int], None]:
        return counter(self.progress, stage, total)


# Those of a model however it was trained, quantised or split.
_DIMENSIONS = (
    "family", "vocab_size", "num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim",
)  # fmt: skip
_PROBE = "The 3 quick brown foxes (aged 12) didn't jump:\n\tnaïve = café + 北京 # 😀\n"


def _notes(subject: Subject, base: Path | None, *, generated: bool) -> list[str]:
    notes = [subject.trained_otherwise] if subject.trained_otherwise else []
    cycle = subject.cycle
    if base is None and cycle.dmtd_trained:
        notes.append(
            "the baseline is the model itself in plain mode: with weights trained for DMTD that is no quality baseline; "
            "give --base with the model that it was trained from"
        )
    elif base is None:
        notes.append("the baseline is the model itself in plain mode; its weights record no DMTD training")
    if not subject.convention_recorded:
        notes.append(
            f"the checkpoint records no convention: {cycle.cycle_origin} + {cycle.prompt_input} is assumed; "
            "--compare-conventions measures the others"
        )
    if generated and subject.kind == "checkpoint":
        notes.append("generation tasks of a checkpoint run through a temporary float32 bundle")
    return notes
