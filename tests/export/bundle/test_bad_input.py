"""Bad input on the command line, as a table: what is wrong, what is asked for, the words of the answer, the exit code.

Whatever goes wrong in ``place``, all files there are afterwards what they were before.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from damage import Damage, config, cut, edit, flip, nothing, remove, sealed, write
from export_support import snapshot
from typer.testing import CliRunner

from dmtd_export.cli.main import app

SPLIT = ("--decoding-layers", "1", "--cycle-length", "3")
EXPORT = ("export", "m", "-o", "new", *SPLIT, "--no-verify")
EXPORT_SHARDS = ("export", "s", "-o", "new", *SPLIT, "--no-verify")
GENERATE = ("generate", "b", "--token-ids", "1,2,3", "--max-tokens", "4")
VERBS_OF_BUNDLES = {
    "generate": GENERATE,
    "chat": ("chat", "b"),
    "bench": ("bench", "b", "--prompt-len", "8", "--max-tokens", "8", "--repeats", "1"),
    "verify": ("verify", "b"),
    "inspect": ("inspect", "b"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    damage: Damage = nothing
    arguments: tuple[str, ...]
    words: str
    framed: bool = False
    """By typer, below the usage."""


def case(name: str, damage: Damage, arguments: tuple[str, ...], words: str, framed: bool = False) -> Case:
    return Case(name=name, damage=damage, arguments=arguments, words=words, framed=framed)


PARALLEL = {
    "model_type": "dmtdqwen3",
    "num_parallel_layers": 3,
    "num_sequential_layers": 1,
    "mtp_horizon": 3,
    "dmtd_block_attention": "causal",
    "dmtd_history_mode": "real",
}
RECORDED = {"model_type": "mtpqwen3", "num_thinking_layers": 2, "num_decoding_layers": 1, "mtp_horizon": 3}

CHECKPOINTS = [
    case("missing", remove("m"), EXPORT, "m: no such file or directory; give a Hugging Face directory"),
    case("no config", remove("m/config.json"), EXPORT, "m: no config.json; give the directory that holds config.json"),
    case("no weights", remove("m/model.safetensors"), EXPORT, "got neither model.safetensors nor"),
    case(
        "no shard", remove("s/model-00002-of-00003.safetensors"), EXPORT_SHARDS, "00003.safetensors is missing; downl"
    ),
    case("truncated", cut("m/model.safetensors", 50000), EXPORT, "truncated: got 50000 bytes, expected 565360 by its"),
    case("cut shard", cut("s/model-00002-of-00003.safetensors", 9000), EXPORT_SHARDS, "truncated: got 9000 bytes"),
    case("a few bytes", cut("m/model.safetensors", 4), EXPORT, "truncated or not a safetensors file (4 bytes"),
    case("empty", cut("m/model.safetensors", 0), EXPORT, "truncated or not a safetensors file (0 bytes"),
    case("altered header", flip("m/model.safetensors", 9), EXPORT, "header is not JSON; download the file again"),
    case(
        "altered index", write("s/model.safetensors.index.json", "{}"), EXPORT_SHARDS, "no usable weight_map; restore"
    ),
    case("cut config", cut("m/config.json", 50), EXPORT, "m/config.json: not readable JSON"),
    case("other sizes", config(vocab_size=300), EXPORT, "got shape [259, 64], expected [300, 64] by config.json"),
    case("cut tokenizer", cut("m/tokenizer.json", 50), EXPORT, "m/tokenizer.json: not a usable tokenizer"),
    case("cut tokenizer config", cut("m/tokenizer_config.json", 50), EXPORT, "m/tokenizer_config.json: not JSON"),
    case("bad template", write("m/chat_template.jinja", "{% if %}"), EXPORT, "chat template: line 1: Expected an expr"),
    case("template bytes", write("m/chat_template.jinja", b"\xe4"), EXPORT, "m/chat_template.jinja: cannot be read"),
    case("bad defaults", write("m/generation_config.json", '{"do_sample":true,"top_k":-7}'), EXPORT, "top_k: got -7"),
    case(
        "pickle", write("x/pytorch_model.bin", "x"), ("export", "x/pytorch_model.bin", *EXPORT[2:]), "convert it to sa"
    ),
    case("no GGUF", write("x.gguf", "hello"), ("export", "x.gguf", *EXPORT[2:]), "got a file that is not GGUF"),
    case("cut GGUF", write("x.gguf", "GGUF\x03"), ("export", "x.gguf", *EXPORT[2:]), "truncated or damaged GGUF file"),
]
ARCHITECTURES = [
    case("model type", config(model_type="gemma2"), EXPORT, 'model_type: got "gemma2", expected one of'),
    case("experts", config(num_experts=8), EXPORT, "num_experts: got 8"),
    case("rope", config(rope_scaling={"rope_type": "longrope", "factor": 2}), EXPORT, 'rope_type: got "longrope"'),
    case(
        "sliding", config(use_sliding_window=True, sliding_window=8, max_window_layers=0), EXPORT, "sliding attention"
    ),
    case("quantised", config(quantization_config={"bits": 4}), EXPORT, 'quantization_config: got {"bits": 4}'),
    case("activation", config(hidden_act="gelu"), EXPORT, 'hidden_act: got "gelu", expected silu'),
    case("parallel DMTD", config(**PARALLEL), EXPORT, 'dmtd_block_attention: got "causal"'),
]
SPLITS = [
    case("no split", nothing, ("export", "m", "-o", "new"), "give --decoding-layers and --cycle-length"),
    case(
        "no split of a GGUF",
        write("x.gguf", "GGUF\x03"),
        ("export", "x.gguf", "-o", "new"),
        "its split is unknown; give",
    ),
    case(
        "half a split",
        write("x.gguf", "GGUF"),
        ("export", "x.gguf", "-o", "new", *SPLIT[:2]),
        "give --cycle-length (for",
    ),
    case("sum", nothing, (*EXPORT, "--thinking-layers", "1"), "encoding 0 + thinking 1 + decoding 1 = 2 layers"),
    case("no thinking", nothing, (*EXPORT, "--encoding-layers", "3"), "thinking 0 + decoding 1"),
    case("recorded sum", config(**RECORDED), ("export", "m", "-o", "new"), "= 3 layers, expected"),
    case(
        "no such convention", nothing, (*EXPORT, "--cycle-origin", "prompt", "--prompt-input", "cyclical"), "undefined"
    ),
    case("origin", nothing, (*EXPORT, "--cycle-origin", "middle"), "--cycle-origin", framed=True),
    case("letters", nothing, (*EXPORT, "--decoding-layers", "two"), "--decoding-layers", framed=True),
]
TARGETS = [
    case("no -o", nothing, ("export", "m", *SPLIT), "-o / --output: missing", framed=True),
    case("no model", nothing, ("export", "-o", "new"), "MODEL: missing", framed=True),
    case("over the checkpoint", nothing, ("export", "m", "-o", "m", *SPLIT), "m exists and is not a bundle"),
    case("the place is looked at first", nothing, ("export", "no-model", "-o", "m", *SPLIT), "m exists and is not"),
    case(
        "over a file",
        nothing,
        ("export", "m", "-o", "m/config.json", *SPLIT),
        "--output: m/config.json is a file; name a directory",
    ),
    case("under a file", nothing, ("export", "m", "-o", "m/config.json/x", *SPLIT, "--no-verify"), "nothing was kept"),
    case(
        "long name", nothing, ("export", "m", "-o", "n" * 300, *SPLIT, "--no-verify"), "File name too long; mend that"
    ),
    case(
        "others' files", write("b/notes.txt", "mine"), ("export", "m", "-o", "b", *SPLIT), "b holds notes.txt besides"
    ),
    case("where nobody may write", nothing, ("export", "m", "-o", "/proc/b", *SPLIT, "--no-verify"), "/proc"),
]
BUNDLES = [
    case(f"{name}, {verb}", damage, VERBS_OF_BUNDLES[verb], words)
    for name, damage, words, verbs in [
        ("no bundle", remove("b"), "b does not exist; make a bundle with: dmtd export MODEL -o b", "all"),
        (
            "no manifest",
            remove("b/manifest.json"),
            "b has no manifest.json, so it is not a bundle; make one with",
            "all",
        ),
        ("newer", edit("b/manifest.json", lambda m: m.update(schema=99)), "schema 99, this version reads up to", "all"),
        ("cut manifest", cut("b/manifest.json", 99), "b/manifest.json cannot be read as JSON", "all"),
        ("other JSON", write("b/manifest.json", "[]"), "it is not a DMTD bundle's manifest", "all"),
        ("no cycle", edit("b/manifest.json", lambda m: m.pop("cycle")), "lacks cycle; export the bundle again", "all"),
        (
            "wrong split",
            edit("b/manifest.json", lambda m: m["cycle"].update(thinking_layers=2)),
            "split E0 T2 D1 with cycle length 3 does not fit 4 layers",
            "all",
        ),
        (
            "path outside",
            edit("b/manifest.json", lambda m: m["files"].update({"../m/config.json": m["files"]["config.json"]})),
            "expected a path inside the bundle; do not use this bundle",
            "all",
        ),
        ("no graph", remove("b/thinking.ort.onnx"), "thinking.ort.onnx", "all-but-inspect"),
        ("cut weights", cut("b/model.onnx.data", 5000), "5000 bytes", "all-but-inspect"),
        ("altered weights", flip("b/model.onnx.data", 9000), "model.onnx.data", "all-but-inspect"),
        ("altered graph", flip("b/late_decode.ort.onnx", 900), "altered", "all-but-inspect"),
        (
            "altered graph, sealed",
            sealed("cycle.ort.onnx", cut("b/cycle.ort.onnx", 2000)),
            "cycle.ort.onnx",
            "all-but-inspect",
        ),
        (
            "cut weights, sealed",
            sealed("model.onnx.data", cut("b/model.onnx.data", 100000)),
            "model",
            "all-but-inspect",
        ),
        (
            "cut tokenizer, sealed",
            sealed("tokenizer.json", cut("b/tokenizer.json", 50)),
            "b/tokenizer.json: not a usable tokenizer",
            "generate chat",
        ),
    ]
    for verb in VERBS_OF_BUNDLES
    if verbs == "all" or verb in verbs.split() or (verbs == "all-but-inspect" and verb != "inspect")
]
REQUESTS = [
    case(
        "empty ids", nothing, ("generate", "b", "--token-ids", ""), "--token-ids: got no tokens, expected at least one"
    ),
    case("empty prompt", nothing, ("generate", "b", "-p", ""), "prompt: got an empty prompt"),
    case(
        "id too large",
        nothing,
        ("generate", "b", "--token-ids", "1,259"),
        "token id 259, expected integers from 0 to 2",
    ),
    case("negative id", nothing, ("generate", "b", "--token-ids=-1"), "token id -1, expected integers from 0 to 258"),
    case("no ids", nothing, ("generate", "b", "--token-ids", "x"), "--token-ids: got 'x', expected whole numbers"),
    case("too long", nothing, ("generate", "b", "--token-ids", "1 " * 256), "got 256 tokens, expected at most 255"),
    case(
        "too long asked", nothing, (*GENERATE, "--max-model-len", "999"), "--max-model-len: got 999, expected 1 to 256"
    ),
    case("two prompts", nothing, (*GENERATE, "-p", "x"), "give one of --prompt, --prompt-file", framed=True),
    case("no prompt file", nothing, ("generate", "b", "--prompt-file", "nope"), "nope cannot be read"),
    case("minimum", nothing, (*GENERATE, "--min-tokens", "9"), "--min-tokens: got 9 with max_tokens 4"),
    case("greedy", nothing, (*GENERATE, "--greedy", "--temperature", "0.7"), "which is 0; give one of them"),
    case("temperature", nothing, (*GENERATE, "--temperature", "-1"), "temperature: got -1.0, expected a finite number"),
    case("top-p", nothing, (*GENERATE, "--top-p", "0"), "--top-p: got 0.0, expected a finite number above 0"),
    case("stop id", nothing, (*GENERATE, "--stop-token-ids", "999"), "--stop-token-ids: got token id 999"),
    case("no option", nothing, (*GENERATE, "--nope"), "No such option: --nope", framed=True),
    case("threads", nothing, (*GENERATE, "--threads", "0"), "--threads", framed=True),
    case("no verb", nothing, ("exprot",), "exprot", framed=True),
]
CASES = [*CHECKPOINTS, *ARCHITECTURES, *SPLITS, *TARGETS, *BUNDLES, *REQUESTS]


@pytest.mark.parametrize("row", CASES, ids=[row.name for row in CASES])
def test_command_line(row: Case, place: Path) -> None:
    row.damage()
    before = snapshot(place)
    result = CliRunner().invoke(app, row.arguments, input="hello\n", prog_name="dmtd")
    assert result.exception is None or isinstance(result.exception, SystemExit)
    told = [line for line in result.stderr.splitlines() if not line.startswith(("warning: ", "note: ", "verify: "))]
    if row.framed:
        assert told[0].startswith("Usage: dmtd") and result.exit_code == 2
        assert row.words in result.stderr
    else:
        told = [line for line in told if line not in ("weights ...", "graphs ...")]
        assert len(told) == 1 and told[0].startswith("error: "), result.stderr
        assert row.words in told[0]
        assert result.exit_code == (2 if told[0].startswith("error: --") else 1), told[0]
    assert snapshot(place) == before
    assert not any(path.name.startswith(".") for path in place.iterdir())


def test_checkpoint_without_a_tokenizer(place: Path) -> None:
    (place / "m/tokenizer.json").unlink()
    result = CliRunner().invoke(app, EXPORT, prog_name="dmtd")
    assert result.exit_code == 0
    assert "warning: m: no tokenizer.json: the bundle works on token ids only" in result.stderr.splitlines()
    result = CliRunner().invoke(app, ("generate", "new", *GENERATE[2:], "--ignore-eos"), prog_name="dmtd")
    assert result.exit_code == 0
    assert len(result.stdout.replace(",", " ").split()) == 4
    result = CliRunner().invoke(app, ("generate", "new", "-p", "words"), prog_name="dmtd")
    assert result.exit_code == 1
    assert "no tokenizer" in result.stderr and "--token-ids" in result.stderr


def test_no_space(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    before = snapshot(place)
    result = CliRunner().invoke(app, ("export", "m", "-o", "b", *SPLIT, "--no-verify"), prog_name="dmtd")
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "has 0.00 GB free, the bundle needs 0.07 GB; free some space" in last
    assert snapshot(place) == before


# Ctrl-C comes while the verb has just opened a certain file: an audit hook sees every open.
INTERRUPTED = """
import os, signal, sys
from dmtd_export.cli.main import main
wanted = sys.argv[1]
def hook(event, arguments):
    global wanted
    if event == "open" and wanted and str(arguments[0]).endswith(wanted):
        wanted = ""
        os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.addaudithook(hook)
main(sys.argv[2:])
"""


@pytest.mark.parametrize(
    ("file", "arguments"),
    [
        ("model.onnx.data", ("export", "m", "-o", "b", *SPLIT, "--no-verify")),
        *(("b/manifest.json", arguments) for arguments in VERBS_OF_BUNDLES.values()),
        ("meminfo", ("doctor",)),
        *(
            pytest.param(file, arguments, marks=pytest.mark.slow, id=f"{file.replace('/', '-')}-{arguments[0]}")
            for file, arguments in [
                ("m/config.json", ("export", "m", "-o", "b", *SPLIT, "--no-verify")),
                ("thinking.onnx", ("export", "m", "-o", "b", *SPLIT, "--no-verify")),
                ("new/manifest.json", ("export", "m", "-o", "b", *SPLIT)),
                ("late_decode.onnx", ("verify", "b")),
                ("b/tokenizer.json", GENERATE),
                ("b/generation_config.json", GENERATE),
            ]
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else value.replace("/", "-"),
)
def test_ctrl_c(file: str, arguments: tuple[str, ...], place: Path) -> None:
    (place / "b/generation_config.json").write_text("{}")
    sealed("generation_config.json", nothing)()
    before = snapshot(place)
    path = os.pathsep.join(str((Path(__file__).parents[3] / name).resolve()) for name in (".", "runtime", "models"))
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, file, *arguments],
        cwd=place,
        env={**os.environ, "PYTHONPATH": path},
        input="hello\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert done.stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in done.stderr
    assert snapshot(place) == before
    assert sorted(path.name for path in place.iterdir()) == ["b", "m", "s"]
