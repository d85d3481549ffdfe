"""Which files of a Hugging Face directory hold the weights. No torch, no pickle.

Stands under ``hf``. The choice is that of transformers, where a directory has one reading: model.safetensors before the
shards of an index. A directory with two is refused with the names of both:

1. model.safetensors beside shards that are all there: one of them is older, and nothing says which;
2. an adapter of peft beside the weights: transformers would add it.

An index whose shards have gone was left by an earlier save, and a warning says that it is not read.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from dmtd_errors.pointers import lfs_pointer
from dmtd_errors.words import kind_of, reason, shown
from dmtd_models.checkpoints.safetensors_file import StoredTensor, read_header
from dmtd_models.errors import CheckpointError

logger = logging.getLogger("dmtd.checkpoints")

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
_NAMES_WEIGHTS = "transformers_weights"  # a key of config.json: transformers then reads the file that it names
MERGE = "merge it into its base first (peft: merge_and_unload, then save_pretrained) and give the result"


def json_object(file: Path) -> dict[str, object]:
    """A JSON object's content; CheckpointError for anything else."""
    if (pointer := lfs_pointer(file)) is not None:
        raise CheckpointError(f"{file}: {pointer}")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({reason(error)}); mend that") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable JSON ({reason(error)}); restore the file") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: got {kind_of(value)}, expected a JSON object; restore the file")
    return value


def adapter_problem(path: Path) -> str | None:
    """What to say of a directory that is an adapter, whoever made it; None if it is none."""
    if not (path / ADAPTER_CONFIG).is_file():
        return None
    if _is_ours(path / ADAPTER_CONFIG):
        return (
            "an adapter that dmtd finetune made; give the model that it was made of, and this directory with --adapter"
        )
    return f"a PEFT adapter; {MERGE} (--adapter takes those that dmtd finetune made)"


def _is_ours(adapter_config: Path) -> bool:
    try:
        return "dmtd_adapter" in json_object(adapter_config)
    except CheckpointError:
        return False


def stored_tensors(path: Path, config: dict[str, object]) -> dict[str, StoredTensor]:
    """Every tensor of the directory's weights, by name; ``config`` is its config.json.

    Raises:
        CheckpointError: no weights, weights that cannot be read, or two readings of what the weights are.
    """
    single, index = path / SINGLE_FILE, path / INDEX_FILE
    named = config.get(_NAMES_WEIGHTS)
    if named is not None:
        raise CheckpointError(
            f"{path / 'config.json'}: {_NAMES_WEIGHTS}: got {shown(named)}, which is not supported; rename that file to "
            f"{SINGLE_FILE} (or {INDEX_FILE}) and take the key out"
        )
    chosen = next((file for file in (single, index) if file.is_file()), None)
    adapter = path / ADAPTER_CONFIG
    if chosen is not None and adapter.is_file() and not _is_ours(adapter):  # ours is what the weights differ by
        raise CheckpointError(
            f"{path}: {ADAPTER_CONFIG} stands beside {chosen.name}, and nothing says whether the adapter is in those weights; "
            f"move it away if it is, else {MERGE}"
        )
    if chosen is None:
        raise CheckpointError(f"{path}: {_no_weights(path)}")
    if chosen == index:
        return _sharded_tensors(path)
    if index.is_file():
        _require_stale(single, index)
    return read_header(single)


def _no_weights(path: Path) -> str:
    if (problem := adapter_problem(path)) is not None:
        return problem
    if dangling := [name for name in (SINGLE_FILE, INDEX_FILE) if (path / name).is_symlink()]:
        return f"{dangling[0]} is a link to {(path / dangling[0]).readlink()}, which is not there; download it again"
    pickles = sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
    if pickles:
        return (
            f"only PyTorch pickle files ({pickles[0].name}), which can run code when read and are refused; "
            "convert them to safetensors"
        )
    return (
        f"got neither {SINGLE_FILE} nor {INDEX_FILE}, expected one of them (a bundle is no checkpoint: give the model "
        "that it was exported from)"
    )


def _require_stale(single: Path, index: Path) -> None:
    """Both are there: fine where the index says nothing else, or cannot be followed any more."""
    shards = _shards(index)[1]
    if shards == [single.name]:
        return
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if not missing:
        raise CheckpointError(
            f"{index.parent}: holds {single.name} and {index.name} with all its shards ({shards[0]} ...), which may be different "
            f"weights; remove {single.name}, or the index and its shards"
        )
    logger.warning("%s: not read: its shard %s is not there, and %s is", index, missing[0], single.name)


def _shards(index: Path) -> tuple[dict[str, str], list[str]]:
    """The weight map, and the files it names."""
    weight_map = json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: no usable weight_map; restore the file")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        # A name with a directory part could point outside the checkpoint.
        if shard != Path(shard).name or shard in ("", ".", ".."):
            raise CheckpointError(f"{index}: shard {shard!r} leaves the directory; refuse or rename it")
    return weight_map, shards


def _sharded_tensors(path: Path) -> dict[str, StoredTensor]:
    weight_map, shards = _shards(path / INDEX_FILE)
    headers: dict[str, dict[str, StoredTensor]] = {}
    owner: dict[str, str] = {}
    for shard in shards:
        if not (path / shard).is_file():
            raise CheckpointError(f"{path}: shard {shard} is missing; download it")
        headers[shard] = read_header(path / shard)
        for name in headers[shard]:
            if owner.setdefault(name, shard) != shard:
                raise CheckpointError(
                    f"{path}: tensor {name} is in {owner[name]} and in {shard}; download both again, they are of different saves"
                )
    for name, shard in weight_map.items():
        if owner.get(name) != shard:
            raise CheckpointError(
                f"{path}: tensor {name} is not in {shard} as the index says; download the shard again"
            )
    if unlisted := owner.keys() - weight_map.keys():
        raise CheckpointError(f"{path / INDEX_FILE}: shards hold {min(unlisted)}, which the index lacks; restore it")
    return {name: headers[shard][name] for name, shard in weight_map.items()}
