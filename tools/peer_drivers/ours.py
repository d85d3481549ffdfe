"""Drives a bundle for tools/peers, plain or in cycles, through the benchmark's own loop; lines as the other drivers."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.backends.opening import open_backend
from dmtd_runtime.bench.run import run_once
from dmtd_runtime.bundle.opening import open_bundle
from dmtd_runtime.cycle import CyclePlan


def main() -> None:
    task = json.loads(sys.argv[1])
    started, directory = time.perf_counter(), Path(task["model"])
    manifest = open_bundle(directory)
    options = BackendOptions(threads=task["threads"], max_num_seqs=task["batch"], plain=task["plain"])
    backend = open_backend(directory, manifest, options)
    say({"ready": True, "open_ms": (time.perf_counter() - started) * 1e3})
    plan = CyclePlan(cycle=manifest.cycle, plain=task["plain"])
    prompts = [task["prompt"]] * task["batch"]
    for line in sys.stdin:
        if line.strip() != "run":
            break
        record = run_once(backend, plan, prompts, manifest.model.vocab_size, task["max_tokens"])
        prefill_s = len(task["prompt"]) * task["batch"] / record.prefill_tok_per_s
        decode_s = task["batch"] * (task["max_tokens"] - 1) / record.decode_tok_per_s
        say({"prefill_s": prefill_s, "decode_s": decode_s})
    backend.close()


def say(value: dict[str, object]) -> None:
    print("PEER " + json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
