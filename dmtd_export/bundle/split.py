"""The split and convention in its two forms: the model package's ``DmtdSpec`` and the manifest's ``CycleInfo``. No torch."""

from __future__ import annotations

from dmtd_models.config.model import DmtdSpec
from dmtd_runtime.bundle.manifest import CycleInfo


def cycle_of(spec: DmtdSpec) -> CycleInfo:
    """As a manifest has it."""
    return CycleInfo(
        encoding_layers=spec.encoding_layers,
        thinking_layers=spec.thinking_layers,
        decoding_layers=spec.decoding_layers,
        cycle_length=spec.cycle_length,
        cycle_origin=spec.cycle_origin,
        prompt_input=spec.prompt_input,
        dmtd_trained=spec.trained,
    )


def spec_of(cycle: CycleInfo) -> DmtdSpec:
    """As the model package has it; a manifest always records its convention."""
    return DmtdSpec(
        encoding_layers=cycle.encoding_layers,
        thinking_layers=cycle.thinking_layers,
        decoding_layers=cycle.decoding_layers,
        cycle_length=cycle.cycle_length,
        cycle_origin=cycle.cycle_origin,
        prompt_input=cycle.prompt_input,
        trained=cycle.dmtd_trained,
        convention_recorded=True,
    )
