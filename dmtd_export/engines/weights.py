"""The weights file as engine graphs read it: codes of quantised weights as two's complements, all else as it stands.

TensorRT dequantises signed integers about zero. The stored codes are unsigned about their middle, as ONNX Runtime's kernels
want them; the two differ in the highest bit of each code.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import FileInfo, Manifest, sha256_of

HIGHEST_BITS = {4: 0x88, 8: 0x80}  # of the codes in a byte
_CHUNK_BYTES = 32 << 20


def copy_weights(bundle: Path, directory: Path, manifest: Manifest) -> FileInfo:
    """Write the file into ``directory``. A copy and no link: onnx's checker takes a linked weights file for an attack."""
    path = Path(shutil.copyfile(bundle / contract.WEIGHTS_FILE, directory / contract.WEIGHTS_FILE))
    if not manifest.quantised:
        return manifest.files[contract.WEIGHTS_FILE]
    for name, fmt in manifest.quantised.items():
        if fmt.float8:
            continue
        info = manifest.weights[contract.block_part(name, contract.CODES)]
        codes = np.memmap(path, np.uint8, "r+", offset=info.offset, shape=(info.length,))
        for start in range(0, len(codes), _CHUNK_BYTES):
            codes[start : start + _CHUNK_BYTES] ^= np.uint8(HIGHEST_BITS[fmt.bits])
        codes.flush()
    return FileInfo(bytes=path.stat().st_size, sha256=sha256_of(path))
