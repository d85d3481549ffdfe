"""A Hugging Face directory as a ``Checkpoint``: config.json and one or many safetensors files. No torch, no pickle.

Stands behind ``checkpoint.open_checkpoint``. Matrices that GPTQ or AWQ packed are ``packed``'s, the tokenizer's files
``hf_tokenizer``'s.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from dmtd_errors.pointers import lfs_pointer
from dmtd_errors.words import reason
from dmtd_models.checkpoints.blocks import BlockWeight
from dmtd_models.checkpoints.hf_tokenizer import complete_tokenizer
from dmtd_models.checkpoints.packed import CONFIG_KEY, PackedMatrix, packed_format, take_packed
from dmtd_models.checkpoints.protocol import ASSET_NAMES, CHAT_TEMPLATE, TOOL_USE_TEMPLATE
from dmtd_models.checkpoints.safetensors_file import FLOAT_TYPES, StoredTensor, map_tensor
from dmtd_models.checkpoints.tensors import EMBEDDING, LM_HEAD, tensor_shapes
from dmtd_models.checkpoints.weight_files import adapter_problem, json_object, stored_tensors
from dmtd_models.config.model import DmtdSpec, ModelConfig, read_config
from dmtd_models.config.rope import ignored_factor
from dmtd_models.errors import CheckpointError

logger = logging.getLogger("dmtd.models")

AnyArray = npt.NDArray[np.generic]

# Old checkpoints store this buffer, which follows from the config.
_IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_COMPARED_ROWS = 4096
_Tensor = StoredTensor | PackedMatrix


class HuggingFaceCheckpoint:
    """Implements ``Checkpoint`` over a directory; see there for the methods."""

    def __init__(self, path: Path) -> None:
        raw = _config_json(path)
        packing = packed_format(raw)
        raw.pop(CONFIG_KEY, None)
        config, self._dmtd = read_config(raw)
        if (line := ignored_factor(raw, config.rope)) is not None:
            logger.warning("%s: %s", path / "config.json", line)
        self._path = path
        self._raw = raw
        self._assets: dict[str, bytes] | None = None
        stored = stored_tensors(path, raw)
        packed = {} if packing is None else take_packed(path, packing, tensor_shapes(config), stored)
        self._tensors = _checked(path, config, {**stored, **packed})
        embedding = self._tensors[EMBEDDING]
        if raw.get("dtype") is None and raw.get("torch_dtype") is None and isinstance(embedding, StoredTensor):
            config = replace(config, dtype=_DTYPE_NAMES[embedding.dtype_name])
        self._config = config

    @property
    def path(self) -> Path:
        return self._path

    @property
    def config(self) -> ModelConfig:
        return self._config

    @property
    def dmtd(self) -> DmtdSpec | None:
        return self._dmtd

    @property
    def tokenizer_problem(self) -> str | None:
        if (self._path / "tokenizer.json").is_file():
            return None
        others = [name for name in ("tokenizer.model", "vocab.json") if (self._path / name).is_file()]
        found = f" ({others[0]} alone is not read; save the fast tokenizer beside it)" if others else ""
        return f"{self._path}: no tokenizer.json{found}"

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def read(self, name: str) -> AnyArray:
        tensor = self._tensor(name)
        return tensor.values() if isinstance(tensor, PackedMatrix) else map_tensor(tensor)

    def block_source(self, name: str) -> str | None:
        tensor = self._tensor(name)
        return tensor.format.method if isinstance(tensor, PackedMatrix) and tensor.block is not None else None

    def was_in_blocks(self, name: str) -> bool:
        return self.block_source(name) is not None

    def blocks(self, name: str) -> BlockWeight | None:
        tensor = self._tensor(name)
        return tensor.blocks() if isinstance(tensor, PackedMatrix) else None

    def assets(self) -> dict[str, bytes]:
        if self._assets is None:
            self._assets = self._read_assets()
        return dict(self._assets)

    def _read_assets(self) -> dict[str, bytes]:
        names = (*ASSET_NAMES, "added_tokens.json")
        found = {name: _asset(self._path / name) for name in names if (self._path / name).is_file()}
        # A file of templates takes the place of all that the tokenizer's config has.
        if CHAT_TEMPLATE not in found:
            templates = embedded_chat_templates(found.get("tokenizer_config.json", b"{}"))
            found |= {name: text.encode() for name, text in templates.items()}
        elif (tool_use := self._path / "additional_chat_templates" / "tool_use.jinja").is_file():
            found[TOOL_USE_TEMPLATE] = _asset(tool_use)
        config = json.loads(found["config.json"])
        if config.pop(CONFIG_KEY, None) is not None:  # what is read here is no longer packed
            found["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
        found |= complete_tokenizer(self._path, found, self._raw)
        found.pop("added_tokens.json", None)
        return found

    def close(self) -> None:
        """Nothing is held open between reads."""

    def __enter__(self) -> HuggingFaceCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tensor(self, name: str) -> _Tensor:
        if name not in self._tensors:
            raise CheckpointError(f"{self._path}: no tensor named {name}; names() lists them")
        return self._tensors[name]


def embedded_chat_templates(tokenizer_config: bytes) -> dict[str, str]:
    """The chat templates inside a tokenizer_config.json (a string, or a list of named ones) by the file they become."""
    try:
        template = json.loads(tokenizer_config).get("chat_template")
    except (ValueError, AttributeError):
        return {}
    named: dict[object, object] = {"default": template}
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    files = {CHAT_TEMPLATE: named.get("default"), TOOL_USE_TEMPLATE: named.get("tool_use")}
    return {name: text for name, text in files.items() if isinstance(text, str)}


def _asset(file: Path) -> bytes:
    if (pointer := lfs_pointer(file)) is not None:
        raise CheckpointError(f"{file}: {pointer}")
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({reason(error)}); mend that") from error


def _config_json(path: Path) -> dict[str, object]:
    file = path / "config.json"
    if not file.is_file():
        gguf = sorted(path.glob("*.gguf"))
        fix = f"give the GGUF file itself ({gguf[0]})" if gguf else "give the directory that holds config.json"
        raise CheckpointError(f"{path}: {adapter_problem(path) or f'no config.json; {fix}'}")
    return json_object(file)


def _checked(path: Path, config: ModelConfig, stored: dict[str, _Tensor]) -> dict[str, _Tensor]:
    """The expected tensors in order; refuses what is missing, misshapen, neither float nor packed, or left over."""
    expected = tensor_shapes(config)
    if config.tie_word_embeddings and EMBEDDING not in stored and LM_HEAD in stored:
        # One tensor under two names, of which safetensors' save_model keeps the first in the alphabet.
        stored = {EMBEDDING if name == LM_HEAD else name: tensor for name, tensor in stored.items()}
    missing = [name for name in expected if name not in stored]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{path}: tensor {missing[0]}{more} is missing, expected by config.json; check that both belong together"
        )
    for name, shape in expected.items():
        tensor = stored[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{path}: tensor {name}: got shape {list(tensor.shape)}, expected {list(shape)} by config.json"
            )
        if isinstance(tensor, StoredTensor) and tensor.dtype_name not in FLOAT_TYPES:
            raise CheckpointError(
                f"{path}: tensor {name}: got type {tensor.dtype_name}, expected one of {', '.join(FLOAT_TYPES)}; "
                "use an unquantised checkpoint"
            )
    for name in stored:
        if name in expected or _IGNORED.fullmatch(name):
            continue
        if name == LM_HEAD:
            _require_same_head(path, stored[EMBEDDING], stored[LM_HEAD])
            continue
        raise CheckpointError(
            f"{path}: tensor {name} is not part of a {config.family} model as config.json describes it and would "
            "change the output; check that both belong together"
        )
    return {name: stored[name] for name in expected}


def _require_same_head(path: Path, embedding: _Tensor, head: _Tensor) -> None:
    """A stored head of a tied model may only repeat the embedding; compared in slices so that memory stays flat."""
    same = head.shape == embedding.shape
    if isinstance(embedding, PackedMatrix) or isinstance(head, PackedMatrix) or head.dtype_name not in FLOAT_TYPES:
        same = False
    elif same:
        left, right = map_tensor(embedding), map_tensor(head)
        same = all(
            np.array_equal(
                left[row : row + _COMPARED_ROWS].astype(np.float64),
                right[row : row + _COMPARED_ROWS].astype(np.float64),
            )
            for row in range(0, left.shape[0], _COMPARED_ROWS)
        )
    if not same:
        raise CheckpointError(
            f"{path}: {LM_HEAD} differs from {EMBEDDING} although config.json ties them; "
            "set tie_word_embeddings to false or remove the tensor"
        )
