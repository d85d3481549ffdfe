"""Drives mistral.rs for tools/peers: one JSON object a line out, one command a line in. It takes text, and one sequence."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    task = json.loads(sys.argv[1])
    os.environ["RAYON_NUM_THREADS"] = str(task["threads"])
    from mistralrs import CompletionRequest, Runner, Which

    file = Path(task["model"])
    started = time.perf_counter()
    which = Which.GGUF(str(file.parent), file.name, tokenizer_json=task["tokenizer"])
    runner = Runner(which, prefix_cache_n=0, max_seqs=1, token_source="none")
    say({"ready": True, "open_ms": (time.perf_counter() - started) * 1e3})
    for line in sys.stdin:
        if line.strip() != "run":
            break
        request = CompletionRequest(
            prompt=task["text"], model="default", max_tokens=task["max_tokens"], temperature=0.0, ignore_eos=True
        )
        usage = runner.send_completion_request(request).usage
        say(
            {
                "prefill_s": usage.total_prompt_time_sec,
                "decode_s": usage.total_completion_time_sec,
                "prompt_len": usage.prompt_tokens,
                "new_tokens": usage.completion_tokens,
            }
        )


def say(value: dict[str, object]) -> None:
    print("PEER " + json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
