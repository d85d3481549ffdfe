"""Products over quantised weights on x86 processors: ONNX Runtime's operator MatMulNBits, computed by code of ours.

With AVX-512 it is quicker at one row, and takes 1.3 times as long for the four rows of a refill where ONNX Runtime's takes twice.
Bundles' graphs know nothing of it, but that products with offsets are functions in them, which ONNX Runtime takes apart without
it. It is compiled when the package is installed (``tools/build_kernels.py``).
"""

from __future__ import annotations

import ctypes
import os
import struct
from functools import cache
from pathlib import Path

from dmtd_runtime.errors import BackendError

LIBRARY = Path(__file__).with_name("libdmtd_kernels.so")
VARIABLE = "DMTD_KERNELS"
OFF, SETS = "off", ("avx2", "avx512")  # its values: ONNX Runtime's own products; no instructions newer than these
X86_64 = 62  # as ELF files number machines


@cache
def instruction_set() -> str | None:
    """What products are computed with: avx512, avx2, or None for ONNX Runtime's own.

    Raises:
        BackendError: the library is there and cannot be loaded, or the variable asks for what is not there.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", OFF, *SETS):
        raise BackendError(f"{VARIABLE}: got {wanted!r}, expected one of {', '.join((OFF, *SETS))}")
    if wanted in SETS and not LIBRARY.is_file():
        raise BackendError(
            f"{VARIABLE}={wanted}: there is no {LIBRARY.name}; install dmtd again where it can be compiled"
        )
    if wanted == OFF or not LIBRARY.is_file():
        return None
    try:
        choose = ctypes.CDLL(str(LIBRARY)).dmtd_kernels_choose if _is_whole(LIBRARY) else None
    except (OSError, AttributeError):
        choose = None
    if choose is None:
        fix = f"install dmtd again, or set {VARIABLE}={OFF}"
        raise BackendError(f"{LIBRARY} is damaged, or for another machine; {fix}")
    choose.restype = ctypes.c_char_p
    return choose(wanted.encode()).decode() or None


def _is_whole(library: Path) -> bool:
    """Whether an ELF file is for this kind of machine and ends where it says: a cut one would kill the process that loads it."""
    with library.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return False
    machine, sections, size, count = struct.unpack("<18xH20xQ10xHH2x", header)
    return bool(machine == X86_64 and library.stat().st_size >= sections + size * count)
