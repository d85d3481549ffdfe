"""Drives onnxruntime-genai for tools/peers: one JSON object a line out, one command a line in."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime_genai as og


def main() -> None:
    task = json.loads(sys.argv[1])
    folder, length = Path(task["model"]), len(task["prompt"]) + task["max_tokens"]
    settings = json.loads((folder / "genai_config.json").read_text())
    settings["model"]["decoder"].setdefault("session_options", {})["intra_op_num_threads"] = task["threads"]
    (folder / "genai_config.json").write_text(json.dumps(settings, indent=2))
    started = time.perf_counter()
    model = og.Model(str(folder))
    say({"ready": True, "open_ms": (time.perf_counter() - started) * 1e3})
    prompts = np.asarray([task["prompt"]] * task["batch"], dtype=np.int32)
    for line in sys.stdin:
        if line.strip() != "run":
            break
        begin = time.perf_counter()
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=task["batch"])
        generator = og.Generator(model, params)
        generator.append_tokens(prompts)
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(task["max_tokens"] - 1):
            generator.generate_next_token()
        end = time.perf_counter()
        say({"prefill_s": first - begin, "decode_s": end - first})


def say(value: dict[str, object]) -> None:
    print("PEER " + json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
