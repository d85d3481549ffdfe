"""From options to an open backend: ONNX Runtime's over the bundle's graphs, or the engine backend over what `dmtd build` made.

For engines: library, driver and GPU first, then the record that fits them, its files, and only then memory and engines; each
step refuses in one line with the command that mends it. A device is closed again where a later step fails.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dmtd_runtime.backends.base import Backend, BackendOptions
from dmtd_runtime.backends.kv_cache import kv_bytes
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.engine_choice import EngineWish, choose_record, require_fit
from dmtd_runtime.bundle.engine_record import OLDEST_CAPABILITY, EngineRecord, is_new_enough, oldest_capability
from dmtd_runtime.bundle.manifest import Manifest
from dmtd_runtime.bundle.opening import checked_once
from dmtd_runtime.device.libraries import CudaBackend
from dmtd_runtime.errors import BackendError, RequestError
from dmtd_runtime.machine.memory import one_line_memory

ROOM_HINT = "lower --max-model-len or --max-num-seqs, or free some memory"


def open_backend(
    directory: Path, manifest: Manifest, options: BackendOptions, *, engines: Path | None = None
) -> Backend:
    """The backend that ``options`` ask for.

    ``engines``: the directory of the engines to take; by default those of the bundle that fit.

    Raises:
        BackendError: a library, driver, GPU, engine or memory is missing or unfit.
        RequestError: an option out of range.
        BundleError: a file of the bundle is damaged.
    """
    with one_line_memory(memory_needs(manifest, options), ROOM_HINT):
        backend = _open(directory, manifest, options, engines)
        if options.warm_up:
            try:
                backend.warm_up()
            except BaseException:
                backend.close()
                raise
    return backend


def memory_needs(manifest: Manifest, options: BackendOptions) -> dict[str, int]:
    """Bytes that a backend takes at most, in the words of the line that refuses them; activations aside."""
    rows = options.model_len(manifest.model.max_model_len) + manifest.model.max_window
    return {
        "weights": sum(info.length for info in manifest.weights.values()),
        f"caches of {options.max_num_seqs} x {rows} rows": kv_bytes(manifest.model, options.max_num_seqs * rows),
    }


def _open(directory: Path, manifest: Manifest, options: BackendOptions, engines: Path | None) -> Backend:
    if options.backend == "onnxruntime":
        from dmtd_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend

        return OnnxRuntimeBackend(directory, manifest, options)
    if manifest.model.cache_dtype == "int8":
        raise BackendError(
            f"--backend: got {options.backend}, and this bundle's caches are int8, which ONNX Runtime's own graphs alone take; "
            "run it with --backend onnxruntime, or export it without --kv int8"
        )
    if options.backend == "simulator":
        return _open_simulator(directory, manifest, options, engines)
    return _open_gpu(directory, manifest, options, options.backend, engines)


def _open_simulator(bundle: Path, manifest: Manifest, options: BackendOptions, engines: Path | None) -> Backend:
    from dmtd_runtime.backends.engines.backend import TensorRtBackend
    from dmtd_runtime.device.simulator.device import SimulatedDevice

    if manifest.model.dtype == "bfloat16":
        raise BackendError(
            "this bundle is bfloat16, which ONNX Runtime cannot run on the CPU, nor the simulator therefore; "
            "export it with --dtype float32 or float16, or run engines for a GPU"
        )
    directory, record = _choose(bundle, manifest, options, EngineWish(backend="simulator"), engines)
    device = SimulatedDevice(threads=options.threads or 1)
    return TensorRtBackend(bundle, manifest, options, device=device, directory=directory, record=record)


def _open_gpu(
    bundle: Path, manifest: Manifest, options: BackendOptions, library: CudaBackend, engines: Path | None
) -> Backend:
    from dmtd_runtime.backends.engines.backend import TensorRtBackend
    from dmtd_runtime.device.cuda import CudaDevice

    device = CudaDevice(library, device_id=options.device_id)
    try:
        capability = device.gpu.compute_capability
        oldest = oldest_capability(manifest)
        if not is_new_enough(capability, oldest):
            why = "bfloat16 and fused attention; run the bundle with: --backend onnxruntime"
            if oldest != OLDEST_CAPABILITY:
                why = "weights in fp8; export it with --weights int4"
            raise BackendError(
                f"{device.name} has compute capability {capability}, engines need {oldest} or later, for {why}"
            )
        wish = EngineWish(
            backend=device.backend,
            version=device.library_version,
            compute_capability=capability,
            gpu_name=device.gpu.name,
        )
        directory, record = _choose(bundle, manifest, options, wish, engines)
        return TensorRtBackend(bundle, manifest, options, device=device, directory=directory, record=record)
    except BaseException:
        device.close()
        raise


def _choose(
    bundle: Path, manifest: Manifest, options: BackendOptions, wish: EngineWish, engines: Path | None
) -> tuple[Path, EngineRecord]:
    """The engines that fit; their files are there, and unaltered the first time they are seen on this machine."""
    limit = manifest.model.max_model_len
    if options.max_model_len is not None and not 1 <= options.max_model_len <= limit:
        raise RequestError(
            f"got {options.max_model_len}, expected 1 to {limit}, the bundle's limit", param="max_model_len"
        )
    wish = replace(
        wish, full_pass=options.full_pass, max_num_seqs=options.max_num_seqs, max_model_len=options.max_model_len
    )
    if engines is None:
        directory, record = choose_record(bundle, manifest, wish)
        record.check_files(directory, hashes=False)
    else:
        record = require_fit(bundle, engines, manifest, wish)
        record.check_files(engines, hashes=False)
        return engines, record
    names = (contract.ENGINE_RECORD_FILE, *(engine.file for engine in record.engines), *record.files)
    checked_once(directory, names, lambda: record.check_files(directory, hashes=True))
    return directory, record
