"""Opens graphs and tells which provider got each node, as ONNX Runtime's log says: python -m cuda_host.place GRAPH...

A line of JSON a graph: {node: provider}. In a process of its own, whose stderr is ONNX Runtime's verbose log.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path

import onnx
import onnxruntime

from dmtd_runtime.ort.cuda_provider import CUDA_PROVIDER, prepare

PLACED = re.compile(r"VerifyEachNodeIsAssignedToAnEp\]\s+(?:(?:Node\(s\)|All nodes) placed on \[(\w+)\]|\w+ \((.+)\)$)")
VERBOSE = 0


def providers(graph: str) -> dict[str, str]:
    """The provider of every node that is left when a session has been made."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = VERBOSE
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryDirectory() as scratch:
        settings.optimized_model_filepath = f"{scratch}/optimised.onnx"
        kept = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            onnxruntime.InferenceSession(
                graph, settings, providers=[CUDA_PROVIDER, "CPUExecutionProvider"], enable_fallback=0
            )
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        log.seek(0)
        found, provider = {}, ""
        for match in filter(None, map(PLACED.search, log.read().splitlines())):
            provider = match[1] or provider
            if match[2]:
                found[match[2]] = provider
        if not found:  # all are one provider's, and not named
            assert provider, "the log says whose all nodes are"
            left = onnx.load(settings.optimized_model_filepath, load_external_data=False)
            found = {node.name: provider for node in left.graph.node}
    return found


def main() -> int:
    prepare(onnxruntime, 0)
    onnxruntime.set_default_logger_severity(VERBOSE)
    for graph in sys.argv[1:]:
        print(json.dumps({"graph": Path(graph).name, "nodes": providers(graph)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
