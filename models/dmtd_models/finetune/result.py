"""What a run leaves: an ordinary checkpoint with the published configuration, or a small adapter.

Last station of fine-tuning. Both are written beside their place and renamed, the configuration last, so that a directory with a
config.json or adapter_config.json is whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from dmtd_models.checkpoints.adapter import delta_settings, weights_fingerprint, write_adapter
from dmtd_models.checkpoints.delta import MOST_BITS, delta_difference, quantised_delta
from dmtd_models.checkpoints.protocol import AnyArray, Checkpoint
from dmtd_models.checkpoints.saving import make_directory, replacing, write_json
from dmtd_models.config.hf import with_dmtd_fields
from dmtd_models.config.model import DmtdSpec
from dmtd_models.finetune.student import Student
from dmtd_models.reference.dmtd import to_torch

Save = Literal["checkpoint", "adapter"]

_SHARD_BYTES = 4 << 30
_STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def save_checkpoint(checkpoint: Checkpoint, spec: DmtdSpec, student: Student, output: Path) -> None:
    """Write config.json, safetensors (in the base's type) and the tokenizer's files. Names are the base's.

    Args:
        checkpoint: the plain model; tensors that were not trained are copied from it one by one.
        spec: split and convention, recorded in config.json.
        student: the trained weights; factors of an adapter are merged.
        output: directory, made if needed; other files in it stay.
    """
    trained = trained_weights(student, checkpoint)
    assets = dict(checkpoint.assets())
    raw = with_dmtd_fields(json.loads(assets.pop("config.json")), spec, checkpoint.config.family)
    make_directory(output)
    stored = _STORED[checkpoint.config.dtype]

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in checkpoint.names():
            yield name, trained[name].to(stored) if name in trained else to_torch(checkpoint.read(name), stored)

    _save_shards(output, tensors())
    for name, content in assets.items():
        with replacing(output / name) as part:
            part.write_bytes(content)
    write_json(output / "config.json", raw)


def save_adapter(
    checkpoint: Checkpoint, spec: DmtdSpec, student: Student, output: Path, bits: int = MOST_BITS
) -> float:
    """Write the difference to the base: peft's factors for a lora, else deltas of so many bits.

    Returns:
        How much of the difference the cut lost: the norm of the error over the norm of the difference.
    """
    fingerprint = weights_fingerprint(checkpoint)
    if hasattr(student.model, "peft_config"):
        return _save_lora(checkpoint, spec, student, output, fingerprint)
    tensors: dict[str, AnyArray] = {}
    lost = whole = 0.0
    for name, value in trained_weights(student, checkpoint).items():
        difference = value.numpy() - np.asarray(checkpoint.read(name), dtype=np.float32)
        cut = quantised_delta(name, difference, bits)
        tensors |= cut
        lost += float(np.square(delta_difference(cut, name, difference.shape) - difference, dtype=np.float64).sum())
        whole += float(np.square(difference, dtype=np.float64).sum())
    write_adapter(output, delta_settings(spec, checkpoint.config.family, fingerprint), tensors)
    return (lost / whole) ** 0.5 if whole else 0.0


def trained_weights(student: Student, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Trained tensors under the names of a checkpoint, float32 on the CPU; a lora's factors merged into the base's matrix.

    The frozen matrix in the model may have been cut to bfloat16 for training; that of the checkpoint is not.
    """
    if hasattr(student.model, "peft_config"):
        return _merged(student, checkpoint)
    return {
        name.removeprefix("model."): value.detach().float().cpu()
        for name, value in student.named_parameters()
        if value.requires_grad
    }


def _merged(student: Student, checkpoint: Checkpoint) -> dict[str, Tensor]:
    merged = {}
    for name, module in student.model.base_model.model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        delta = module.get_delta_weight("default").detach().float().cpu()
        merged[f"{name}.weight"] = to_torch(checkpoint.read(f"{name}.weight"), torch.float32) + delta
    return merged


def _save_lora(checkpoint: Checkpoint, spec: DmtdSpec, student: Student, output: Path, fingerprint: str) -> float:
    from peft import get_peft_model_state_dict

    state: Mapping[str, Tensor] = get_peft_model_state_dict(student.model)
    settings: Any = student.model.peft_config["default"]
    description = {
        "peft_type": "LORA",
        "dmtd_adapter": "lora",
        "base_fingerprint": fingerprint,
        "r": settings.r,
        "lora_alpha": settings.lora_alpha,
        "target_modules": sorted(settings.target_modules),
        "layers_to_transform": list(settings.layers_to_transform),
        "layers_pattern": settings.layers_pattern,
        "bias": "none",
        **with_dmtd_fields({}, spec, checkpoint.config.family),
    }
    write_adapter(output, description, {name: value.float().cpu().numpy() for name, value in state.items()})
    return 0.0


def _save_shards(output: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """One file, or several with an index where they come to more than 4 GB; written beside their place first."""
    shards: list[Path] = []
    places: dict[str, int] = {}
    part: dict[str, Tensor] = {}
    size = total = 0
    try:
        for name, tensor in tensors:
            if part and size + tensor.nbytes > _SHARD_BYTES:
                shards.append(_save_part(output, len(shards), part))
                part, size = {}, 0
            part[name] = tensor
            places[name] = len(shards)
            size += tensor.nbytes
            total += tensor.nbytes
        shards.append(_save_part(output, len(shards), part))
    except BaseException:
        for shard in shards:
            shard.unlink(missing_ok=True)
        raise
    (output / "config.json").unlink(missing_ok=True)  # an older one does not belong to these weights
    if len(shards) == 1:
        shards[0].replace(output / "model.safetensors")
        return
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for shard, name in zip(shards, names, strict=True):
        shard.replace(output / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[i] for name, i in places.items()}}
    write_json(output / "model.safetensors.index.json", index)


def _save_part(output: Path, number: int, part: dict[str, Tensor]) -> Path:
    file = output / f".part-{number}.safetensors"
    with replacing(file) as place:
        save_file({name: value.contiguous() for name, value in part.items()}, place, metadata={"format": "pt"})
    return file
