#!/usr/bin/env python3
"""One step of tools/gpu_check, in a process of its own: python tools/gpu_step.py STEP.json RESULT.json

STEP.json has ``do``, ``options``, ``bundles`` and ``computes`` (whether CUDA kernels do). RESULT.json is {"found": ..., "error":
one line or null, "skipped": one line or null}, written as things are found, so that a crash of a native library loses only what
comes after it. ``ok`` in what was found says whether the numbers are right; gpu_check knows whether they mean anything.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).resolve().parents[1]
for folder in (REPO / "tools", REPO / "models", REPO / "runtime", REPO):
    sys.path.insert(0, str(folder))


from dmtd_runtime.errors import BackendError, DmtdError  # noqa: E402

Found = dict[str, Any]

COPIES = 20
PROMPTS = [[1, 2, 3], [4] * 9, [5, 6]]
NEW_TOKENS = 12


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A step's options, the bundles it asked for, and where it saves what it has found so far."""

    options: dict[str, Any]
    bundles: list[Path]
    save: Callable[[Found | None], None]


class NotHereError(Exception):
    """The step cannot be done here, which is no failure."""


def bundle(work: Work) -> Found:
    """Make a bundle, see gpu_bundles.py."""
    from gpu_bundles import make_bundle
    from gpu_order import Wanted

    options = work.options
    checkpoint = Path(options["checkpoint"]) if options["checkpoint"] else None
    made = make_bundle(
        Wanted(**options["wanted"]),
        Path(options["place"]),
        checkpoint=checkpoint,
        max_num_seqs=options["max_num_seqs"],
        max_model_len=options["max_model_len"],
    )
    return {"ok": True, "bytes": sum(path.stat().st_size for path in made.iterdir())}


def provider(_work: Work) -> Found:
    """Open the CUDA provider as the product does; ``computes``: a kernel of its gave the right sum."""
    from dmtd_runtime.ort.cuda_provider import CUDA_PROVIDER, PROBE, prepare
    from dmtd_runtime.ort.library import import_onnxruntime

    ort = import_onnxruntime()
    if CUDA_PROVIDER not in ort.get_available_providers():
        raise NotHereError('ONNX Runtime has no CUDA provider; pip install "dmtd[gpu]"')
    started = time.perf_counter()
    prepare(ort, 0)
    opened_s = time.perf_counter() - started
    session = ort.InferenceSession(PROBE, providers=[CUDA_PROVIDER], enable_fallback=0)
    [total] = session.run(None, {"a": np.ones(1, np.float32)})
    return {"ok": True, "onnxruntime": ort.__version__, "opened_s": opened_s, "computes": float(total[0]) == 2.0}


def bandwidth(work: Work) -> Found:
    """How fast the GPU copies its memory, in bytes read and written: what a memory-bound step is held against."""
    from dmtd_runtime.device.cuda_memory import CudaMemory

    memory = CudaMemory()
    try:
        free, total = memory.memory()
        size = min(work.options["bytes"], free // 8)
        one, two = memory.alloc(size, "copies"), memory.alloc(size, "copies")
        memory.zero(one, size)
        for _ in range(3):
            memory.copy(two, one, row_bytes=size)
        memory.wait(memory.mark())
        started = time.perf_counter()
        for _ in range(COPIES):
            memory.copy(two, one, row_bytes=size)
        memory.wait(memory.mark())
        seconds = (time.perf_counter() - started) / COPIES
        gpu = memory.gpu
        return {
            "ok": True,
            "gpu": gpu.name,
            "compute_capability": gpu.compute_capability,
            "memory_bytes": total,
            "copy_bytes_per_s": 2 * size / seconds,
        }
    finally:
        memory.close()


def tokens(work: Work) -> Found:
    """Tokens on the device against the CPU's in float32: staged and fused, plain and DMTD, greedy and sampled."""
    from dmtd_runtime import LLM, SamplingParams

    choices = {
        "greedy": SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True),
        "sampled": SamplingParams(temperature=0.8, seed=7, max_tokens=NEW_TOKENS, ignore_eos=True),
    }
    reference, half = work.bundles

    def generated(llm: Any, choice: str) -> list[list[int]]:
        return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, choices[choice])]

    expected = {}
    for plain in (False, True):
        with LLM(reference, plain=plain) as llm:
            expected |= {(plain, choice): generated(llm, choice) for choice in choices}
    found: Found = {"ok": True, "runs": []}
    for full_pass in ("staged", "fused"):
        for plain in (False, True):
            run = {"full_pass": full_pass, "mode": "plain" if plain else "dmtd"}
            try:
                with LLM(
                    half,
                    device=work.options["device"],
                    full_pass=full_pass,
                    max_num_seqs=work.options["batch"],
                    plain=plain,
                ) as llm:
                    for choice in choices:
                        got, again = generated(llm, choice), generated(llm, choice)
                        found["runs"].append(
                            {**run, "choice": choice, **_agreement(choice, expected[plain, choice], got, again)}
                        )
                        found["ok"] = all(one["ok"] for one in found["runs"])
                        work.save(found)
            except Exception as error:  # noqa: BLE001  the other runs are worth as much
                traceback.print_exc()
                found["runs"].append({**run, "ok": False, "error": _one_line(error)})
                found["broken"] = _one_line(error)
                work.save(found)
    return found


def _agreement(choice: str, expected: list[list[int]], got: list[list[int]], again: list[list[int]]) -> Found:
    """``same``: tokens of each prompt up to the first that differs from the CPU's.

    Rounding to a half type may turn a near-tie, and all tokens behind it: the first two must agree, where they are drawn in two
    prompts of three.
    """
    same = [
        next((step for step, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), len(ours))
        for ours, theirs in zip(got, expected, strict=True)
    ]
    needed = len(same) if choice == "greedy" else 2 * len(same) // 3
    right = sum(count >= 2 for count in same) >= needed
    return {"ok": got == again and right, "same": same, "repeats": got == again}


def verify(work: Work) -> Found:
    """`dmtd verify` on a device, and where it first diverges."""
    from dmtd_export.verify.levels import installed
    from dmtd_export.verify.on_device import verify_on_device
    from dmtd_runtime.backends.base import BackendOptions

    if not installed("torch"):
        raise NotHereError('the reference needs PyTorch; pip install "dmtd[oracle]"')

    backend = BackendOptions(**work.options["backend"], max_num_seqs=work.options["max_num_seqs"])
    found = verify_on_device(work.bundles[0], backend, quick=True).to_json()
    return {**found, "diagnosis": diagnosis(found["checks"])}


def diagnosis(checks: list[Found]) -> str | None:
    """The first diverging step in a line, and what it speaks for; None where nothing diverges."""
    failed = [check for check in checks if not check["ok"]]
    if not failed:
        return None
    batches = {int(found[1]) for check in checks if (found := re.search(r"batch (\d+)", check["name"]))}
    broken = {int(found[1]) for check in failed if (found := re.search(r"batch (\d+)", check["name"]))}
    step, place = first_step(failed[0]), failed[0]["name"].split(":")[0]
    if broken and min(broken) > min(batches):
        kind = f"only at batch {min(broken)}: what stands between sequences"
    elif step is None:
        kind = "no step named"
    elif step == 0:
        kind = "at the first step: layout, weights or the prompt's pass"
    else:
        kind = "after the first step: cache or lengths"
    return f"{place}, step {'?' if step is None else step}: {kind}; {failed[0]['detail']}"


def first_step(check: Found) -> int | None:
    """New tokens before the row that diverges first."""
    detail = check["detail"] or ""
    if found := re.search(r"token (\d+): expected", detail):
        return int(found[1])
    divergence, prompt = check.get("divergence") or {}, re.search(r"prompt of (\d+)", detail)
    if divergence.get("position") is None or prompt is None:
        return None
    return int(divergence["position"]) - int(prompt[1]) + 1


def bench(work: Work) -> Found:
    """`dmtd bench`, and the device's memory in use before it, at most during it, and after it."""
    from dmtd_runtime.backends.base import BackendOptions
    from dmtd_runtime.bench.measure import BenchOptions, run_bench
    from dmtd_runtime.bundle.opening import open_bundle

    backend = BackendOptions(**work.options["backend"])
    wanted = BenchOptions(**{**work.options["bench"], "batches": tuple(work.options["bench"]["batches"])})
    used = memory_in_use() if backend.device == "cuda" else lambda: None
    memory: Found = {"before": used(), "most": None}

    def on_run(_label: str, _done: int, _total: int) -> None:
        now = used()
        memory["most"] = now if now is None else max(now, memory["most"] or 0)

    started = time.perf_counter()
    report = run_bench(work.bundles[0], open_bundle(work.bundles[0]), wanted, backend, on_run=on_run)
    memory["after"] = used()
    return {"ok": True, **report.to_json(), "memory": memory, "bench_s": time.perf_counter() - started}


def memory_in_use() -> Callable[[], int | None]:
    """Bytes of the GPU that are taken, by whomever; None without cuda-bindings."""
    from dmtd_runtime.device.cuda_memory import CudaMemory

    try:
        gpu = CudaMemory()
    except BackendError:
        return lambda: None

    def used() -> int:
        free, total = gpu.memory()
        return total - free

    return used


def library(work: Work) -> Found:
    """Whether engines of a library can run here."""
    if work.options["backend"] == "simulator":
        return {"ok": True}
    from dmtd_runtime.device.cuda import CudaDevice

    try:
        device = CudaDevice(work.options["backend"])
    except BackendError as error:
        raise NotHereError(str(error)) from None
    version, gpu = device.library_version, device.gpu
    device.close()
    if work.options["backend"] == "tensorrt-rtx":
        from dmtd_export.engines.library import capabilities
        from dmtd_runtime.device.libraries import import_tensorrt

        known = capabilities(import_tensorrt("tensorrt-rtx"))
        if gpu.compute_capability not in known:
            raise NotHereError(
                f"it knows {', '.join(known)}, and {gpu.name} is of compute capability {gpu.compute_capability}"
            )
    return {"ok": True, "version": version}


def build(work: Work) -> Found:
    """`dmtd build`."""
    command = [sys.executable, "-m", "dmtd_export.cli", "build", str(work.bundles[0]), "--json", "--no-verify"]
    for name, value in work.options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise NotHereError(line) if "needed (" in line else DmtdError(line)  # too little memory
    return {"ok": True, **json.loads(done.stdout)}


def blind() -> None:
    """Let what CUDA backends return be zeros, and the host's work be rehearsed: what stand-ins leave there no sampler takes."""
    from dmtd_runtime.backends import opening

    open_backend = opening.open_backend

    def open_blind(directory: Path, manifest: Any, options: Any, **more: Any) -> Any:
        backend = open_backend(directory, manifest, options, **more)
        return BlindBackend(backend) if options.device == "cuda" else backend

    opening.open_backend = open_blind


class BlindBackend:
    """A backend all of whose logits and tokens are 0."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def run(self, *args: Any, **options: Any) -> Any:
        return _blind(self._backend.run(*args, **options))

    def finish_cycle(self) -> Any:
        return _blind(self._backend.finish_cycle())


def _blind(output: Any) -> Any:
    found = {name: getattr(output, name) for name in ("logits", "tokens")}
    return dataclasses.replace(
        output, **{name: np.zeros_like(rows) for name, rows in found.items() if rows is not None}
    )


STEPS = {
    function.__name__: function for function in (bundle, provider, bandwidth, tokens, verify, bench, library, build)
}


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:400]
    return text if isinstance(error, DmtdError) else f"{type(error).__name__}: {text}"


def main() -> None:
    step, path = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    result: Found = {"found": None, "error": None, "skipped": None}

    def save(found: Found | None) -> None:
        result["found"] = found
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result, default=_plain), encoding="utf-8")
        partial.replace(path)

    result["error"] = "it ended before its work was done"  # what stands there if it crashes
    save(None)
    if not step["computes"]:
        blind()
    try:
        work = Work(options=step["options"], bundles=[Path(name) for name in step["bundles"]], save=save)
        found = STEPS[step["do"]](work)
        result["error"] = found.pop("broken", None)
    except NotHereError as reason:
        found, result["error"], result["skipped"] = result["found"], None, str(reason)
    except Exception as error:  # noqa: BLE001  every fault belongs into the results
        traceback.print_exc()
        found, result["error"] = result["found"], _one_line(error)
    save(found)


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else str(value)


if __name__ == "__main__":
    from dmtd_runtime.bundle.manifest import weights_may_overlap

    with weights_may_overlap():  # tensors of a ring do
        main()
