"""`dmtd export`: checkpoint -> bundle. Reads tensor by tensor, writes beside the target, exchanges at the end. No torch."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from importlib.resources import files as resource_files
from pathlib import Path
from typing import Any, Literal

import onnx

from dmtd_export.bundle.assets import write_assets
from dmtd_export.bundle.atomic import atomic_directory
from dmtd_export.bundle.calibration import MIN_LEN, WINDOW_LEN, CalibrationText, read_calibration
from dmtd_export.bundle.kv_scales import measured_scales
from dmtd_export.bundle.quantise import Quantisation, plan_quantisation, resolved_formats
from dmtd_export.bundle.split import cycle_of
from dmtd_export.bundle.target import check_disk, check_target, one_line_os_errors, tell_of_engines
from dmtd_export.bundle.weights import NUMPY_DTYPES, Written, append_weights, stored_bytes, write_weights
from dmtd_export.errors import ExportError as ExportError
from dmtd_export.graphs.build import build_graph
from dmtd_export.graphs.checking import checker_fault
from dmtd_export.graphs.rows import GraphSpec
from dmtd_export.options import GROUPS, MAX_WINDOW, ExportOptions, check_options
from dmtd_models.checkpoints.checkpoint import Checkpoint, is_gguf, open_checkpoint
from dmtd_models.config.model import DmtdSpec, ModelConfig, require_split, resolve_dmtd
from dmtd_models.data.chat import NoTokenizer, TextTokenizer
from dmtd_models.data.errors import DataError
from dmtd_models.progress import Progress, counter, silent
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import CalibrationInfo, FileInfo, GraphInfo, Manifest, ModelInfo, sha256_of
from dmtd_runtime.text.special_tokens import eos_token_ids_of
from dmtd_runtime.version import __version__

logger = logging.getLogger("dmtd.export")

GQA_HEAD_MULTIPLE = 16
LARGE_TABLES_BYTES = 256 << 20  # 128 k positions of 128 in float32 take 67 MB

_STAGED = (contract.THINKING, contract.LATE_DECODE)  # what scales of caches are measured with

VerifyHook = Callable[[Path, Checkpoint], Any]


def export_bundle(
    model: Path,
    output: Path,
    options: ExportOptions,
    *,
    adapter: Path | None = None,
    progress: Progress = silent,
    verify: VerifyHook | None = None,
) -> Manifest:
    """Export the checkpoint at ``model`` (a Hugging Face directory or a GGUF file) into the bundle ``output``.

    ``adapter`` is a directory that ``dmtd finetune`` made of that checkpoint; its difference is added to the weights.
    ``verify`` is called with the finished but not yet placed bundle and the open checkpoint; it returns the record for the
    manifest and raises to refuse the bundle. Raises ExportError, ModelError, or what ``verify`` raises.
    """
    check_options(options)
    if adapter is None and is_gguf(model):
        require_split(options.split)
    with one_line_os_errors(output):
        check_target(output)
        with open_checkpoint(model, adapter) as checkpoint:
            return _export(checkpoint, output, options, progress, verify)


def _export(
    checkpoint: Checkpoint, output: Path, options: ExportOptions, progress: Progress, verify: VerifyHook | None
) -> Manifest:
    options = replace(options, formats=resolved_formats(checkpoint, options))
    spec = resolve(checkpoint, options)
    quantisation = plan_quantisation(checkpoint, spec, options.formats)
    max_model_len = _max_model_len(checkpoint.config, options)
    text = calibration_text(checkpoint, options, max_model_len)
    needed = stored_bytes(checkpoint.config, checkpoint, options.dtype, max_model_len + MAX_WINDOW, quantisation)
    check_disk(output, needed)
    tell_of_engines(output)  # and of the rest only now, when nothing is refused any more
    _tell_of_training(checkpoint.dmtd, spec)
    _tell_of_tables(checkpoint.config, options.dtype, max_model_len)
    with atomic_directory(output) as work:
        of_weights = text if options.formats.over_text else None
        with _rounded_before(work, checkpoint, spec, quantisation, of_weights, progress) as made:
            weights_done = counter(progress, "weights", needed)
            manifest = _write_bundle(work, checkpoint, spec, made, max_model_len, options, text, weights_done, progress)
        if verify is not None:
            progress("verify", 0, 0)
            manifest = replace(manifest, verification=verify(work, checkpoint))
            (work / contract.MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


@contextlib.contextmanager
def _rounded_before(
    work: Path,
    checkpoint: Checkpoint,
    spec: DmtdSpec,
    quantisation: Quantisation,
    text: CalibrationText | None,
    progress: Progress,
) -> Iterator[Quantisation]:
    """The quantisation, with what a calibration text bears on rounded already: beside ``work``, while the context lasts."""
    if text is None:
        yield quantisation
        return
    from dmtd_export.bundle.calibrated import rounded_over  # torch, which other exports do without

    with rounded_over(text, checkpoint, spec, quantisation, work.parent, progress) as made:
        yield replace(quantisation, made=made)


def calibration_text(checkpoint: Checkpoint, options: ExportOptions, max_model_len: int) -> CalibrationText | None:
    """The text that the options name, in the checkpoint's tokens; None where they name none.

    Raises:
        ExportError: a file that cannot be used, or one of text for a checkpoint without a tokenizer.
    """
    if not options.calibration:
        return None
    if max_model_len < MIN_LEN:
        raise ExportError(
            f"got {max_model_len}, expected {MIN_LEN} or more with --calibration, whose sequences are no shorter; raise it",
            param="max_model_len",
        )
    try:
        tokenizer = TextTokenizer.of_checkpoint(checkpoint)
    except DataError as error:
        expected = DataError(f"{error}, or give records of prompt_ids and answer_ids")
        tokenizer = NoTokenizer(checkpoint.config.vocab_size, expected)
    return read_calibration(
        options.calibration,
        tokenizer,
        max_tokens=options.calibration_tokens,
        window_len=min(WINDOW_LEN, max_model_len),
    )


def resolve(checkpoint: Checkpoint, options: ExportOptions) -> DmtdSpec:
    """The split and convention of the bundle: the checkpoint's record, overridden by options."""
    spec = resolve_dmtd(checkpoint.config, checkpoint.dmtd, options.split)
    head_dim = checkpoint.config.head_dim
    if options.graphs_for != "tensorrt" and runnable_target(head_dim) == "tensorrt":
        channels = any(options.formats.format_of(group) == "int8-channel" for group in GROUPS)
        own = [name for name, given in (("--kv int8", options.kv == "int8"), ("int8-channel", channels)) if given]
        without = f"leave out {' and '.join(own)}, which its own graphs alone take, and " if own else ""
        raise ExportError(
            f"head_dim: got {head_dim}, ONNX Runtime's attention takes multiples of {GQA_HEAD_MULTIPLE}; {without}use --target "
            "tensorrt, whose standard graphs ONNX Runtime runs too"
        )
    recorded = checkpoint.dmtd
    otherwise = None if recorded is None else trained_otherwise(recorded, spec)
    return spec if otherwise is None else replace(spec, trained=False)


def runnable_target(head_dim: int) -> Literal["tensorrt", "onnxruntime"]:
    """Which graphs alone make a bundle that ONNX Runtime runs: its own, or the standard ones where its attention takes none."""
    return "tensorrt" if head_dim % GQA_HEAD_MULTIPLE else "onnxruntime"


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Without the exporter's warnings: that a base is not trained for cycles says nothing where it runs in plain mode only."""
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def trained_otherwise(recorded: DmtdSpec, spec: DmtdSpec) -> str | None:
    """A line about weights whose training was not for ``spec``; None where it was."""
    if _same_training(recorded, spec):
        return None
    return f"the checkpoint was trained for {_in_words(recorded)}; for anything else it counts as not trained"


def _in_words(spec: DmtdSpec) -> str:
    words = "E{} T{} D{} in cycles of {} (origin {}, prompt input {})"
    return words.format(*_split(spec), spec.cycle_origin, spec.prompt_input)


def _split(spec: DmtdSpec) -> tuple[int, int, int, int]:
    return spec.encoding_layers, spec.thinking_layers, spec.decoding_layers, spec.cycle_length


def _same_training(recorded: DmtdSpec, spec: DmtdSpec) -> bool:
    conventions = [(one.cycle_origin, one.prompt_input) for one in (recorded, spec)]
    return _split(recorded) == _split(spec) and (not recorded.convention_recorded or conventions[0] == conventions[1])


def _write_bundle(
    work: Path,
    checkpoint: Checkpoint,
    spec: DmtdSpec,
    quantisation: Quantisation,
    max_model_len: int,
    options: ExportOptions,
    text: CalibrationText | None,
    weights_done: Callable[[int], None],
    progress: Progress,
) -> Manifest:
    config = checkpoint.config
    write_assets(work, checkpoint, options.generation_config)
    loader = resource_files("dmtd_export").joinpath("bundle", "polygraphy_data.py").read_text(encoding="utf-8")
    (work / contract.DATA_LOADER_FILE).write_text(loader, encoding="utf-8")
    rotary_rows = max_model_len + MAX_WINDOW
    written = write_weights(
        work / contract.WEIGHTS_FILE,
        checkpoint,
        config,
        options.dtype,
        rotary_rows,
        weights_done,
        quantisation,
    )
    model_info = _model_info(config, options, max_model_len, eos_token_ids_of(work))
    if text is not None and options.kv == "int8":
        in_floats = replace(model_info, kv_dtype=options.dtype)
        manifest = _with_graphs(
            work, spec, config, in_floats, written, [(name, contract.ONNXRUNTIME, 1) for name in _STAGED]
        )
        scales = measured_scales(work, manifest, text, progress)
        written = append_weights(work / contract.WEIGHTS_FILE, written, scales, "float32")
    progress("graphs", 0, 0)
    manifest = _with_graphs(work, spec, config, model_info, written, wanted_graphs(options))
    if text is not None:
        read = CalibrationInfo(num_tokens=text.num_tokens, sha256=text.sha256)
        uses = {"weights": quantisation.made is not None, "kv": options.kv == "int8"}
        manifest = replace(manifest, calibration={what: read for what, used in uses.items() if used})
    if (recorded := checkpoint.dmtd) is not None and trained_otherwise(recorded, spec):
        manifest = replace(manifest, cycle=replace(manifest.cycle, trained_for=_in_words(recorded)))
    (work / contract.MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _with_graphs(
    work: Path,
    spec: DmtdSpec,
    config: ModelConfig,
    model_info: ModelInfo,
    written: Written,
    wanted: Sequence[tuple[contract.GraphName, contract.Dialect, int]],
) -> Manifest:
    """Write graphs over the weights that stand in ``work``. Returns the manifest of what then stands there."""
    graph_spec = GraphSpec(
        config=config,
        dmtd=spec,
        dtype=model_info.dtype,
        kv_dtype=model_info.cache_dtype,
        weights=written.weights,
        quantised=written.quantised,
    )
    graphs: list[GraphInfo] = []
    for name, dialect, slots in wanted:
        model, info = build_graph(graph_spec, name, dialect, slots)
        onnx.save_model(model, work / info.file)
        fault = checker_fault(work / info.file)
        assert fault is None, f"{info.file} is no valid graph: {fault}"
        graphs.append(info)
    listed = {contract.WEIGHTS_FILE: written.file}
    for path in sorted(work.iterdir()):
        if path.name not in (contract.WEIGHTS_FILE, contract.MANIFEST_FILE):
            listed[path.name] = FileInfo(bytes=path.stat().st_size, sha256=sha256_of(path))
    return Manifest(
        schema=_schema(model_info, written, graphs),
        model=model_info,
        cycle=cycle_of(spec),
        graphs=tuple(graphs),
        weights=written.weights,
        quantised=written.quantised,
        files=listed,
        tools={"dmtd": __version__, "onnx": metadata.version("onnx")},
    )


def _schema(model: ModelInfo, written: Written, graphs: Sequence[GraphInfo]) -> int:
    """The earliest that has all of it: older versions read what they know, and of the rest say that they are too old."""
    newer = model.cache_dtype == "int8" or any(fmt.factors or fmt.float8 for fmt in written.quantised.values())
    newer |= any(graph.name == contract.CYCLE for graph in graphs)
    return contract.SCHEMA_VERSION if newer else contract.OLDEST_SCHEMA


def slot_counts(max_num_seqs: int) -> list[int]:
    """1, 2, 4, ... and ``max_num_seqs``: an idle slot costs a little in every layer, so a runtime takes the smallest graph."""
    return sorted({1, max_num_seqs, *(1 << i for i in range(max_num_seqs.bit_length()) if 1 << i < max_num_seqs)})


def wanted_graphs(options: ExportOptions) -> list[tuple[contract.GraphName, contract.Dialect, int]]:
    """(graph, dialect, slots) of every graph file that the options ask for."""
    wanted: list[tuple[contract.Dialect, int]] = []
    if options.graphs_for in ("onnxruntime", "all"):
        wanted += [(contract.ONNXRUNTIME, slots) for slots in slot_counts(options.max_num_seqs)]
    if options.graphs_for in ("tensorrt", "all"):
        wanted.append((contract.STANDARD, 1))
    on_cpu = options.dtype == "float32"  # which the cycle graph is for
    # late_decode takes any batch as it is: only T's layers need a node for every slot.
    decoder = [
        (name, dialect, slots)
        for dialect, slots in wanted
        for name in (
            *contract.DECODER_GRAPHS,
            *([contract.CYCLE] if on_cpu and dialect == contract.ONNXRUNTIME else []),
        )
        if slots == 1 or name != contract.LATE_DECODE
    ]
    return [*decoder, *((name, contract.STANDARD, 1) for name in contract.CHOICE_GRAPHS)]


def _model_info(config: ModelConfig, options: ExportOptions, max_model_len: int, ends: Sequence[int]) -> ModelInfo:
    return ModelInfo(
        family=config.family,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        tie_word_embeddings=config.tie_word_embeddings,
        dtype=options.dtype,
        kv_dtype=options.kv_dtype,
        max_model_len=max_model_len,
        max_window=MAX_WINDOW,
        bos_token_id=config.bos_token_id,
        eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *ends))),  # Llama 3 ends turns by the latter alone
    )


def _tell_of_training(recorded: DmtdSpec | None, spec: DmtdSpec) -> None:
    """What the weights were trained for, where that is not the bundle's split and convention."""
    otherwise = None if recorded is None else trained_otherwise(recorded, spec)
    if otherwise is not None:
        logger.warning("%s", otherwise)
    if not spec.convention_recorded:
        logger.warning(
            "the checkpoint records no convention; assuming --cycle-origin %s --prompt-input %s",
            spec.cycle_origin,
            spec.prompt_input,
        )
    if not spec.trained and otherwise is None:
        logger.warning("the weights are not trained for DMTD: speed will be real, words of the late steps will not")


def _tell_of_tables(config: ModelConfig, dtype: str, max_model_len: int) -> None:
    """Rotary tables have a row for every position: with millions of them they outgrow a small model."""
    table_bytes = (max_model_len + MAX_WINDOW) * config.head_dim * NUMPY_DTYPES[dtype].itemsize
    if table_bytes > LARGE_TABLES_BYTES:
        logger.warning(
            "rotary tables of %d positions take %.2f GB of the bundle; --max-model-len stores those that are used",
            max_model_len,
            table_bytes / 1e9,
        )


def _max_model_len(config: ModelConfig, options: ExportOptions) -> int:
    wanted = options.max_model_len if options.max_model_len is not None else config.max_positions
    if not 2 <= wanted <= config.max_positions:
        raise ExportError(
            f"got {wanted}, expected 2 to {config.max_positions}, the model's own limit", param="max_model_len"
        )
    return wanted
