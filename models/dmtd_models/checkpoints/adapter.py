"""Adapters: the small difference between a plain checkpoint and its fine-tuned DMTD weights. No torch.

A directory with ``adapter_config.json`` and ``adapter_model.safetensors``, of one of two kinds:

- ``lora``: two factors a matrix, named and described as the peft library writes them; W + (alpha / r) B A;
- ``delta``: for each trained tensor its difference, in 8 bits or fewer (``delta``).

``AdaptedCheckpoint`` is the base with the difference added: it reads, exports and verifies as any checkpoint. The
configuration carries the published DMTD fields and a fingerprint of the base's weights, so that an adapter is never added
to another model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dmtd_errors.native import NativePanicError, call_native
from dmtd_errors.pointers import lfs_pointer
from dmtd_errors.words import kind_of, reason, shown
from dmtd_models.checkpoints.blocks import BlockWeight
from dmtd_models.checkpoints.delta import delta_difference, misfit
from dmtd_models.checkpoints.protocol import AnyArray, Checkpoint
from dmtd_models.checkpoints.saving import make_directory, replacing, write_json
from dmtd_models.checkpoints.weight_files import ADAPTER_CONFIG as CONFIG_FILE
from dmtd_models.checkpoints.weight_files import MERGE
from dmtd_models.config.hf import with_dmtd_fields
from dmtd_models.config.model import DmtdSpec, ModelConfig, read_config
from dmtd_models.config.values import integer, number
from dmtd_models.errors import CheckpointError

WEIGHTS_FILE = "adapter_model.safetensors"
AdapterKind = Literal["lora", "delta"]
Float32 = npt.NDArray[np.float32]

_LORA_PREFIX = "base_model.model."
_DIGEST = "weights_sha256"
_SAMPLES = 64  # values of each tensor that the fingerprint sees


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """What adapter_config.json says."""

    kind: AdapterKind
    base_fingerprint: str
    scaling: float  # alpha / r of a lora, 1 for a delta
    raw: Mapping[str, object]


class AdaptedCheckpoint:
    """A checkpoint with an adapter's difference added to the weights, and its DMTD fields to the configuration."""

    def __init__(self, base: Checkpoint, adapter: Path) -> None:
        """Open the adapter and check that it belongs to ``base``, which this object then owns and closes.

        Raises:
            CheckpointError: nothing readable there, another base, or tensors that do not fit.
        """
        self._base = base
        self._adapter = adapter
        self._settings = read_adapter_config(adapter)
        _require_base(adapter, self._settings, base)
        self._config, self._dmtd = _configured(base, self._settings)
        self._tensors = _open_tensors(adapter, self._settings.raw.get(_DIGEST))
        self._changed = _changed_names(adapter, self._settings, base, self._tensors)

    @property
    def path(self) -> Path:
        return self._base.path

    @property
    def config(self) -> ModelConfig:
        return self._config

    @property
    def dmtd(self) -> DmtdSpec | None:
        return self._dmtd

    @property
    def tokenizer_problem(self) -> str | None:
        return self._base.tokenizer_problem

    @property
    def changed(self) -> frozenset[str]:
        """Names of the tensors that the adapter changes."""
        return self._changed

    def names(self) -> list[str]:
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def read(self, name: str) -> AnyArray:
        """The base's tensor where the adapter leaves it alone, else the sum in float32."""
        array = self._base.read(name)
        if name not in self._changed:
            return array
        if self._settings.kind == "lora":
            difference = lora_difference(self._tensors, name, self._settings.scaling)
        else:
            difference = delta_difference(self._tensors, name, self._base.shape(name))
        return np.asarray(array, dtype=np.float32) + difference

    def block_source(self, name: str) -> str | None:
        """As ``blocks``."""
        return None if name in self._changed else self._base.block_source(name)

    def was_in_blocks(self, name: str) -> bool:
        return self._base.was_in_blocks(name)

    def blocks(self, name: str) -> BlockWeight | None:
        """The base's blocks where the adapter leaves the tensor alone, else None: a sum is no longer in them."""
        return None if name in self._changed else self._base.blocks(name)

    def assets(self) -> dict[str, bytes]:
        assets = self._base.assets()
        raw = with_dmtd_fields(json.loads(assets["config.json"]), self._dmtd, self._config.family)
        return {**assets, "config.json": (json.dumps(raw, indent=2) + "\n").encode()}

    def close(self) -> None:
        """Let go of the base's files."""
        self._base.close()

    def __enter__(self) -> AdaptedCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def lora_difference(tensors: Mapping[str, AnyArray], name: str, scaling: float) -> Float32:
    """(alpha / r) B A of one matrix, float32 [out, in]."""
    module = _LORA_PREFIX + name.removesuffix(".weight")
    down, up = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
    product: Float32 = np.float32(scaling) * (np.asarray(up, dtype=np.float32) @ np.asarray(down, dtype=np.float32))
    return product


def write_adapter(directory: Path, settings: Mapping[str, object], tensors: Mapping[str, AnyArray]) -> None:
    """Write both files; the configuration last, so that a directory with one is whole.

    Raises:
        CheckpointError: it cannot be written.
    """
    make_directory(directory)
    with replacing(directory / WEIGHTS_FILE) as part:
        save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, part)
        digest = _sha256(part)
        (directory / CONFIG_FILE).unlink(missing_ok=True)  # an older one does not belong to these weights
    write_json(directory / CONFIG_FILE, {**settings, _DIGEST: digest})


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def delta_settings(spec: DmtdSpec, family: str, base_fingerprint: str) -> dict[str, object]:
    """adapter_config.json of a delta."""
    return {"dmtd_adapter": "delta", "base_fingerprint": base_fingerprint, **with_dmtd_fields({}, spec, family)}


def weights_fingerprint(checkpoint: Checkpoint) -> str:
    """A digest of the names, shapes and evenly spread values of all tensors, whatever file they are stored in."""
    digest = hashlib.sha256()
    for name in checkpoint.names():
        array = checkpoint.read(name)
        flat = array.reshape(-1)
        places = np.linspace(0, flat.size - 1, min(_SAMPLES, flat.size)).astype(np.int64)
        digest.update(f"{name}{array.shape}".encode())
        digest.update(np.ascontiguousarray(flat[places], dtype="<f4").tobytes())
    return digest.hexdigest()


def read_adapter_config(directory: Path) -> AdapterConfig:
    """Read and check adapter_config.json.

    Raises:
        CheckpointError: not there, not JSON, or of a kind that is not known.
    """
    file = directory / CONFIG_FILE
    if (pointer := lfs_pointer(file)) is not None:
        raise CheckpointError(f"{file}: {pointer}")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{directory}: no adapter ({CONFIG_FILE} cannot be read: {reason(error)}); "
            "give a directory that dmtd finetune made"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON ({reason(error)}); restore the file") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: got {kind_of(raw)}, expected an object; restore the file")
    fingerprint = raw.get("base_fingerprint")
    kind = raw.get("dmtd_adapter")
    if kind is None and "peft_type" in raw:
        raise CheckpointError(f"{directory}: a PEFT adapter, expected one that dmtd finetune made; {MERGE}")
    if kind not in ("lora", "delta") or not isinstance(fingerprint, str):
        raise CheckpointError(
            f"{file}: got dmtd_adapter {shown(kind)}, expected lora or delta with a base_fingerprint; "
            "only adapters that dmtd finetune made are known"
        )
    rank = integer(raw, "r") if kind == "lora" else 1
    if rank < 1:
        raise CheckpointError(f"{file}: r: got {rank}, expected 1 or more; restore the file")
    scaling = number(raw, "lora_alpha") / rank if kind == "lora" else 1.0
    return AdapterConfig(kind=kind, base_fingerprint=fingerprint, scaling=scaling, raw=raw)


def _require_base(adapter: Path, settings: AdapterConfig, base: Checkpoint) -> None:
    if base.dmtd is not None:
        raise CheckpointError(
            f"{adapter}: {base.path} is a DMTD checkpoint already; give the plain model it was trained from"
        )
    got = weights_fingerprint(base)
    if got != settings.base_fingerprint:
        raise CheckpointError(
            f"{adapter}: made for a model with fingerprint {settings.base_fingerprint[:12]}, {base.path} has {got[:12]}; "
            "give the model it was trained from, in the same quantisation"
        )


def _configured(base: Checkpoint, settings: AdapterConfig) -> tuple[ModelConfig, DmtdSpec]:
    fields = {key: value for key, value in settings.raw.items() if key in _DMTD_FIELDS}
    config, spec = read_config({**json.loads(base.assets()["config.json"]), **fields})
    if spec is None:
        raise CheckpointError(
            f"{CONFIG_FILE}: num_thinking_layers, num_decoding_layers and mtp_horizon are missing; restore it"
        )
    return config, spec


_DMTD_FIELDS = frozenset(with_dmtd_fields({}, None, "llama"))


def _open_tensors(directory: Path, digest: object) -> dict[str, AnyArray]:
    file = directory / WEIGHTS_FILE
    if (pointer := lfs_pointer(file)) is not None:
        raise CheckpointError(f"{file}: {pointer}")
    try:
        if digest is not None and _sha256(file) != digest:
            raise CheckpointError(f"{file}: not the file that {CONFIG_FILE} was written with; restore the adapter")
        with call_native(safe_open, file, framework="numpy", quiet=True) as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError, NativePanicError) as error:
        raise CheckpointError(f"{file}: cannot be read ({reason(error)}); restore the adapter") from error


def _changed_names(
    adapter: Path, settings: AdapterConfig, base: Checkpoint, tensors: Mapping[str, AnyArray]
) -> frozenset[str]:
    """Names of the base's tensors that change; refuses what belongs to none of them or has another shape."""
    known = set(base.names())
    if settings.kind == "delta":
        changed = {name.removesuffix(".delta") for name in tensors if name.endswith(".delta")}
        matrices = {name for name in changed & known if len(base.shape(name)) == 2}
        expected = {f"{name}.delta" for name in changed} | {f"{name}.scale" for name in matrices}
    else:
        ends = (".lora_A.weight", ".lora_B.weight")
        changed = {
            name.removeprefix(_LORA_PREFIX).removesuffix(end) + ".weight"
            for name in tensors
            for end in ends
            if name.endswith(end)
        }
        expected = {_LORA_PREFIX + name.removesuffix(".weight") + end for name in changed for end in ends}
    unknown = sorted(changed - known) or sorted(set(tensors) ^ expected)
    if unknown or not changed:
        raise CheckpointError(
            f"{adapter}: tensor {unknown[0] if unknown else 'none'} does not fit the model; give its own base"
        )
    for name in changed:
        shape = base.shape(name)
        if settings.kind == "lora":
            made = lora_shape(tensors, name)
            problem = None if made == shape else f"{name}: got {list(made)}, expected {list(shape)}"
        else:
            problem = misfit(tensors, name, shape)
        if problem is not None:
            raise CheckpointError(f"{adapter}: {problem}; give its own base")
    return frozenset(changed)


def lora_shape(tensors: Mapping[str, AnyArray], name: str) -> tuple[int, ...]:
    """Shape [out, in] of what two factors make; empty if they do not fit each other."""
    module = _LORA_PREFIX + name.removesuffix(".weight")
    down, up = tensors[f"{module}.lora_A.weight"].shape, tensors[f"{module}.lora_B.weight"].shape
    return (up[0], down[1]) if len(down) == len(up) == 2 and up[1] == down[0] else ()
