"""One safetensors file, memory-mapped tensor by tensor, checked against its own header. No torch.

Stands under ``hf``. The format is 8 bytes of header length, a JSON header, then the tensors' bytes; reading
it here rather than through the library gives bfloat16 without torch, mapped (not copied) arrays and precise errors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt

from dmtd_errors.pointers import lfs_pointer
from dmtd_errors.words import reason
from dmtd_models.errors import CheckpointError

AnyArray = npt.NDArray[np.generic]

FLOAT_TYPES: dict[str, np.dtype[np.generic]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_TYPES: dict[str, np.dtype[np.generic]] = {**FLOAT_TYPES, "I32": np.dtype("<i4")}  # that are mapped
_LARGEST_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where one tensor stands. ``dtype_name`` is the format's (F32, BF16, ...); offsets count from the file's start."""

    file: Path
    dtype_name: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read and check the header of one file.

    Raises:
        CheckpointError: not a safetensors file, or shorter than its header says.
    """
    if (pointer := lfs_pointer(file)) is not None:
        raise CheckpointError(f"{file}: {pointer}")
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER_BYTES):
                raise CheckpointError(
                    f"{file}: truncated or not a safetensors file ({size} bytes, its header would take {length + 8}); "
                    "download it again"
                )
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({reason(error)}); mend that") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: the safetensors header is not JSON; download the file again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the safetensors header is not an object; download the file again")
    header.pop("__metadata__", None)
    tensors = {name: _entry(file, name, entry, start=8 + length) for name, entry in header.items()}
    needed = max((tensor.end for tensor in tensors.values()), default=8 + length)
    if needed > size:
        raise CheckpointError(
            f"{file}: truncated: got {size} bytes, expected {needed} by its header; download it again"
        )
    return tensors


def map_tensor(tensor: StoredTensor) -> AnyArray:
    """The tensor as a read-only array over the file's pages, in its stored type.

    Raises:
        CheckpointError: the file has gone or shrunk since its header was read.
    """
    dtype = _TYPES[tensor.dtype_name]
    if prod(tensor.shape) == 0:
        return np.zeros(tensor.shape, dtype)
    try:
        # As raw bytes first: a map of an extension type (bfloat16) and an unaligned offset are both awkward.
        raw = np.memmap(tensor.file, dtype=np.uint8, mode="r", offset=tensor.begin, shape=(tensor.end - tensor.begin,))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{tensor.file}: cannot be mapped ({reason(error)}); is the file still whole?") from error
    return raw.view(dtype).reshape(tensor.shape)


def _entry(file: Path, name: str, entry: object, *, start: int) -> StoredTensor:
    try:
        assert isinstance(entry, dict)
        dtype_name, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: the header's entry {name!r} is malformed; download the file again") from error
    dtype = _TYPES.get(dtype_name)
    if begin < 0 or end < begin or any(size < 0 for size in shape):
        raise CheckpointError(f"{file}: the header's entry {name!r} has impossible offsets; download the file again")
    if dtype is not None and end - begin != prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"{file}: tensor {name}: got {end - begin} bytes, expected {prod(shape) * dtype.itemsize} "
            f"for {dtype_name} {list(shape)}; download the file again"
        )
    return StoredTensor(file=file, dtype_name=dtype_name, shape=shape, begin=start + begin, end=start + end)
