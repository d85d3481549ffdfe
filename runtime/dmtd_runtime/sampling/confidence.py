"""How sure a model is of its next token: what decides whether a sequence stays in its cycle.

Confidence is the model's own probability of its likeliest token: softmax of the logits as they came in, before any option. It
does not ask which token an option, a form or chance then takes: a step is kept or taken back before anything is drawn, so what
is drawn comes from the whole distribution of the pass that was kept. Were it the drawn token's probability, the unlikely ones
that a temperature allows would be drawn and dropped, and texts would be duller than their temperature.

One number makes two bounds. Below it a choice stays and its cycle ends, which costs a full pass sooner; ``DROP_BELOW`` under it
a full pass chooses in its place, which costs the late step besides. The first alone is the better bargain, with the second the
dial goes further: of drawn pairs of bounds these were the best at every speed (SmolLM2-135M with its adapter of tau 4).
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from dmtd_runtime.sampling.sampler import Logits

ALWAYS = 1.0
"""A wanted confidence that no late step reaches: every position is a head."""

DROP_BELOW = 0.4
"""How far under the wanted confidence a choice is dropped."""

Verdict = Literal["keep", "leave", "drop"]
"""On a late step's choice: it stays, in its cycle; it stays, and the next position is a head; a full pass chooses instead."""


def confidence(logits: Logits) -> float:
    """The probability of the likeliest token, of float32 logits [vocab]; NaN where they are not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        return float(1 / np.exp(logits - logits.max()).sum(dtype=np.float64))


def verdict(found: float, wanted: float) -> Verdict:
    """What becomes of a late step that is so sure, where so much is wanted; NaN is kept, an error that who chooses tells."""
    if found < wanted - DROP_BELOW:
        return "drop"
    return "leave" if found < wanted else "keep"
