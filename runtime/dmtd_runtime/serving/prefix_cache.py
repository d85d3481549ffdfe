"""Keys and values of earlier prompts in host memory, found again by their tokens: ``PrefixCache``.

A tree of blocks: each node is ``BLOCK_ROWS`` tokens behind those of its parent, so a path from a root is a prefix, spelled out
token by token; nothing is found by a hash alone. A root is a salt: who gives one shares with the same salt alone. The cache
belongs to one open backend, so bundle, convention and mode are the same for all that is in it.

Which rows may be kept is a matter of gates (``CyclePlan.lasting_rows``); here rows are rows.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

logger = logging.getLogger("dmtd.serving")

BLOCK_ROWS = 16


class _Node:
    """One block, below its parent; a root has neither tokens nor values."""

    __slots__ = ("children", "parent", "tokens", "values")

    def __init__(self, parent: _Node | None = None, tokens: bytes = b"", values: Array | None = None) -> None:
        self.parent, self.tokens, self.values = parent, tokens, values
        self.children: dict[bytes, _Node] = {}


class PrefixCache:
    """At most ``max_bytes`` of blocks; the least recently used go first. Not thread-safe: its worker's alone."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._roots: dict[str | None, _Node] = {}
        # Oldest first. Who is touched is touched before its parent, so the oldest has no children.
        self._blocks: OrderedDict[_Node, None] = OrderedDict()
        self.num_bytes = 0

    def match(self, ids: Sequence[int], salt: str | None) -> list[Array]:
        """The longest kept prefix of a prompt, but never all of it: the last token is always computed.

        Returns:
            Values as :meth:`add` read them, [..., BLOCK_ROWS, head_dim], for rows from 0, BLOCK_ROWS, 2 * BLOCK_ROWS, ... on.
        """
        path = self._known(_blocks_of(ids[: len(ids) - 1]), salt) if self._blocks else []
        self._touch(path)
        return [node.values for node in path if node.values is not None]

    def add(self, ids: Sequence[int], salt: str | None, read: Callable[[range], list[Array]]) -> None:
        """Keep the rows of ``ids``, as far as they fill blocks.

        Args:
            ids: tokens whose rows are committed.
            salt: as in :meth:`match`.
            read: the values of a range of rows, ``rows.step`` at a time, as copies [..., rows.step, head_dim].
        """
        blocks = _blocks_of(ids) if self._max_bytes else []
        path = self._known(blocks, salt)
        try:
            if len(path) < len(blocks):
                copies = read(range(len(path) * BLOCK_ROWS, len(blocks) * BLOCK_ROWS, BLOCK_ROWS))
                for tokens, part in zip(blocks[len(path) :], copies, strict=True):
                    parent = path[-1] if path else self._roots.setdefault(salt, _Node())
                    node = _Node(parent, tokens, part)
                    parent.children[tokens] = node
                    path.append(node)
                    self.num_bytes += part.nbytes
        except MemoryError:
            logger.warning("no memory left for the prefix cache: it keeps the %d bytes it has", self.num_bytes)
        self._touch(path)
        while self.num_bytes > self._max_bytes:
            self._drop(self._blocks.popitem(last=False)[0])

    def _known(self, blocks: Sequence[bytes], salt: str | None) -> list[_Node]:
        path: list[_Node] = []
        node = self._roots.get(salt)
        for tokens in blocks:
            node = node.children.get(tokens) if node else None
            if node is None:
                break
            path.append(node)
        return path

    def _touch(self, path: Sequence[_Node]) -> None:
        for node in reversed(path):
            self._blocks[node] = None
            self._blocks.move_to_end(node)

    def _drop(self, node: _Node) -> None:
        assert node.parent is not None and node.values is not None and not node.children, "the oldest is a leaf"
        del node.parent.children[node.tokens]
        self.num_bytes -= node.values.nbytes
        if node.parent.parent is None and not node.parent.children:  # a root that nothing is below
            self._roots = {salt: root for salt, root in self._roots.items() if root is not node.parent}


def _blocks_of(ids: Sequence[int]) -> list[bytes]:
    """The full blocks of a list of tokens."""
    return [
        np.asarray(ids[first : first + BLOCK_ROWS], np.int64).tobytes()
        for first in range(0, len(ids) - BLOCK_ROWS + 1, BLOCK_ROWS)
    ]
