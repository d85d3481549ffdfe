"""Answer a file of prompts, one a line: `python batch.py BUNDLE < prompts.txt > answers.jsonl`."""

from __future__ import annotations

import json
import sys

from dmtd_runtime import LLM, DmtdError, SamplingParams


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    prompts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    try:
        with LLM(sys.argv[1], max_num_seqs=8) as llm:
            for output in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=64)):
                answer = output.outputs[0]
                print(json.dumps({"prompt": output.prompt, "text": answer.text, "finish_reason": answer.finish_reason}))
    except DmtdError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
