"""engine.json: what is read back, what is refused, and which engines a runtime gets."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dmtd_export.engines.options import BuildOptions
from dmtd_export.engines.run import build_engines
from dmtd_runtime.bundle.engine_choice import EngineWish, build_command, choose_record, mismatches
from dmtd_runtime.bundle.engine_record import EngineRecord, read_record, records
from dmtd_runtime.bundle.manifest import load_manifest
from dmtd_runtime.errors import BackendError, BundleError, RequestError


@pytest.fixture(scope="module")
def built(bundles: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with engines of the simulator, which takes no library."""
    bundle = tmp_path_factory.mktemp("built") / "bundle"
    shutil.copytree(bundles(family="qwen3", encoding=0, tie=True, dtype="float16"), bundle)
    build_engines(bundle, BuildOptions(backend="simulator", max_num_seqs=4, fused=True))
    return bundle


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def record(built: Path) -> EngineRecord:
    [(_, record)] = records(built)
    return record


def test_a_record_is_read_as_it_was_written(built: Path, record: EngineRecord) -> None:
    [(directory, _)] = records(built)
    assert json.loads(record.to_json()) == json.loads((directory / "engine.json").read_text())
    assert read_record(directory) == record
    record.check_files(directory, hashes=True)
    assert [engine.graph for engine in record.engines][:4] == ["thinking", "late_decode", "full_pass", "choose_token"]


def test_buckets_and_profiles_of_a_run(record: EngineRecord) -> None:
    assert [record.bucket_for(n) for n in (1, 256, 257, 320)] == [256, 256, 320, 320]
    late = record.engine("late_decode")
    profile = late.profile_for("step", batch=4, rows=1, visible_len=256)
    assert (profile.name, profile.visible_len(256)) == ("step_whole", 320)
    assert late.profile_for("prefill", batch=1, rows=256, visible_len=256).visible_len(256) == 256
    assert record.engine("choose_token").profile_for("choose", batch=4, rows=1, visible_len=0).index == 0


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"kind": "refill"}, "late_decode: no refill profile, only prefill, step_whole"),
        ({"batch": 5}, "late_decode, input_ids: got a batch of 5, expected 1 to 4; build for more with: dmtd build"),
        ({"batch": 0}, "got a batch of 0"),
        ({"rows": 2}, "late_decode, step: got 2 rows, expected 1 to 1"),
        ({"visible_len": 321}, "late_decode, visible_rows: got a length of 321, expected at most 320"),
    ],
)
def test_a_run_outside_every_profile_names_input_and_bound(record: EngineRecord, run: dict, message: str) -> None:
    asked = {"kind": "step", "batch": 1, "rows": 1, "visible_len": 256} | run
    with pytest.raises(RequestError, match=message):
        record.engine("late_decode").profile_for(**asked)


def test_too_long_a_sequence_names_the_bound(record: EngineRecord) -> None:
    with pytest.raises(RequestError, match="got 321 cache rows, the engines hold 320; build for longer"):
        record.bucket_for(321)


def test_device_memory_counts_tables_once(built: Path, record: EngineRecord) -> None:
    manifest = load_manifest(built)
    layer = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 96 * 64 + 2 * 64 + 2 * 16)
    rotary, table, norm = 2 * 2 * 320 * 8, 2 * 128 * 64, 2 * 64
    caches = 4 * 4 * 2 * 2 * 320 * 16 * 2  # slots, layers, keys and values, heads, capacity, head_dim, bytes
    staged = table + 4 * layer + norm + 2 * rotary + caches
    assert record.device_bytes(manifest) == staged
    assert record.device_bytes(manifest, "fused") == staged + layer + norm
    assert record.device_bytes(manifest, max_num_seqs=1) == staged - caches * 3 // 4


def test_engines_that_fit_are_found(built: Path, record: EngineRecord) -> None:
    manifest = load_manifest(built)
    wish = EngineWish(backend="simulator", version="1", compute_capability="8.9", full_pass="fused", max_num_seqs=4)
    assert choose_record(built, manifest, wish)[1] == record
    assert choose_record(built, manifest, EngineWish())[1] == record


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (
            EngineWish(version="2"),
            r"simulator version: built for 1, here 2; build engines that do with: dmtd build .* --backend simulator",
        ),
        (EngineWish(backend="tensorrt-rtx"), "backend: built for simulator, here tensorrt-rtx"),
        (
            EngineWish(max_num_seqs=8),
            r"max_num_seqs: built for up to 4, asked for 8; .* --max-num-seqs 8 --max-model-len 64",
        ),
        (
            EngineWish(max_model_len=65),
            r"max_model_len: built for up to 64, asked for 65; .* --max-num-seqs 4 --max-model-len 65",
        ),
    ],
)
def test_what_does_not_fit_is_told_with_the_command(built: Path, wish: EngineWish, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        choose_record(built, load_manifest(built), wish)


def test_the_gpu_counts_where_the_engine_is_tied_to_one(built: Path, record: EngineRecord) -> None:
    manifest = load_manifest(built)
    tied = dataclasses.replace(record, backend="tensorrt", compute_capability="9.0", gpu_name="NVIDIA H200")
    here = EngineWish(compute_capability="9.0", gpu_name="NVIDIA H200")
    assert mismatches(tied, manifest, here) == []
    other = EngineWish(compute_capability="8.9", gpu_name="NVIDIA L40S")
    assert mismatches(tied, manifest, other) == [
        "compute capability: built for 9.0, here 8.9",
        "GPU: built for NVIDIA H200, here NVIDIA L40S",
    ]
    assert mismatches(record, manifest, other) == []  # any


def test_any_gpu_means_8_0_and_later(built: Path, record: EngineRecord) -> None:
    rtx = dataclasses.replace(record, backend="tensorrt-rtx", supported=("7.5", "8.9", "12.0"))
    manifest = load_manifest(built)
    for capability in ("8.0", "8.9", "9.0", "10.3", "12.0", "13.0"):
        assert mismatches(rtx, manifest, EngineWish(compute_capability=capability)) == []
    assert mismatches(rtx, manifest, EngineWish(compute_capability="7.5")) == [
        "compute capability: built for 8.0 and later, here 7.5"
    ]


@pytest.mark.parametrize(("here", "option"), [("8.9", " --compute-capability 8.9"), ("13.0", "")])
def test_engines_for_another_gpu_name_the_command_for_this_one(bundle: Path, here: str, option: str) -> None:
    """One that the library does not name is served by engines for any."""
    [(directory, record)] = records(bundle)
    rtx = dataclasses.replace(record, backend="tensorrt-rtx", compute_capability="12.0", supported=("8.9", "12.0"))
    (directory / "engine.json").write_text(rtx.to_json())
    with pytest.raises(
        BackendError, match=rf"built for 12.0, here {here}; .*: dmtd build \S+ --backend tensorrt-rtx{option} --fused"
    ):
        choose_record(bundle, load_manifest(bundle), EngineWish(compute_capability=here))


def test_staged_engines_do_not_serve_fused(built: Path, record: EngineRecord) -> None:
    manifest, engines = load_manifest(built), record.engines_for("staged")
    staged = dataclasses.replace(record, engines=engines)
    assert mismatches(staged, manifest, EngineWish(full_pass="fused")) == [
        "full pass: built for staged only, asked for fused"
    ]
    with pytest.raises(BundleError, match=r"hold no full_pass, .* dmtd build BUNDLE --fused"):
        staged.engine("full_pass")


@pytest.mark.parametrize("what", ["model.onnx.data", "config.json", "choose_token.onnx", "split"])
def test_a_changed_bundle_is_noticed(bundle: Path, what: str) -> None:
    manifest = load_manifest(bundle)
    if what == "split":
        other = dataclasses.replace(manifest, cycle=dataclasses.replace(manifest.cycle, decoding_layers=2))
    else:
        changed = dataclasses.replace(manifest.files[what], sha256="0" * 64)
        other = dataclasses.replace(manifest, files={**manifest.files, what: changed})
    with pytest.raises(BackendError, match="the bundle's graphs or weights have changed since"):
        choose_record(bundle, other, EngineWish())


def test_a_bundle_without_engines_says_how_to_build_them(bundles: Callable[..., Path]) -> None:
    plain = bundles(family="qwen3", encoding=0, tie=True, dtype="float16")
    wish = EngineWish(backend="tensorrt-rtx", compute_capability="8.9", full_pass="fused", max_num_seqs=2)
    expected = f"{plain} has no engines; build them with: dmtd build {plain} --backend tensorrt-rtx "
    with pytest.raises(BackendError, match=f"^{expected}--compute-capability 8.9 --fused --max-num-seqs 2$"):
        choose_record(plain, load_manifest(plain), wish)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            "truncate",
            "has .* bytes, its record says .*: truncated or altered; build it again with: dmtd build .* --force",
        ),
        ("alter", "has SHA-256 .*: altered; build it again with"),
        ("remove", "is missing, its record lists it; build it again with"),
    ],
)
def test_damaged_engines_are_refused(bundle: Path, damage: str, message: str) -> None:
    [(directory, record)] = records(bundle)
    path = directory / "late_decode.onnx"
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(content[:-1])
    elif damage == "alter":
        content[100] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    with pytest.raises(BundleError, match=message):
        record.check_files(directory, hashes=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "has schema 99, this version reads 2"),
        ({"max_num_seqs": "4"}, 'engine.max_num_seqs is "4", expected an integer'),
        ({"engines": []}, "no engines, or length buckets"),
        ({"length_buckets": [256]}, "no engines, or length buckets that do not end at the capacity"),
    ],
)
def test_a_damaged_record_is_one_line(bundle: Path, change: dict, message: str) -> None:
    [(directory, _)] = records(bundle)
    path = directory / "engine.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BundleError, match=message):
        read_record(directory)
    path.write_text("{")
    with pytest.raises(BundleError, match="cannot be read as JSON"):
        records(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": []}, r"late_decode has no input \w+"),
        ({"outputs": []}, r"late_decode has no output present"),
        ({"tables": {"nothing": "x"}}, "late_decode has no input nothing"),
        ({"profiles": []}, "late_decode has no profile"),
    ],
)
def test_a_record_that_names_what_is_not_there_is_one_line(bundle: Path, change: dict, message: str) -> None:
    [(directory, _)] = records(bundle)
    path = directory / "engine.json"
    raw = json.loads(path.read_text())
    raw["engines"][1] |= change
    path.write_text(json.dumps(raw))
    with pytest.raises(BundleError, match=message):
        read_record(directory)


def test_a_damaged_record_does_not_hide_the_engines_beside_it(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Left by another version, or by hand: what stands beside it serves, and the line says what to remove."""
    [(directory, record)] = records(bundle)
    other = directory.with_name("any-tensorrt-rtx-9")
    other.mkdir()
    (other / "engine.json").write_text('{"schema": 99}')
    manifest = load_manifest(bundle)
    assert choose_record(bundle, manifest, EngineWish(backend="simulator")) == (directory, record)
    remedy = f"remove {other} and build its engines again with: dmtd build {bundle}"
    assert f"passed over: {other}/engine.json has schema 99" in caplog.text and remedy in caplog.text
    with pytest.raises(BackendError, match="backend: built for simulator, here tensorrt"):
        choose_record(bundle, manifest, EngineWish(backend="tensorrt"))
    shutil.rmtree(directory)
    with pytest.raises(BundleError, match="has schema 99"):
        choose_record(bundle, manifest, EngineWish(backend="simulator"))


def test_commands_may_be_pasted_whatever_the_path(built: Path, record: EngineRecord) -> None:
    place = Path("my models/one's bundle")
    for command in (record.rebuild_command(place), build_command(place, EngineWish(max_num_seqs=2))):
        assert shlex.split(command)[:3] == ["dmtd", "build", str(place)]
    with pytest.raises(BundleError, match="cannot be read") as caught:
        read_record(place / "engines" / "key")
    words = shlex.split(str(caught.value).partition("; remove ")[2])
    assert words[0] == f"{place}/engines/key" and words[-1] == str(place)


def test_the_suggested_build_keeps_what_the_engines_served(bundle: Path) -> None:
    [(directory, record)] = records(bundle)
    raw = json.loads((directory / "engine.json").read_text())
    (directory / "engine.json").write_text(json.dumps(raw | {"prefill_chunk": 512}))
    with pytest.raises(BackendError) as caught:
        choose_record(bundle, load_manifest(bundle), EngineWish(backend="simulator", max_num_seqs=64))
    words = shlex.split(str(caught.value).partition("with: ")[2])
    options = {word: words[place + 1] for place, word in enumerate(words[:-1]) if word.startswith("--")}
    assert options["--prefill-chunk"] == "512" and options["--max-num-seqs"] == "64"
    assert options["--max-model-len"] == str(record.max_model_len)


def test_a_record_cannot_name_files_outside(bundle: Path) -> None:
    [(directory, _)] = records(bundle)
    path = directory / "engine.json"
    raw = json.loads(path.read_text())
    raw["engines"][0]["file"] = "../../manifest.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(BundleError, match="expected a path inside the bundle"):
        read_record(directory)


def test_a_later_shorter_build_does_not_take_over_unasked(bundle: Path) -> None:
    [(directory, record)] = records(bundle)
    shorter = directory.with_name(directory.name + "-short")
    shutil.copytree(directory, shorter)
    raw = json.loads((shorter / "engine.json").read_text())
    (shorter / "engine.json").write_text(json.dumps(raw | {"max_model_len": record.max_model_len // 2}))
    manifest = load_manifest(bundle)
    assert [path for path, _ in records(bundle)] == [shorter, directory], "newest first"
    assert choose_record(bundle, manifest, EngineWish(backend="simulator"))[0] == directory
    assert choose_record(bundle, manifest, EngineWish(backend="simulator", max_model_len=16))[0] == shorter
