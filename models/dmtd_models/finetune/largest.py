"""The likeliest tokens of many rows of logits, several times as fast on a CPU as ``torch.topk`` over a large vocabulary."""

from __future__ import annotations

from torch import Tensor


def largest(logits: Tensor, count: int, *, block: int = 16) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of each row in float32, sorted, and where: exact, by the blocks with the largest maxima."""
    rows, vocab = logits.shape
    columns = vocab // block
    if vocab % block or columns < count:
        plain = logits.topk(count)
        return plain.values.float(), plain.indices
    grid = logits.view(rows, block, columns)
    best = grid.amax(1).topk(count, sorted=False).indices
    candidates = grid.gather(2, best[:, None].expand(-1, block, -1)).reshape(rows, -1).float()
    values, places = candidates.topk(count)
    tokens = places // count * columns + best.gather(1, places % count)
    return values, tokens
