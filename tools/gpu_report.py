"""The results of tools/gpu_check for people, in Markdown."""

from __future__ import annotations

from typing import Any

Results = dict[str, Any]

KEPT = (
    *("plain_tok_per_s", "dmtd_tok_per_s", "ratio", "bound", "ratio_of_bound", "plain_gb_per_s", "dmtd_gb_per_s"),
    *("cycle_ms", "host_ms_per_cycle", "first_token_ms", "prefill_tok_per_s", "plain_step_ms", "full_pass_ms"),
    *("late_step_ms", "outside_share", "memory", "bench_s"),
)
LAUNCH_BOUND_ABOVE = 1.02  # of the bound that the bytes set; up to there it may be noise
LAUNCH_BOUND = (
    "A ratio above the bound is no success: where it says launch-bound, steps take as long as their launches and not as long as "
    "their bytes, and a late step gains by having fewer of them."
)
COLUMNS = (
    ("plain tok/s", "plain_tok_per_s", "{:.1f}"),
    ("DMTD tok/s", "dmtd_tok_per_s", "{:.1f}"),
    ("ratio", "ratio", "{:.2f}"),
    ("bound", "bound", "{:.2f}"),
    ("of the bound", "ratio_of_bound", "{:.0%}"),
    ("plain, of copies", "plain_share_of_copies", "{:.0%}"),
    ("DMTD, of copies", "dmtd_share_of_copies", "{:.0%}"),
    ("plain step ms", "plain_step_ms", "{:.3f}"),
    ("full pass ms", "full_pass_ms", "{:.3f}"),
    ("late step ms", "late_step_ms", "{:.3f}"),
    ("cycle ms", "cycle_ms", "{:.3f}"),
)


def bench_summary(found: Results, copy_bytes_per_s: float | None) -> Results:
    """What is kept of a benchmark's report, with its share of what copies reach and what the ratio means."""
    kept: Results = {"ok": True, **{name: found.get(name) for name in KEPT}}
    for mode in ("plain", "dmtd"):
        rate = found.get(f"{mode}_gb_per_s")
        kept[f"{mode}_share_of_copies"] = rate * 1e9 / copy_bytes_per_s if rate and copy_bytes_per_s else None
    if (kept["ratio_of_bound"] or 0) > LAUNCH_BOUND_ABOVE:
        kept["note"] = "launch-bound"
    return kept


def report(results: Results) -> str:
    """All of it."""
    steps = results["steps"]
    made = (f"{name} {bundle['seconds']:.0f} s" for name, bundle in results["bundles"].items())
    lines = [
        *_heading(results),
        f"bundles made: {', '.join(made) or 'none'}",
        "",
        "## Steps",
        "",
        "| step | result | s | |",
        "|---|---|---|---|",
    ]
    for name, step in steps.items():
        lines.append(f"| {name} | {_verdict(step)} | {step['seconds']:.0f} | {_note(step)} |")
    lines += _tokens(steps) + _verification(steps) + _speed(steps)
    lines += ["", "## Skipped", ""]
    for why in dict.fromkeys(results["skipped"].values()):
        lines.append(f"- {'; '.join(name for name, reason in results['skipped'].items() if reason == why)}: {why}")
    return "\n".join(lines) + "\n"


def _heading(results: Results) -> list[str]:
    environment = results.get("environment", {})
    doctor = environment.get("doctor", {})
    lines = ["# GPU check", ""]
    if results["rehearsal"]:
        lines += ["A rehearsal on tiny models: the figures say nothing about a GPU.", ""]
    if results.get("computes") is False:
        lines += ["**The CUDA kernels are stand-ins that compute nothing: numbers and tokens mean nothing.**", ""]
    gpus = ", ".join(f"{gpu['name']} ({gpu['memory_mib']} MiB)" for gpu in doctor.get("gpus", [])) or "no GPU"
    lines.append(f"{gpus}; driver {doctor.get('nvidia_driver') or 'none'}; commit {environment.get('commit')}")
    if copies := results.get("copy_bytes_per_s"):
        lines.append(f"memory copies {copies / 1e9:.0f} GB/s, read and written")
    return lines


def _verdict(step: Results) -> str:
    if step["error"]:
        return "BROKEN"
    if step["found"].get("ok", True):
        return "ok"
    return "FAILED" if step["counts"] else "differs, as stand-ins must"


def _note(step: Results) -> str:
    found = step["found"] or {}
    return _cell(step["error"] or found.get("diagnosis") or found.get("note") or "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _tokens(steps: Results) -> list[str]:
    lines = [
        "",
        "## Tokens against the CPU's",
        "",
        "| step | way | equal up to token | repeats | |",
        "|---|---|---|---|---|",
    ]
    for name, step in steps.items():
        for run in (step["found"] or {}).get("runs", ()) if name.startswith("tokens") else ():
            way = f"{run['full_pass']}, {run['mode']}" + (f", {run['choice']}" if "choice" in run else "")
            same = " ".join(map(str, run.get("same", ())))
            lines.append(f"| {name} | {way} | {same} | {run.get('repeats', '')} | {_cell(run.get('error', ''))} |")
    return lines


def _verification(steps: Results) -> list[str]:
    lines = ["", "## Verification", "", "| step | result | first diverging step | checks |", "|---|---|---|---|"]
    for name, step in steps.items():
        found = step["found"] or {}
        if not name.startswith("verify") or "checks" not in found:
            continue
        checks = "; ".join(f"{check['name']}: {check['detail'] or 'ok'}" for check in found["checks"])
        lines.append(f"| {name} | {_verdict(step)} | {_cell(found['diagnosis'] or '-')} | {_cell(checks)} |")
    return lines


def _speed(steps: Results) -> list[str]:
    names = " | ".join(heading for heading, _, _ in COLUMNS)
    lines = ["", "## Speed", "", LAUNCH_BOUND, "", f"| cell | {names} | GPU memory before, at most, after | |"]
    lines.append(f"|---|{'---|' * (len(COLUMNS) + 2)}")
    for name, step in steps.items():
        found = step["found"] or {}
        if not name.startswith("bench") or "ratio" not in found:
            continue
        shown = ["-" if found.get(key) is None else text.format(found[key]) for _, key, text in COLUMNS]
        memory = ", ".join(_gb((found["memory"] or {}).get(when)) for when in ("before", "most", "after"))
        lines.append(f"| {name.removeprefix('bench ')} | {' | '.join(shown)} | {memory} | {_note(step)} |")
    return lines


def _gb(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e9:.2f} GB"
