"""The other engines of tools/peers: an environment of their own, and the model in each one's form. Kept for the next run.

What cannot be made is told by a ``PeerError`` of one line, and becomes a row of the table.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

PYTHON_PEERS = ("onnxruntime-genai==0.18.0", "mistralrs==0.9.5")
BUILDER = ("onnx-ir==1.1.0",)  # of onnxruntime-genai's builder, besides this interpreter's torch and transformers
NODE_PEER = "node-llama-cpp@3.22.1"
INSTALL_TIMEOUT_S = 1200


class PeerError(Exception):
    """Why an engine cannot be measured, in one line."""


def python_of(directory: Path) -> Path:
    """The interpreter of the engines' environment, made if it is not there."""
    python = directory / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.is_file():
        venv.create(directory / "venv", with_pip=True, clear=True)
    for package in PYTHON_PEERS:
        stamp = directory / "venv" / f".{package}"
        if not stamp.exists():
            _run([str(python), "-m", "pip", "install", "-q", package], f"pip install {package}")
            stamp.touch()
    return python


def node_modules(directory: Path) -> Path:
    """The folder that holds node-llama-cpp with its prebuilt llama.cpp."""
    folder, stamp = directory / "node", directory / "node" / f".{NODE_PEER}"
    if shutil.which("npm") is None or shutil.which("node") is None:
        raise PeerError("node and npm are not installed")
    if not stamp.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"private": true}\n')
        _run(["npm", "install", "--no-audit", "--no-fund", "-E", NODE_PEER], f"npm install {NODE_PEER}", cwd=folder)
        stamp.touch()
    return folder


def q4_0_file(model: Path, directory: Path) -> Path:
    """The GGUF with its Q4_1 matrices rounded again to Q4_0, which llama.cpp and mistral.rs have faster kernels for."""
    return _made(directory / f"{model.stem}.as-Q4_0.gguf", lambda part: _write_q4_0(model, part))


def _write_q4_0(model: Path, target: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(model)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if field.name == "general.architecture" or field.name.startswith("GGUF."):
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=sub)
    for tensor in reader.tensors:
        data, kind = tensor.data, tensor.tensor_type
        if kind == gguf.GGMLQuantizationType.Q4_1:
            kind, values = gguf.GGMLQuantizationType.Q4_0, gguf.quants.dequantize(data, kind)
            data = gguf.quants.quantize(values, kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def float_directory(model: Path, directory: Path) -> Path:
    """The GGUF's values as a Hugging Face directory in float32."""
    return _made(directory / f"{model.stem}.float", lambda part: _write_floats(model, part))


def _write_floats(model: Path, target: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    from dmtd_models.checkpoints.checkpoint import open_checkpoint

    target.mkdir()
    with open_checkpoint(model) as checkpoint:
        for name, content in checkpoint.assets().items():
            (target / name).write_bytes(content)
        tensors = {name: np.ascontiguousarray(checkpoint.read(name), dtype=np.float32) for name in checkpoint.names()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def genai_model(model: Path, directory: Path, python: Path, block: int, lm_head_bits: int) -> Path:
    """onnxruntime-genai's own graph: int4, accuracy_level 4; its builder runs in this interpreter."""
    extra = [f"block_size={block}", "accuracy_level=4"]
    if lm_head_bits == 8:
        # Its shared table of 8 bits names an initializer that it does not write (0.18.0).
        extra += ["matmul_mixed_precision=last_matmul:int8", "shared_embeddings=false"]

    def build(part: Path) -> None:
        source = float_directory(model, directory)
        packages = directory / "builder"
        if not (packages / "onnx_ir").is_dir():
            command = [str(python), "-m", "pip", "install", "-q", "--no-deps", "--target", str(packages), *BUILDER]
            _run(command, f"pip install {BUILDER[0]}")
        code = "import importlib.util as u; print(u.find_spec('onnxruntime_genai').submodule_search_locations[0])"
        folder = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        script = Path(folder, "models", "builder.py")
        command = [sys.executable, str(script), "-i", str(source), "-o", str(part), "-p", "int4", "-e", "cpu"]
        command += ["-c", str(directory / "cache"), "--extra_options", *extra]
        _run(command, "its builder", env={"PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"})

    return _made(directory / f"{model.stem}.genai-b{block}-head{lm_head_bits}", build)


def _made(target: Path, make: Callable[[Path], object]) -> Path:
    """``target``, made beside its place and renamed when it is whole."""
    if not target.exists():
        part = target.with_name(f".{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.unlink(missing_ok=True)
        make(part)
        part.rename(target)
    return target


def _run(command: list[str], what: str, *, cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
    """Run a command; a failure becomes one line with the last that it said."""
    environment = {**os.environ, **(env or {})}
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=INSTALL_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"{what} took longer than {INSTALL_TIMEOUT_S} s") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise PeerError(f"{what} failed: {lines[-1][:200]}")
