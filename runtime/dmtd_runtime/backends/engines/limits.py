"""What engines were built for, held against what is asked of them."""

from __future__ import annotations

from collections.abc import Sequence

from dmtd_runtime.backends.base import BackendOptions, SlotStep
from dmtd_runtime.bundle.engine_record import EngineRecord
from dmtd_runtime.errors import RequestError


def visible_rows(steps: Sequence[SlotStep], committed: Sequence[int], rows: int) -> int:
    """Cache rows that a run writes or sees at most, padding and idle slots included."""
    first = list(committed)
    for s in steps:
        first[s.slot] = s.step.late.start  # T's window starts earlier, and has no more rows behind it
    return max(first) + rows


def check_limits(options: BackendOptions, record: EngineRecord) -> None:
    limits = (
        ("max_num_seqs", options.max_num_seqs, record.max_num_seqs, "--max-num-seqs"),
        ("max_model_len", options.max_model_len, record.max_model_len, "--max-model-len"),
    )
    for name, value, most, option in limits:
        if value is not None and not 1 <= value <= most:
            raise RequestError(
                f"got {value}, expected 1 to {most}, what the engines were built for; "
                f"for more, build them with: dmtd build BUNDLE {option} {value}",
                param=name,
            )
