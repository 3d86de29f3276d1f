"""Seeded mutations of a binary file's header: what a hostile or damaged file may hold."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator

_NUMBERS = (0, 1, 2, 3, 8, 9, 12, 13, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
_WIDE = (*_NUMBERS, 1 << 40, (1 << 61) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_FLOATS = (float("nan"), float("inf"), float("-inf"), -1.0, 0.5, 3e38, 1e-45)
Mutation = Callable[[bytearray, int, random.Random], None]


def _bit(data: bytearray, at: int, chance: random.Random) -> None:
    data[at] ^= 1 << chance.randrange(8)


def _byte(data: bytearray, at: int, chance: random.Random) -> None:
    data[at] = chance.choice((0, 1, 127, 128, 254, 255, chance.randrange(256)))


def _number(data: bytearray, at: int, chance: random.Random) -> None:
    data[at : at + 4] = struct.pack("<I", chance.choice(_NUMBERS))


def _wide(data: bytearray, at: int, chance: random.Random) -> None:
    data[at : at + 8] = struct.pack("<Q", chance.choice(_WIDE))


def _float(data: bytearray, at: int, chance: random.Random) -> None:
    data[at : at + 4] = struct.pack("<f", chance.choice(_FLOATS))


def _double(data: bytearray, at: int, chance: random.Random) -> None:
    data[at : at + 8] = struct.pack("<d", chance.choice((*_FLOATS, 1e300)))


def _drop(data: bytearray, at: int, chance: random.Random) -> None:
    del data[at : at + chance.randrange(1, 40)]


def _insert(data: bytearray, at: int, chance: random.Random) -> None:
    data[at:at] = chance.randbytes(chance.randrange(1, 40))


def _repeat(data: bytearray, at: int, chance: random.Random) -> None:
    data[at:at] = data[at : at + chance.randrange(1, 200)]


def _cut(data: bytearray, at: int, chance: random.Random) -> None:
    del data[at:]


KINDS: tuple[Mutation, ...] = (
    _bit, _byte, _number, _wide, _float, _double, _drop, _insert, _repeat, _cut
)  # fmt: skip


def mutations(data: bytes, end: int, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """So many changed copies, each with the name of what was done.

    Args:
        end: changes begin before this byte: where the header ends.
    """
    chance = random.Random(seed)
    for number in range(count):
        changed, done = bytearray(data), []
        for _ in range(chance.choice((1, 1, 1, 2, 4))):
            if len(changed) < 16:
                break  # cut off already
            mutate = chance.choice(KINDS)
            at = chance.randrange(min(end, len(changed) - 8))
            mutate(changed, at, chance)
            done.append(f"{mutate.__name__[1:]} at {at}")
        yield f"{number}: {', '.join(done)}", bytes(changed)
