"""What a bundle is, told from its manifest: the split, a cycle as a picture, graphs with their I/O, bytes, the speed bound.

``to_json`` and ``render`` tell the same; neither opens a graph. The bytes come from ``speed_bound.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.kernel_bound import kernel_bound
from dmtd_runtime.bundle.manifest import CycleInfo, GraphInfo, Manifest, TensorInfo
from dmtd_runtime.bundle.speed_bound import SplitBytes, split_bytes, weight_bits, weight_formats

CONTEXTS = (128, 1024, 4096, 8192, 32768)
COLOURS = {"E": "cyan", "T": "magenta", "D": "green"}
NAMES = {"E": "encoding", "T": "thinking", "D": "decoding"}


def to_json(manifest: Manifest) -> dict[str, Any]:
    """Everything that ``render`` shows, for machines."""
    split = split_bytes(manifest)
    return {
        "schema": manifest.schema,
        "model": dataclasses.asdict(manifest.model),
        "cycle": dataclasses.asdict(manifest.cycle),
        "weight_formats": weight_formats(manifest),
        "weight_bits": weight_bits(manifest),
        "bytes": {
            "embedding": split.embedding,
            "encoding": split.encoding,
            "thinking": split.thinking,
            "decoding": split.decoding,
            "lm_head": split.lm_head,
            "tied": split.tied,
            "weights": split.stored,
            "kv_per_token": split.kv_per_token(),
            "files": sum(info.bytes for info in manifest.files.values()),
        },
        "bound": {str(context): split.bound(context) for context in contexts_for(manifest)},
        "kernel_bound": {str(context): kernel_bound(manifest, context) for context in contexts_for(manifest)},
        "graphs": [dataclasses.asdict(graph) for graph in manifest.graphs],
        "files": {name: dataclasses.asdict(info) for name, info in manifest.files.items()},
        "tools": dict(manifest.tools),
        "calibration": {what: dataclasses.asdict(text) for what, text in manifest.calibration.items()},
        "verification": dict(manifest.verification),
    }


def render(manifest: Manifest, *, width: int) -> Group:
    """The bundle for a terminal of ``width`` columns."""
    return Group(
        _head(manifest),
        Text(),
        _heading("Split"),
        split_bar(manifest.cycle, width=min(width, 100)),
        Text(),
        _heading("Cycle"),
        cycle_picture(manifest.cycle),
        Text(),
        _heading("Bytes"),
        _bytes_table(split_bytes(manifest), weight_formats(manifest), weight_bits(manifest)),
        _heading("Speed-up that the bytes allow (batch 1, over the plain model)"),
        _bound_table(manifest),
        _heading("Graphs"),
        *(_graph_table(graph) for graph in manifest.graphs if graph.slots == 1),
        *_batched_graphs(manifest),
        _heading("Record"),
        _record(manifest),
    )


def contexts_for(manifest: Manifest) -> tuple[int, ...]:
    """Contexts worth a row: those that the model length allows, and that length itself."""
    limit = manifest.model.max_model_len
    return (*(context for context in CONTEXTS if context < limit), limit)


def split_bar(cycle: CycleInfo, *, width: int) -> Text:
    """One bar of all layers, a block for each group as wide as its share, and a line of what they are under it."""
    groups = [(key, count) for key, count in zip("ETD", _counts(cycle), strict=True) if count]
    total, room = sum(count for _, count in groups), width - 2
    bar, words = Text(), []
    start = 0
    for index, (key, count) in enumerate(groups):
        cells = max(6, round(room * count / total)) if index < len(groups) - 1 else 0
        cells = cells or max(6, room - len(bar))
        bar.append(f"{key}{count}".center(cells), style=f"bold black on {COLOURS[key]}")
        words.append(
            f"{key} {NAMES[key]}: layers {start}-{start + count - 1}"
            if count > 1
            else f"{key} {NAMES[key]}: layer {start}"
        )
        start += count
    return Text("\n").join([bar, Text("   ".join(words))])


def cycle_picture(cycle: CycleInfo) -> Text:
    """Two cycles of generated tokens: which groups each step runs, and what the second head refills."""
    tau = cycle.cycle_length
    columns = min(2 * tau, 12)
    heads = [column % tau == 0 for column in range(columns)]
    lines = [Text("step  ").append("".join(f"{'full' if head else 'late':<6}" for head in heads), style="bold")]
    for key, count in zip("ETD", _counts(cycle), strict=True):
        if not count:
            continue
        line = Text(f"{key:<6}")
        for head in heads:
            runs = head or key != "T"
            line.append("████" if runs else "·   ", style=COLOURS[key] if runs else "dim").append("  ")
        lines.append(line)
    if tau > 1:
        lines.append(
            Text(f"{'':6}{'':<{6 * tau}}└─ refill: T runs over the {tau - 1} skipped tokens and the head, in one pass")
        )
    origin = {
        "absolute": "positions divisible by the cycle length",
        "prompt": "the first generated token, and every cycle after it",
    }
    fed = {
        "thinking": "T's output (the plain stack)",
        "sum": "T's output plus its input",
        "cyclical": "T's output plus its input at heads, its input elsewhere",
    }
    lines.append(
        Text(
            f"Heads: {origin[cycle.cycle_origin]}. Prompt positions feed D with {fed[cycle.prompt_input]}.", style="dim"
        )
    )
    return Text("\n").join(lines)


def _counts(cycle: CycleInfo) -> tuple[int, int, int]:
    return cycle.encoding_layers, cycle.thinking_layers, cycle.decoding_layers


def _heading(text: str) -> Text:
    return Text(text, style="bold underline")


def _head(manifest: Manifest) -> Table:
    model, cycle = manifest.model, manifest.cycle
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row(
        "model", f"{model.family}, {model.num_layers} layers, hidden {model.hidden_size}, MLP {model.intermediate_size}"
    )
    table.add_row("attention", f"{model.num_heads} heads, {model.num_kv_heads} KV heads of {model.head_dim}")
    tied = "tied to lm_head" if model.tie_word_embeddings else "lm_head of its own"
    table.add_row("vocabulary", f"{model.vocab_size}, embedding {tied}")
    caches = f", caches {model.cache_dtype}" if model.cache_dtype != model.dtype else ""
    table.add_row("numbers", f"{model.dtype}{caches}, up to {model.max_model_len} tokens")
    table.add_row("weights", Text(cycle.training, style="" if cycle.dmtd_trained else "yellow"))
    return table


def _bytes_table(split: SplitBytes, formats: Mapping[str, str], bits: Mapping[str, float]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("group")
    for name in ("bytes", "share", "read in a cycle", "bits"):
        table.add_column(name, justify="right")
    table.add_column("matrices", overflow="fold")
    tau = f"{split.cycle_length} times"
    rows: list[tuple[str, str, int, str]] = [
        ("E encoding", "encoding", split.encoding, tau),
        ("T thinking", "thinking", split.thinking, "once"),
        ("D decoding", "decoding", split.decoding, tau),
        (f"lm_head{' (the embedding, tied)' if split.tied else ''} and norm", "lm_head", split.lm_head, tau),
    ]
    if not split.tied:
        rows.append(("embedding", "embedding", split.embedding, "a row a token"))
    for name, group, count, reads in rows:
        if count:
            share, width = f"{count / split.stored:.0%}", f"{bits[group]:.3g}" if group in bits else ""
            table.add_row(name, _bytes(count), share, reads, width, formats.get(group, ""))
    table.add_row("all", _bytes(split.stored), "", "", "")
    table.add_row("KV of a token", _bytes(split.kv_per_token()), "", "", "")
    return table


def _bound_table(manifest: Manifest) -> Table:
    split = split_bytes(manifest)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    by_kernels = {context: kernel_bound(manifest, context) for context in contexts_for(manifest)}
    columns = [
        "context",
        "plain, a token",
        "DMTD, a token",
        "bound",
        *([] if None in by_kernels.values() else ["the kernels"]),
    ]
    for name in columns:
        table.add_column(name, justify="right")
    for context, bound in by_kernels.items():
        table.add_row(
            str(context),
            _bytes(round(split.plain_step(context))),
            _bytes(round(split.cycle(context) / split.cycle_length)),
            f"{split.bound(context):.2f}x",
            *([] if bound is None else [f"{bound:.2f}x"]),
        )
    return table


def _batched_graphs(manifest: Manifest) -> list[Text]:
    """The same graphs made for batches differ by their slots only: a line instead of a table each."""
    files = [graph.file for graph in manifest.graphs if graph.slots > 1]
    if not files:
        return []
    return [
        Text("For batches, with a cache for each sequence: " + ", ".join(files) + " (--json lists their I/O)."),
        Text(),
    ]


def _graph_table(graph: GraphInfo) -> Table:
    slots = f", {graph.slots} slots" if graph.slots > 1 else ""
    table = Table(
        title=Text(f"{graph.file}  ({graph.name}, {graph.dialect} dialect{slots})", style="bold"),
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in ("", "name", "dims", "type"):
        table.add_column(name, overflow="fold")
    for direction, tensors in (("in", graph.inputs), ("out", graph.outputs)):
        for name, dims, dtype in collapse(tensors):
            table.add_row(direction, Text(name), Text(dims), dtype)  # Text: brackets are no markup
    return table


def collapse(tensors: Iterable[TensorInfo]) -> list[tuple[str, str, str]]:
    """(name, dims, dtype) of each tensor; the KV buffers of a run of layers share one row: ``present.{22-29}.key``."""
    rows: list[tuple[str, str, str]] = []
    caches: dict[tuple[str, str, int, str, str], tuple[list[int], list[int]]] = {}
    for tensor in tensors:
        dims = "[" + ", ".join(map(str, tensor.dims)) + "]"
        cache = contract.cache_name(tensor.name)
        if cache is None:
            rows.append((tensor.name, dims, tensor.dtype))
            continue
        prefix = tensor.name.partition(".")[0]
        key = (prefix, cache.kind, contract.step_of(tensor.name), dims, tensor.dtype)
        layers, slots = caches.setdefault(key, ([], []))
        layers.append(cache.layer)
        if cache.slot is not None:
            slots.append(cache.slot)
    for (prefix, kind, step, dims, dtype), (layers, slots) in caches.items():
        slot_part, step_part = "." + _ranges(slots) if slots else "", f".step{step}" if step else ""
        rows.append((f"{prefix}.{_ranges(layers)}.{kind}{slot_part}{step_part}", dims, dtype))
    return rows


def _ranges(numbers: Iterable[int]) -> str:
    """{0-21} or {0-1,8-9} of a set of integers; a single one stands alone."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return text if text.isdigit() else "{" + text + "}"


def _record(manifest: Manifest) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("files", f"{len(manifest.files)}, {_bytes(sum(info.bytes for info in manifest.files.values()))}")
    table.add_row("made with", Text(", ".join(f"{name} {version}" for name, version in manifest.tools.items())))
    for what, text in manifest.calibration.items():
        digest = f"a text of {text.num_tokens} tokens, whose SHA-256 is {text.sha256[:16]}..."
        table.add_row("calibrated", f"{what} over {digest}")
    record = manifest.verification
    if record:
        result = "ok" if record.get("ok") else "failed"
        table.add_row("verified", Text(f"{result}, level {record.get('level', 'unknown')}"))
    else:
        table.add_row("verified", "not when it was made; dmtd verify checks it")
    return table


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}" if count < 100 * size else f"{count / size:.0f} {unit}"
    return f"{count} B"
