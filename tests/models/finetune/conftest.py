"""No measurement of the machine's peak in runs of a few milliseconds."""

import pytest


@pytest.fixture(autouse=True)
def _no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmtd_models.finetune.run.matmul_peak", lambda dtype, device: 1e12)
