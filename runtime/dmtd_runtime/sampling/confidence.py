"""How sure a model is of its next token: what decides whether a sequence stays in its cycle.

Confidence is the model's own probability of its likeliest token: softmax of the logits as they came in, before any option. It
does not ask which token an option, a form or chance then takes: a step is kept or taken back before anything is drawn, so what
is drawn comes from the whole distribution of the pass that was kept. Were it the drawn token's probability, the unlikely ones
that a temperature allows would be drawn and dropped, and texts would be duller than their temperature.
"""

from __future__ import annotations

import numpy as np

from dmtd_runtime.sampling.sampler import Logits

ALWAYS = 1.0
"""A wanted confidence that no late step reaches: every position is a head."""


def confidence(logits: Logits) -> float:
    """The probability of the likeliest token, of float32 logits [vocab]; NaN where they are not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        return float(1 / np.exp(logits - logits.max()).sum(dtype=np.float64))
