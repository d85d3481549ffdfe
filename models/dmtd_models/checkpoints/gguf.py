"""A GGUF file as a ``Checkpoint``: tensors renamed and dequantised one at a time, config from the metadata. No torch.

Stands behind ``checkpoint.open_checkpoint``, over the ``gguf`` package's reader (which maps the file) and its
dequantisation. Float tensors keep their type, quantised ones become float32. The tokenizer is made by
``gguf_tokenizer``.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType

import gguf
import ml_dtypes
import numpy as np
import numpy.typing as npt

from dmtd_errors.words import reason
from dmtd_models.checkpoints.blocks import BlockWeight
from dmtd_models.checkpoints.gguf_blocks import BLOCK_TYPES, block_weight
from dmtd_models.checkpoints.gguf_tokenizer import TokenizerFiles, tokenizer_from_metadata
from dmtd_models.checkpoints.tensors import EMBEDDING, FINAL_NORM, LM_HEAD, tensor_shapes
from dmtd_models.config.gguf import config_from_metadata
from dmtd_models.config.hf import to_hugging_face
from dmtd_models.config.model import DmtdSpec, ModelConfig
from dmtd_models.errors import CheckpointError

AnyArray = npt.NDArray[np.generic]

_FLOAT_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TYPES = (*_FLOAT_TYPES, *BLOCK_TYPES)
_ROPE_FREQS = "rope_freqs.weight"
_TOP_NAMES = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight", LM_HEAD: "output.weight"}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class GgufCheckpoint:
    """Implements ``Checkpoint`` over a GGUF file; see there for the methods."""

    def __init__(self, path: Path) -> None:
        self._path = path
        metadata, stored = _read(path)
        self._metadata = metadata
        rope_freqs = stored.pop(_ROPE_FREQS, None)
        self._config = config_from_metadata(
            path,
            metadata,
            tensor_shapes={name: _shape(tensor) for name, tensor in stored.items()},
            dtype=_FLOAT_TYPES.get(_type_name(stored.get("blk.0.attn_q.weight")), "float32"),
            rope_factors=None if rope_freqs is None else _dequantised(rope_freqs),
        )
        self._tensors = _checked(path, self._config, stored)
        self._tokenizer: TokenizerFiles | None = None

    @property
    def path(self) -> Path:
        return self._path

    @property
    def config(self) -> ModelConfig:
        return self._config

    @property
    def dmtd(self) -> DmtdSpec | None:
        """Always None: GGUF files carry no DMTD fields."""
        return None

    @property
    def tokenizer_problem(self) -> str | None:
        return self._tokenizer_files().problem

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return _shape(self._tensor(name))

    def read(self, name: str) -> AnyArray:
        array = _dequantised(self._tensor(name))
        heads = self._permuted_heads(name)
        return array if heads is None else _unpermuted(array, heads)

    def block_source(self, name: str) -> str | None:
        tensor = self._tensor(name)
        return _type_name(tensor) if _type_name(tensor) in BLOCK_TYPES and len(tensor.shape) == 2 else None

    def was_in_blocks(self, name: str) -> bool:
        return self.block_source(name) is not None

    def blocks(self, name: str) -> BlockWeight | None:
        if (source := self.block_source(name)) is None:
            return None
        weight = block_weight(np.asarray(self._tensor(name).data), source)
        heads = self._permuted_heads(name)
        return weight if heads is None else weight.rearranged(lambda array: _unpermuted(array, heads))

    def _permuted_heads(self, name: str) -> int | None:
        """How many heads a tensor's rows are, where llama files hold them in an order of their own; None elsewhere."""
        if self._config.family != "llama":
            return None
        if ".self_attn.q_proj." in name:
            return self._config.num_heads
        return self._config.num_kv_heads if ".self_attn.k_proj." in name else None

    def assets(self) -> dict[str, bytes]:
        eos = list(self._config.eos_token_ids)
        generation: dict[str, object] = {"bos_token_id": self._config.bos_token_id, "eos_token_id": eos or None}
        if len(eos) == 1:
            generation["eos_token_id"] = eos[0]
        made = {"config.json": to_hugging_face(self._config), "generation_config.json": generation}
        as_bytes = {name: (json.dumps(value, indent=2) + "\n").encode() for name, value in made.items()}
        return {**self._tokenizer_files().files, **as_bytes}

    def close(self) -> None:
        """Drop the map of the file."""
        self._tensors = {}

    def __enter__(self) -> GgufCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tensor(self, name: str) -> gguf.ReaderTensor:
        if name not in self._tensors:
            raise CheckpointError(f"{self._path}: no tensor named {name}; names() lists them")
        return self._tensors[name]

    def _tokenizer_files(self) -> TokenizerFiles:
        if self._tokenizer is None:
            self._tokenizer = tokenizer_from_metadata(self._metadata, max_len=self._config.max_positions)
        return self._tokenizer


class _Reader(gguf.GGUFReader):
    """Over the mapped bytes as a plain array: a slice of ``np.memmap`` costs several times as much, and a vocabulary takes
    half a million (SmolLM2's, with its merges: 4.1 s of CPU time, so 1.4 s).
    """

    @property
    def data(self) -> npt.NDArray[np.uint8]:
        return self._bytes

    @data.setter
    def data(self, mapped: npt.NDArray[np.uint8]) -> None:
        self._bytes = mapped.view(np.ndarray)


def _read(path: Path) -> tuple[dict[str, object], dict[str, gguf.ReaderTensor]]:
    """Metadata by key, as plain Python values, and tensors by GGUF name."""
    try:
        reader = _Reader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        size = path.stat().st_size
        # The reader does not look whether the last tensors' bytes are there.
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({reason(error)}); check the file") from error
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, UnicodeDecodeError) as error:
        if gguf.GGMLQuantizationType.__name__ in str(error):
            raise CheckpointError(
                f"{path}: a tensor's type is not known ({error}); convert the file to another"
            ) from error
        raise CheckpointError(f"{path}: truncated or damaged GGUF file ({error}); download it again") from error
    if end > size:
        raise CheckpointError(f"{path}: truncated: got {size} bytes, expected {end}; download it again")
    if reader.byte_order != "I":
        raise CheckpointError(f"{path}: got a big-endian GGUF file, expected little-endian; convert it")
    parts = metadata.get("split.count")
    if isinstance(parts, int) and parts > 1:
        raise CheckpointError(
            f"{path}: one of {parts} parts; merge them (llama-gguf-split --merge) and give the result"
        )
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def _checked(path: Path, config: ModelConfig, stored: dict[str, gguf.ReaderTensor]) -> dict[str, gguf.ReaderTensor]:
    """The expected tensors under Hugging Face's names; refuses what is missing, misshapen, unreadable or left over."""
    tensors = {}
    left = dict(stored)
    for name, shape in tensor_shapes(config).items():
        tensor = left.pop(_gguf_name(name), None)
        if tensor is None:
            raise CheckpointError(f"{path}: tensor {_gguf_name(name)} is missing, expected by the metadata")
        if _shape(tensor) != shape:
            raise CheckpointError(
                f"{path}: tensor {tensor.name}: got shape {list(_shape(tensor))}, expected {list(shape)}"
            )
        if _type_name(tensor) not in _TYPES:
            raise CheckpointError(
                f"{path}: tensor {tensor.name}: got type {_type_name(tensor)}, expected one of "
                f"{', '.join(_TYPES)}; use a file of another quantisation"
            )
        tensors[name] = tensor
    if left:
        raise CheckpointError(
            f"{path}: tensor {min(left)} is not part of a {config.family} model and would change the output; "
            "it is not supported"
        )
    return tensors


def _gguf_name(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{_LAYER_NAMES[module]}.{kind}"


def _type_name(tensor: gguf.ReaderTensor | None) -> str:
    return "" if tensor is None else str(tensor.tensor_type.name)


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    # GGUF counts dimensions from the fastest.
    return tuple(int(size) for size in reversed(tensor.shape))


def _dequantised(tensor: gguf.ReaderTensor) -> AnyArray:
    kind = _type_name(tensor)
    if kind in ("F32", "F16"):
        return np.asarray(tensor.data)
    if kind == "BF16":
        return np.ascontiguousarray(tensor.data).view(np.dtype(ml_dtypes.bfloat16)).reshape(_shape(tensor))
    return np.asarray(gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type), dtype=np.float32)


def _unpermuted(array: AnyArray, heads: int) -> AnyArray:
    """Undo the row order of llama files, whose rotary pairs are neighbours, to pairs half a head apart."""
    half = array.shape[0] // heads // 2
    return array.reshape(heads, half, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
