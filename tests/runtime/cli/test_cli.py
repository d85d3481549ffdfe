"""The verbs that need the runtime alone: their output, their errors in one line, their exit codes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer.main
from bundles import make_bundle, with_files
from cli_support import SERVE, dmtd, one_json

from dmtd_export.cli.main import VERBS, _LazyCommand, app
from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.bench.load import LoadOptions
from dmtd_runtime.bench.measure import BenchOptions
from dmtd_runtime.cli.common import human_bytes, printable
from dmtd_runtime.sampling.params import SamplingParams
from dmtd_runtime.serving.options import ServingOptions


@pytest.fixture(scope="module")
def mute_bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_bundle(tmp_path_factory.mktemp("mute"), tokenizer=False))


def test_version_and_help() -> None:
    assert dmtd("--version").stdout == "dmtd 0.1.0\n"
    text = dmtd("--help").stdout
    assert all(verb in text for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb(verb: str) -> None:
    for option in ("--help", "-h"):
        result = dmtd(verb, option)
        assert result.exit_code == 0
        assert f"dmtd {verb}" in result.stdout


def options_of(verb: str) -> dict[str, Any]:
    command = _LazyCommand(verb, VERBS[verb]).load()
    return {parameter.name: parameter for parameter in command.params}


@pytest.mark.parametrize("verb", ["generate", "chat", "bench"])
def test_defaults_are_those_of_the_dataclasses(verb: str) -> None:
    options = options_of(verb)
    backend = BackendOptions()
    shared = {
        "device",
        "device_id",
        "dialect",
        "full_pass",
        "max_model_len",
        "threads",
        "backend",
        "cuda_graphs",
    }
    shared |= {"warm_up"} if verb != "bench" else set()  # which always warms up
    assert {name: options[name].default for name in shared} == {name: getattr(backend, name) for name in shared}
    if verb == "bench":
        bench = BenchOptions()
        own = {f.name for f in fields(BenchOptions)} - {"batches"}
        assert {name: options[name].default for name in own} == {name: getattr(bench, name) for name in own}
        assert options["batches"].default == "1"
        load = LoadOptions()
        own = {f.name for f in fields(LoadOptions)} - {"request_rates"}
        assert {name: options[name].default for name in own} == {name: getattr(load, name) for name in own}
        assert options["request_rates"].default == "inf"
    else:
        # Not given means: as generation_config.json or SamplingParams says.
        own = {f.name for f in fields(SamplingParams)} & set(options)
        assert len(own) >= 7
        assert not any(options[name].default for name in own)
        serving = {"max_num_batched_tokens"} | ({"prefix_cache_bytes"} if verb == "chat" else set())
        assert {name: options[name].default for name in serving} == {
            name: getattr(ServingOptions(), name) for name in serving
        }
        assert serving == {f.name for f in fields(ServingOptions)} & set(options)


@pytest.mark.parametrize(("option", "at_fault"), [("--max-num-batched-tokens", "0"), ("--prefix-cache-bytes", "-1")])
def test_scheduling_options_out_of_range(option: str, at_fault: str, bundle: str) -> None:
    result = dmtd("chat", bundle, option, at_fault)
    assert result.exit_code == 2
    assert option in result.stderr


def test_generate_streams_text_and_keeps_figures_apart(bundle: str) -> None:
    result = dmtd("generate", bundle, "-p", "hello", "--max-tokens", "9")
    assert result.exit_code == 0
    assert result.stdout.endswith("\n")
    note, figures = result.stderr.splitlines()
    assert note.startswith("note: weights not trained for DMTD")
    assert figures.startswith("[9 tokens | ")
    # Eight tokens come from steps; with cycles of 3 the heads are the first, the fourth and the seventh.
    assert "3 full passes, 2.67 tokens each | ended by length]" in figures


def test_generate_json_is_what_the_library_gives(bundle: str) -> None:
    from dmtd_runtime import LLM

    told = one_json(dmtd("generate", bundle, "--token-ids", "1,2 3", "--max-tokens", "8", "--greedy", "--json"))
    with LLM(bundle) as llm:
        [output] = llm.generate([1, 2, 3], SamplingParams(temperature=0, max_tokens=8))
    assert told["token_ids"] == output.outputs[0].token_ids
    assert told["text"] == output.outputs[0].text
    assert (told["finish_reason"], told["prompt_tokens"]) == ("length", 3)
    assert (told["full_passes"], told["late_steps"]) == (3, 4)


def test_generate_answers_of_a_form(bundle: str, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    sampled = ("generate", bundle, "-p", "Hi", "--temperature", "1.5", "--seed", "3", "--json")
    for given in (json.dumps(schema), str(tmp_path / "schema.json")):
        assert json.loads(one_json(dmtd(*sampled, "--json-schema", given))["text"])["a"] in (1, 2)
    assert re.fullmatch("[ab]{3}c", one_json(dmtd(*sampled, "--regex", "[ab]{3}c"))["text"])
    assert one_json(dmtd(*sampled, "--choice", "yes", "--choice", "no"))["text"] in ("yes", "no")


def test_generate_plain_runs_every_layer_and_needs_no_warning(bundle: str) -> None:
    result = dmtd("generate", bundle, "-p", "hello", "--max-tokens", "5", "--plain", "--json")
    told = one_json(result)
    assert (told["full_passes"], told["late_steps"], told["plain"]) == (4, 0, True)
    assert result.stderr == ""


def test_generate_with_a_wanted_confidence(bundle: str, tmp_path: Path) -> None:
    asked = ("--token-ids", "1,2 3", "--max-tokens", "12", "--greedy", "--json")
    fixed, every, wanted = (
        one_json(dmtd("generate", bundle, *asked, *more))
        for more in ((), ("--min-confidence", "1"), ("--min-confidence", "0.6"))
    )
    assert (fixed["dropped_tokens"], fixed["tokens_per_full_pass"]) == (0, 11 / 4)
    assert (every["full_passes"], every["late_steps"], every["tokens_per_full_pass"]) == (11, 0, 1)
    assert wanted["dropped_tokens"] > 0
    assert wanted["full_passes"] + wanted["late_steps"] - wanted["dropped_tokens"] == 11
    told = dmtd("generate", bundle, *asked[:-1], "--min-confidence", "0.6").stderr
    assert f"{wanted['dropped_tokens']} of {wanted['late_steps']} late steps dropped" in told
    # The bundle's own default, and the command line over it.
    adaptive = with_files(Path(bundle), tmp_path / "bundle", {"generation_config.json": b'{"min_confidence": 0.6}'})
    assert one_json(dmtd("generate", str(adaptive), *asked))["token_ids"] == wanted["token_ids"]
    again = one_json(dmtd("generate", str(adaptive), *asked, "--min-confidence", "0"))
    assert again["token_ids"] == fixed["token_ids"]


def test_generate_reads_the_prompt_from_anywhere(bundle: str, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("hello\n", encoding="utf-8")
    common = ("generate", bundle, "--max-tokens", "6", "--json")
    answers = [
        one_json(dmtd(*common, "-p", "hello")),
        one_json(dmtd(*common, "--prompt-file", str(tmp_path / "prompt.txt"))),
        one_json(dmtd(*common, stdin="hello")),
        one_json(dmtd(*common, stdin="hello\n")),
        one_json(dmtd(*common, stdin="hello\r\n")),
        one_json(dmtd(*common, "-p", "-", stdin="hello")),
        one_json(dmtd("generate", "-m", bundle, "--max-tokens", "6", "--json", "-p", "hello")),
    ]
    assert len({(answer["prompt_tokens"], *answer["token_ids"]) for answer in answers}) == 1
    kept = one_json(dmtd(*common, "--raw", stdin="a\n\n"))  # one line break goes, the others are the prompt's own
    assert kept["prompt_tokens"] == 2


def test_chat_template_is_applied_unless_raw(bundle: str) -> None:
    common = ("generate", bundle, "--max-tokens", "1", "--json", "-p", "hello")
    # One token a byte; the template adds <|im_start|>user\n ... <|im_end|>\n<|im_start|>assistant\n.
    assert one_json(dmtd(*common))["prompt_tokens"] == 5 + len("user\n") + len("\n") + len("assistant\n") + 3
    assert one_json(dmtd(*common, "--raw"))["prompt_tokens"] == 5
    with_system = one_json(dmtd(*common, "--system", "ab"))["prompt_tokens"]
    assert with_system == 24 + 2 + len("system\n") + len("\n") + 2


def test_seed_repeats(bundle: str) -> None:
    common = ("generate", bundle, "-p", "x", "--max-tokens", "12", "--json", "--temperature", "1.5", "--seed")
    first, again, other = (one_json(dmtd(*common, seed))["token_ids"] for seed in ("7", "7", "8"))
    assert first == again
    assert first != other


def test_token_ids_are_printed_where_there_is_no_tokenizer(mute_bundle: str) -> None:
    told = one_json(dmtd("generate", mute_bundle, "--token-ids", "1,2,3", "--max-tokens", "5", "--json"))
    result = dmtd("generate", mute_bundle, "--token-ids", "1,2,3", "--max-tokens", "5")
    assert [int(word) for word in result.stdout.split()] == told["token_ids"]


def test_arguments_of_the_chat_template(bundle: str, tmp_path: Path) -> None:
    source = b"{{ messages[-1].content }}{% if big %}ABC{% endif %}{{ tools[0].name if tools }}"
    copy = str(with_files(Path(bundle), tmp_path / "bundle", {"chat_template.jinja": source}))
    (tmp_path / "tools.json").write_text('[{"name": "look"}]', encoding="utf-8")
    given = ["--chat-template-kwargs", '{"big": true}', "--tools", str(tmp_path / "tools.json")]
    common = ("generate", copy, "-p", "hi", "--max-tokens", "1", "--json")
    assert one_json(dmtd(*common))["prompt_tokens"] == 2
    assert one_json(dmtd(*common, *given))["prompt_tokens"] == 2 + len("ABC") + len("look")
    assert dmtd("chat", copy, "--max-tokens", "1", *given, stdin="hi\n").exit_code == 0
    for arguments, words in (
        (["--chat-template-kwargs", "no"], "--chat-template-kwargs: got 'no', expected JSON"),
        (["--tools", str(tmp_path)], "--tools: "),
        (["--raw", *given], "--tools: needs a chat template and no --raw"),
    ):
        result = dmtd(*common, *arguments)
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1].startswith(f"error: {words}")


def test_inspect_and_doctor(bundle: str) -> None:
    assert one_json(dmtd("inspect", bundle, "--json"))["cycle"]["cycle_length"] == 3
    assert "past_key_values.{0-4}.key" in dmtd("inspect", bundle).stdout
    assert json.loads(dmtd("doctor", "--json").stdout)["dmtd"] == "0.1.0"


BAD_REQUESTS: list[tuple[str, Sequence[str], str]] = [
    (
        "missing bundle",
        ("generate", "/no/such", "-p", "x"),
        "does not exist; make a bundle with: dmtd export MODEL -o OUT",
    ),
    ("not a bundle", ("inspect", str(Path(__file__).parent)), "has no manifest.json"),
    ("empty prompt", ("generate", "BUNDLE", "-p", " "), "got an empty prompt"),
    ("no ids", ("generate", "BUNDLE", "--token-ids", ""), "--token-ids: got no tokens"),
    ("ids that are none", ("generate", "BUNDLE", "--token-ids", "1,x"), "--token-ids: got '1,x'"),
    ("an id left out", ("generate", "BUNDLE", "--token-ids", "1,,2"), "--token-ids: got '1,,2'"),
    (
        "ids out of range",
        ("generate", "BUNDLE", "--token-ids", "1,259"),
        "got token id 259, expected integers from 0 to 258",
    ),
    ("negative ids", ("generate", "BUNDLE", "--token-ids=-1"), "--token-ids: got token id -1"),
    (
        "too many ids",
        ("generate", "BUNDLE", "--token-ids", "1 " * 256),
        "--token-ids: got 256 tokens, expected at most 255",
    ),
    ("too long", ("generate", "BUNDLE", "--raw", "-p", "x" * 256), "got 256 tokens, expected at most 255"),
    (
        "too long for the option",
        ("generate", "BUNDLE", "--max-model-len", "9", "--raw", "-p", "x" * 9),
        "expected at most 8",
    ),
    ("model length", ("generate", "BUNDLE", "-p", "x", "--max-model-len", "257"), "expected 1 to 256"),
    (
        "contradiction",
        ("generate", "BUNDLE", "-p", "x", "--greedy", "--temperature", "1"),
        "--temperature: got 1 with --greedy",
    ),
    ("tokens", ("generate", "BUNDLE", "-p", "x", "--min-tokens", "5", "--max-tokens", "2"), "--min-tokens: got 5"),
    ("range", ("generate", "BUNDLE", "-p", "x", "--top-p", "2"), "--top-p: got 2"),
    ("stop id", ("generate", "BUNDLE", "-p", "x", "--stop-token-ids", "999"), "--stop-token-ids: got token id 999"),
    ("bias", ("generate", "BUNDLE", "-p", "x", "--logit-bias", "nope"), "--logit-bias: got 'nope'"),
    ("form", ("generate", "BUNDLE", "-p", "x", "--regex", "("), "--json-schema, --regex, --choice: it cannot"),
    ("two forms", ("generate", "BUNDLE", "-p", "x", "--regex", "a", "--choice", "b"), "got regex and choice"),
    ("no schema", ("generate", "BUNDLE", "-p", "x", "--json-schema", "/no/such"), "--json-schema: got '/no/such'"),
    ("timeout", ("generate", "BUNDLE", "-p", "x", "--timeout", "0"), "--timeout: got 0"),
    ("no file", ("generate", "BUNDLE", "--prompt-file", "/no/such"), "cannot be read"),
    ("system and raw", ("generate", "BUNDLE", "-p", "x", "--raw", "--system", "y"), "--system: needs a chat template"),
    ("text without tokenizer", ("generate", "MUTE", "-p", "x"), "no tokenizer: give --token-ids"),
    ("chat without tokenizer", ("chat", "MUTE"), "no tokenizer, which chatting needs"),
    ("bench length", ("bench", "BUNDLE"), "--prompt-len: got 128, and 256 new tokens, expected at most 256"),
    ("load without serve", ("bench", "BUNDLE", "--num-prompts", "3"), "--serve: an option of a serving load was given"),
    ("rates", ("bench", "BUNDLE", *SERVE, "--request-rate", "1,fast"), "--request-rate: got '1,fast'"),
    ("rate and loop", ("bench", "BUNDLE", *SERVE, "--request-rate", "1", "--concurrency", "2"), "--concurrency: got 2"),
    ("plot of one", ("bench", "BUNDLE", *SERVE, "--plot", "x.png"), "--plot: expected several request rates"),
    ("plot kind", ("bench", "BUNDLE", *SERVE, "--request-rate", "1,2", "--plot", "x.gif"), "--plot: got x.gif"),
    (
        "load length",
        ("bench", "BUNDLE", "--serve", "--max-tokens", "120"),
        "with a range ratio of 0.5, expected at most",
    ),
    ("no dataset", ("bench", "BUNDLE", *SERVE, "--dataset", "/no/such"), "--dataset: /no/such cannot be read"),
    ("whole and serve", ("bench", "BUNDLE", *SERVE, "--whole-model"), "--whole-model: got it with --serve"),
    ("bench sizes", ("bench", "BUNDLE", "--batch", "1,b"), "--batch: got '1,b'"),
]


def test_more_sequences_than_the_bundle_has_graphs_for_are_refused_by_the_option(bundle: str) -> None:
    result = dmtd("bench", bundle, "--prompt-len", "4", "--max-tokens", "6", "--batch", "1,99")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: --batch: got 99, expected 1"), result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"), [row[1:] for row in BAD_REQUESTS], ids=[row[0] for row in BAD_REQUESTS]
)
def test_bad_requests_are_one_line(arguments: Sequence[str], words: str, bundle: str, mute_bundle: str) -> None:
    result = dmtd(*({"BUNDLE": bundle, "MUTE": mute_bundle}.get(word, word) for word in arguments), stdin="")
    assert result.stdout == ""
    [line] = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert line.startswith("error: ")
    assert words in line
    assert result.exit_code == (2 if line.startswith("error: --") else 1), result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("generate",),
        ("generate", "BUNDLE", "-m", "BUNDLE", "-p", "x"),
        ("generate", "BUNDLE", "-p", "x", "--token-ids", "1"),
        ("generate", "BUNDLE", "-p", "x", "--full-pass", "half"),
        ("generate", "BUNDLE", "-p", "x", "--max-tokens", "many"),
        ("bench", "BUNDLE", "--threads", "0"),
        ("inspect",),
        ("doctor", "BUNDLE"),
    ],
)
def test_wrong_usage_exits_2(arguments: Sequence[str], bundle: str) -> None:
    result = dmtd(*(bundle if word == "BUNDLE" else word for word in arguments), stdin="")
    assert result.exit_code == 2
    assert "Error" in result.stderr


@pytest.mark.parametrize("verb", ["finetune", "evaluate", "generate", "chat", "serve", "bench"])
def test_more_threads_than_any_machine_has_are_refused(verb: str) -> None:
    result = dmtd(verb, "X", "--threads", "99999", stdin="")
    assert result.exit_code == 2 and "Invalid value for '--threads'" in result.stderr


def test_damaged_bundles(bundle: str, tmp_path: Path) -> None:
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(bundle, damaged)
    manifest = json.loads((damaged / "manifest.json").read_text(encoding="utf-8"))

    def refused(words: str) -> None:
        result = dmtd("generate", str(damaged), "-p", "x")
        assert result.exit_code == 1
        assert words in result.stderr
        assert len(result.stderr.splitlines()) == 1

    weights = (damaged / "model.onnx.data").read_bytes()
    (damaged / "model.onnx.data").write_bytes(weights[:-1])
    refused("truncated or altered")
    (damaged / "model.onnx.data").write_bytes(bytes([weights[0] ^ 1]) + weights[1:])
    refused("altered")
    (damaged / "model.onnx.data").unlink()
    refused("is missing")
    (damaged / "manifest.json").write_text(json.dumps(manifest | {"schema": 99}), encoding="utf-8")
    refused("upgrade with: pip install -U dmtd")
    (damaged / "manifest.json").write_text("{", encoding="utf-8")
    refused("cannot be read as JSON")


def test_numbers_for_people() -> None:
    assert [human_bytes(count) for count in (12, 1234, 750_000, 99_940_000, 538_060_032, 2.5e9)] == [
        *("12 B", "1.23 kB", "750 kB", "99.9 MB", "538 MB", "2.5 GB")
    ]


def test_commands_are_typer_commands() -> None:
    assert set(VERBS) == set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_a_terminal_gets_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\x1b[2Jb\r\x9bc\n\td\u00e9"
    assert printable(text) == text, "a pipe gets all"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert printable(text) == "a\\x1b[2Jb\\x0d\\x9bc\n\td\u00e9"


def test_sampling_options_that_change_nothing_are_noted(bundle: str) -> None:
    noted = dmtd("generate", bundle, "-p", "a", "--max-tokens", "2", "--top-p", "0.9", "--greedy")
    assert "--top-p changes nothing at temperature 0" in noted.stderr
    assert "changes nothing" not in dmtd("generate", bundle, "-p", "a", "--max-tokens", "2", "--greedy").stderr
