"""Answer a file of prompts, one a line: `python batch.py BUNDLE < prompts.txt > answers.jsonl`."""

from __future__ import annotations

import json
import sys

from dmtd_runtime import LLM, SamplingParams


def main() -> None:
    prompts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    with LLM(sys.argv[1], max_num_seqs=8) as llm:
        for output in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=64)):
            answer = output.outputs[0]
            print(json.dumps({"prompt": output.prompt, "text": answer.text, "finish_reason": answer.finish_reason}))


if __name__ == "__main__":
    main()
