"""What is evaluated: a checkpoint or a bundle behind one face, with its scorer, its tokenizer and a bundle to generate from.

A checkpoint generates through a temporary bundle, exported on demand in float32 for ONNX Runtime, so that generation
always runs the real runtime.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from dmtd_export.evaluate.errors import EvaluateError
from dmtd_export.evaluate.options import OpenOptions
from dmtd_export.evaluate.scorer import Scorer
from dmtd_export.options import ExportOptions, WeightOptions
from dmtd_models.config.model import ANY_SPLIT, ModelConfig, SplitOptions, require_split, resolve_dmtd
from dmtd_models.data.chat import TextTokenizer
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import BlockFormat, CycleInfo, ModelInfo
from dmtd_runtime.text.tokenizer import Tokenizer

GENERATION_BATCH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One opened model. ``generation_bundle`` exports a checkpoint the first time it is called."""

    path: Path
    kind: Literal["checkpoint", "bundle"]
    scorer: Scorer
    dimensions: ModelConfig | ModelInfo
    tokenizer: Tokenizer | None
    assets: Path  # the directory of tokenizer and chat template
    convention_recorded: bool
    generation_bundle: Callable[[], Path]
    adapter: Path | None = None
    trained_otherwise: str | None = None  # a line about weights that were not trained for this split
    formats: Mapping[str, BlockFormat | str] | None = (
        None  # of a bundle: quantised weights by name, and the type of caches
    )

    def chats(self) -> TextTokenizer:
        """Training's tokenizer, which knows the tokens of a prompt from those of its answer."""
        files = {
            name: (self.assets / name).read_bytes() for name in contract.ASSET_FILES if (self.assets / name).is_file()
        }
        return TextTokenizer(files, vocab_size=self.scorer.vocab_size)

    @property
    def cycle(self) -> CycleInfo:
        """The split and convention in force."""
        return self.scorer.cycle

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the tokens that the tokenizer puts before every text.

        Raises:
            EvaluateError: there is no tokenizer.
        """
        if self.tokenizer is None:
            raise EvaluateError(f"{self.path}: has no tokenizer.json, which evaluation needs; add it to the checkpoint")
        return self.tokenizer.encode(text)


def is_bundle(path: Path) -> bool:
    """Whether a path is a bundle rather than a checkpoint."""
    return (path / contract.MANIFEST_FILE).is_file()


def require_there(path: Path) -> None:
    """Raise EvaluateError where there is nothing, which need not wait for what opens it."""
    if not path.exists():
        raise EvaluateError(
            f"{path}: no such file or directory; give a bundle, a Hugging Face directory or a .gguf file"
        )


@contextlib.contextmanager
def open_subject(path: Path, options: OpenOptions, *, plain_only: bool = False) -> Iterator[Subject]:
    """Open a checkpoint or a bundle. ``plain_only``: a base model, whose split does not matter.

    Raises:
        DmtdError, ModelError: it cannot be opened, or its split is unknown.
    """
    require_there(path)
    with contextlib.ExitStack() as opened:
        yield (
            _open_bundle(path, options, opened)
            if is_bundle(path)
            else _open_checkpoint(path, options, plain_only, opened)
        )


def _open_bundle(path: Path, options: OpenOptions, opened: contextlib.ExitStack) -> Subject:
    from dmtd_export.evaluate.bundle_scorer import BundleScorer

    if options.adapter is not None:
        raise EvaluateError(
            f"{path} is a bundle, an adapter is merged into a checkpoint; give it with its base", param="adapter"
        )
    if given := [name for name, value in asdict(options.split).items() if value is not None]:
        raise EvaluateError(
            f"{path} is a bundle, whose split is fixed; leave the split options out, or give its checkpoint",
            param=given[0],
        )
    scorer = opened.enter_context(BundleScorer(path, device=options.device, threads=options.threads))
    return Subject(
        path=path,
        kind="bundle",
        scorer=scorer,
        dimensions=scorer.manifest.model,
        tokenizer=Tokenizer.from_directory(path),
        assets=path,
        convention_recorded=True,
        generation_bundle=lambda: path,
        formats={**scorer.manifest.quantised, "caches": scorer.manifest.model.cache_dtype},
    )


def _open_checkpoint(path: Path, options: OpenOptions, plain_only: bool, opened: contextlib.ExitStack) -> Subject:
    from dmtd_export.evaluate.torch_scorer import TorchScorer, use_threads
    from dmtd_models.checkpoints.checkpoint import is_gguf, open_checkpoint

    if options.adapter is None and not plain_only and is_gguf(path):
        require_split(options.split)
    checkpoint = opened.enter_context(open_checkpoint(path, options.adapter))
    split = options.split
    if plain_only:
        split = SplitOptions() if checkpoint.dmtd else ANY_SPLIT
    spec = resolve_dmtd(checkpoint.config, checkpoint.dmtd, split)
    otherwise = None
    if checkpoint.dmtd is not None and not plain_only:
        from dmtd_export.bundle.export import trained_otherwise

        otherwise = trained_otherwise(checkpoint.dmtd, spec)
    use_threads(options.threads)
    scorer = opened.enter_context(TorchScorer.open(checkpoint, spec, dtype=options.dtype, device=options.device))
    scratch = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="dmtd-evaluate-")))
    assets = scratch / "assets"
    assets.mkdir()
    for name, content in checkpoint.assets().items():
        (assets / name).write_bytes(content)

    def generation_bundle() -> Path:
        bundle = scratch / "bundle"
        if not is_bundle(bundle):
            from dmtd_export.bundle.export import export_bundle, quiet_export, runnable_target

            target = runnable_target(checkpoint.config.head_dim)
            floats = WeightOptions(weights="float")  # as the scorer reads them
            made = ExportOptions(
                split=split, target=target, formats=floats, max_num_seqs=GENERATION_BATCH, verify=False
            )
            with quiet_export() if plain_only else contextlib.nullcontext():
                export_bundle(path, bundle, made, adapter=options.adapter)
        return bundle

    return Subject(
        path=path,
        kind="checkpoint",
        scorer=scorer,
        dimensions=checkpoint.config,
        tokenizer=Tokenizer.from_directory(assets),
        assets=assets,
        convention_recorded=spec.convention_recorded,
        generation_bundle=generation_bundle,
        adapter=options.adapter,
        trained_otherwise=otherwise,
    )
