"""Products over quantised weights on x86 processors: ONNX Runtime's operator MatMulNBits, computed by code of ours.

ONNX Runtime's own takes about twice as long for the four rows of a refill as for one, this one a third longer. Bundles' graphs
know nothing of it, but that products with offsets are functions in them, which ONNX Runtime takes apart without it. It is
compiled when the package is installed (``tools/build_kernels.py``).
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

from dmtd_runtime.errors import BackendError

LIBRARY = Path(__file__).with_name("libdmtd_kernels.so")
VARIABLE = "DMTD_KERNELS"
OFF, AVX2 = "off", "avx2"  # its values: ONNX Runtime's own products; no instructions newer than these


@cache
def instruction_set() -> str | None:
    """What products are computed with: avx512, avx2, or None for ONNX Runtime's own.

    Raises:
        BackendError: the library is there and cannot be loaded, or the variable has no value of its own.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", OFF, AVX2):
        raise BackendError(f"{VARIABLE}: got {wanted!r}, expected {OFF} or {AVX2}")
    if wanted == OFF or not LIBRARY.is_file():
        return None
    try:
        choose = ctypes.CDLL(str(LIBRARY)).dmtd_kernels_choose
    except (OSError, AttributeError) as error:
        raise BackendError(f"{LIBRARY}: {error}; install dmtd again, or set {VARIABLE}={OFF}") from error
    choose.restype = ctypes.c_char_p
    return choose(wanted.encode()).decode() or None
