"""Seeded mutations of binary headers and of JSON: what a hostile or damaged file may hold."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

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


_ODD = (
    None, True, -1, 0, 1 << 70, 1e308, float("nan"), float("-inf"), "", " ", "\x00", "\ud800",
    "\u202e", "x" * 3000, [], {}, [[]], {"": None}, "1", "-1", 0.5, ["a", 1],
)  # fmt: skip


def json_mutations(value: Any, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """So many changed copies of JSON, as text: odd values, missing, doubled and deep ones.

    A tenth are changed as text: cut, or a character more or less.
    """
    chance, whole = random.Random(seed), json.dumps(value)
    for number in range(count):
        changed, done = json.loads(whole), []
        for _ in range(chance.choice((1, 1, 2, 3))):
            changed, what = _changed(changed, chance)
            done.append(what)
        text = json.dumps(changed, ensure_ascii=chance.random() < 0.9)
        if number % 10 == 9:
            at = chance.randrange(len(text) + 1)
            text = chance.choice(
                (text[:at], text[:at] + text[at + 1 :], f"{text[:at]},{text[at:]}")
            )
            done.append(f"text at {at}")
        if number % 40 == 39:
            text = text.replace("null", "[" * 100_000, 1) if "null" in text else "[" * 100_000
            done.append("deep")
        yield f"{number}: {', '.join(done)}", text


def _changed(value: Any, chance: random.Random) -> tuple[Any, str]:
    """The value with a change at one place, and what it was."""
    places = list(_places(value, ()))
    path = chance.choice(places)
    if not path:
        return deepcopy(chance.choice(_ODD)), "all"
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    what = chance.randrange(4)
    if what == 0:
        del holder[path[-1]]
    elif what == 1 and isinstance(holder, list):
        holder.append(holder[path[-1]])
    elif what == 1:
        holder[f"{path[-1]} "] = holder.pop(path[-1])
    else:
        holder[path[-1]] = deepcopy(chance.choice(_ODD))
    return value, f"{'.'.join(map(str, path))} ({what})"


def _places(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, (dict, list)):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(one, (*path, key))
