"""One form for every format of quantised matrices: codes in blocks along the inputs, a scale and maybe a minimum a block.

GGUF's blocks, GPTQ, AWQ and our own rounding all become a ``BlockWeight``; the exporter makes graphs of it and knows no
format by name. No torch, no file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]

BLOCK_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWeight:
    """A matrix [rows = outputs, cols = inputs] whose rows are cut into blocks of ``block`` inputs.

    Without minimums a value is ``scale * (code - middle)`` with ``middle = 2 ** (bits - 1)``; with them
    ``scale * code + minimum``; with factors ``scale * (code - middle) * factor``. All are float32, operation by operation, so
    the values are the format's own. Codes may be the bytes of 8-bit floats instead (``float8``): a row is one block then, and a
    value ``scale * code``.

    Args:
        codes: uint8 [rows, cols], unpacked, 0 to 2 ** bits - 1.
        bits: 4 or 8, what a code is packed into; 5 and 6 bits stand in 8.
        block: inputs that share a scale; divides cols. With factors all of them.
        scales: float32 [rows, cols / block].
        minimums: float32 [rows, cols / block]; None for values symmetric about the middle code.
        factors: float32 [cols], one for each input; None for none. Only of 8 bits without minimums.
        levels: with minimums, how many codes the format has (codes are below it); 2 ** bits if it uses all.
        source: the format that it came from, as users know it ("Q4_1", "gptq", "rtn").
        float8: codes are of the type float8_e4m3fn.
    """

    codes: Codes
    bits: int
    block: int
    scales: Float32
    minimums: Float32 | None = None
    factors: Float32 | None = None
    levels: int = 0
    source: str
    float8: bool = False

    def __post_init__(self) -> None:
        assert self.bits in (4, 8), f"codes are packed into 4 or 8 bits, not {self.bits}"
        if self.factors is None:
            assert self.float8 or self.block in BLOCK_SIZES, f"blocks hold {BLOCK_SIZES} inputs, not {self.block}"
        else:
            assert self.bits == 8 and self.minimums is None, "factors are of 8 bits without minimums"
            assert self.factors.shape == (self.block,) and self.factors.dtype == np.float32, "one float32 an input"
        assert self.codes.ndim == 2 and self.codes.dtype == np.uint8, "codes are a matrix of bytes"
        assert self.codes.shape[1] % self.block == 0, (
            f"{self.codes.shape[1]} inputs are no whole blocks of {self.block}"
        )
        for per_block in (self.scales, self.minimums):
            if per_block is not None:
                assert per_block.shape == self.blocks_shape and per_block.dtype == np.float32, "one float32 a block"
        if not self.levels:
            object.__setattr__(self, "levels", 1 << self.bits)

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, cols] of the matrix."""
        rows, cols = self.codes.shape
        return rows, cols

    @property
    def blocks_shape(self) -> tuple[int, int]:
        """[rows, cols / block] of scales and minimums."""
        rows, cols = self.codes.shape
        return rows, cols // self.block

    def dequantised(self) -> Float32:
        """The values, float32 [rows, cols]."""
        if self.float8:
            import ml_dtypes  # which the readers of checkpoints bring along, and this module is read without them

            return self.codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * self.scales
        codes = self.codes.reshape(*self.blocks_shape, self.block).astype(np.float32)
        if self.minimums is None:
            codes -= np.float32(1 << self.bits - 1)
        codes *= self.scales[:, :, None]
        if self.minimums is not None:
            codes += self.minimums[:, :, None]
        if self.factors is not None:
            codes *= self.factors
        return codes.reshape(self.shape)

    def centred(self) -> tuple[Codes, Float32 | None]:
        """The form of kernels with a fixed zero point: ``scale * (code - middle) + offset``.

        Returns:
            Codes uint8 [rows, cols], moved so that the format's middle stands on the container's, and offsets float32
            [rows, cols / block]: None for a symmetric weight. Codes that fill a part of their container are moved to
            its middle, for an offset far from the values' own would cost the sum its digits.
        """
        if self.minimums is None:
            return self.codes, None
        half = self.levels // 2
        codes = self.codes + np.uint8((1 << self.bits - 1) - half)
        with np.errstate(invalid="ignore"):  # of a damaged checkpoint, which is told where values are stored
            return codes, self.minimums + np.float32(half) * self.scales

    @property
    def has_zero_points(self) -> bool:
        """Whether minimums are zero points: in 4 bits, minus a scale times a whole number that is a code of the container."""
        if self.bits != 4 or self.minimums is None:
            return False
        with np.errstate(all="ignore"):  # what is not finite has none
            zeros = np.rint(-self.minimums / np.where(self.scales == 0, np.float32(1), self.scales))
            codes = zeros + ((1 << self.bits - 1) - self.levels // 2)  # beside codes moved to the container's middle
            whole = -self.scales * zeros == self.minimums
            return bool((whole & (codes >= 0) & (codes < 1 << self.bits)).all())

    def rearranged(self, order: Callable[[npt.NDArray[np.generic]], npt.NDArray[np.generic]]) -> BlockWeight:
        """The same rows in another order: ``order`` moves rows (axis 0) of any array with as many."""
        minimums = None if self.minimums is None else np.ascontiguousarray(order(self.minimums), dtype=np.float32)
        return replace(
            self,
            codes=np.ascontiguousarray(order(self.codes), dtype=np.uint8),
            scales=np.ascontiguousarray(order(self.scales), dtype=np.float32),
            minimums=minimums,
        )
