"""The integer codes of ggml's uniform quantisations: where they lie, and the grid they stand on.

A block holds scales and, for every weight, a code q; the weight is  step·q + offset  with step
and offset from the block's scales (ggml/src/ggml-common.h). Changing codes alone keeps the
scales, and with them every other weight, as it was. Tables say where a code's bits lie;
the steps are read off ggml's own dequantisation, so that no scale is decoded here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ..aliases import Bytes, Floats
from ..gguf_file import kernels

Codes = npt.NDArray[np.int16]


@dataclass(frozen=True, slots=True)
class _Part:
    """Some bits of the codes of a block: of `elements`, in `bytes_`, all at one shift."""

    elements: npt.NDArray[np.intp]
    bytes_: npt.NDArray[np.intp]
    shift: int  # of the bits in their byte
    bits: int
    low: int  # of the bits in the code


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the codes of one type lie.

    Attributes:
        block: weights a block; n_bytes: bytes a block.
        parts: the codes' bits.
        lowest, highest: the codes that ggml itself would write.
        flip: what a stored code is XORed with, to count up from 0.
    """

    block: int
    n_bytes: int
    parts: tuple[_Part, ...]
    lowest: int
    highest: int
    flip: int = 0

    def unpack(self, raw: Bytes) -> Codes:
        """Codes (rows×columns) of quantised rows (rows×bytes a row)."""
        blocks = raw.reshape(-1, self.n_bytes)
        codes = np.zeros((len(blocks), self.block), np.int16)
        for part in self.parts:
            bits = (blocks[:, part.bytes_] >> part.shift) & ((1 << part.bits) - 1)
            codes[:, part.elements] |= bits.astype(np.int16) << part.low
        return (codes ^ self.flip).reshape(len(raw), -1)

    def pack(self, raw: Bytes, codes: Codes) -> Bytes:
        """The rows with other codes, and the scales that they had."""
        blocks = raw.reshape(-1, self.n_bytes).copy()
        stored = (codes ^ self.flip).reshape(-1, self.block)
        for part in self.parts:
            mask = (1 << part.bits) - 1
            bits = ((stored[:, part.elements] >> part.low) & mask).astype(np.uint8) << part.shift
            kept = blocks[:, part.bytes_] & np.uint8(0xFF & ~(mask << part.shift))
            blocks[:, part.bytes_] = kept | bits
        packed: Bytes = blocks.reshape(raw.shape)
        return packed

    def steps(self, raw: Bytes, ggml_type: int, columns: int) -> Floats:
        """By how much a weight grows with its code (rows×columns); may be negative or 0."""
        shape = len(raw), columns
        blocks = raw.reshape(-1, self.n_bytes) & ~self._pattern((1 << 8) - 1)
        ends = [
            kernels.dequantise(blocks | self._pattern(code ^ self.flip), ggml_type, shape)
            for code in (self.lowest, self.highest)
        ]
        ends[1] -= ends[0]
        ends[1] /= np.float32(self.highest - self.lowest)
        return ends[1]

    def _pattern(self, stored: int) -> Bytes:
        """The bytes of a block whose codes are all stored as this number; the scales are 0."""
        block = np.zeros(self.n_bytes, np.uint8)
        for part in self.parts:
            bits = (stored >> part.low) & ((1 << part.bits) - 1)
            np.bitwise_or.at(block, part.bytes_, np.uint8(bits << part.shift))
        return block


def _part(block: int, place: object, shift: object, bits: int, low: int) -> list[_Part]:
    """Parts of one shift each, from the byte and the shift of every element."""
    elements = np.arange(block)
    bytes_ = np.broadcast_to(np.asarray(place), (block,)).astype(np.intp)
    shifts = np.broadcast_to(np.asarray(shift), (block,))
    return [
        _Part(elements[shifts == s], bytes_[shifts == s], int(s), bits, low)
        for s in np.unique(shifts)
    ]


@lru_cache
def layouts() -> dict[str, Layout]:
    """Layouts by type name; types that are not here have no uniform grid."""
    e = np.arange(32)
    nibble, high = e % 16, 4 * (e // 16)
    k = np.arange(256)
    half, quarter, lane = k // 128, k % 128 // 32, k % 32
    pair, upper = k // 64, k % 64 // 32

    def made(block: int, n_bytes: int, *parts: list[_Part], lowest: int = 0,
             highest: int, flip: int = 0) -> Layout:  # fmt: skip
        flat = tuple(part for group in parts for part in group)
        return Layout(block, n_bytes, flat, lowest, highest, flip)

    return {
        "Q4_0": made(32, 18, _part(32, 2 + nibble, high, 4, 0), highest=15),
        "Q4_1": made(32, 20, _part(32, 4 + nibble, high, 4, 0), highest=15),
        "Q5_0": made(32, 22, _part(32, 6 + nibble, high, 4, 0),
                     _part(32, 2 + e // 8, e % 8, 1, 4), highest=31),
        "Q5_1": made(32, 24, _part(32, 8 + nibble, high, 4, 0),
                     _part(32, 4 + e // 8, e % 8, 1, 4), highest=31),
        # Signed bytes; ggml never writes -128, and its kernels count on that.
        "Q8_0": made(32, 34, _part(32, 2 + e, 0, 8, 0), lowest=1, highest=255, flip=0x80),
        "Q2_K": made(256, 84, _part(256, 16 + 32 * half + lane, 2 * quarter, 2, 0), highest=3),
        "Q3_K": made(256, 110, _part(256, 32 + 32 * half + lane, 2 * quarter, 2, 0),
                     _part(256, lane, 4 * half + quarter, 1, 2), highest=7),
        "Q4_K": made(256, 144, _part(256, 16 + 32 * pair + lane, 4 * upper, 4, 0), highest=15),
        "Q5_K": made(256, 176, _part(256, 48 + 32 * pair + lane, 4 * upper, 4, 0),
                     _part(256, 16 + lane, 2 * pair + upper, 1, 4), highest=31),
        "Q6_K": made(256, 210,
                     _part(256, 64 * half + 32 * (quarter % 2) + lane, 4 * (quarter // 2), 4, 0),
                     _part(256, 128 + 32 * half + lane, 2 * quarter, 2, 4), highest=63),
    }  # fmt: skip
