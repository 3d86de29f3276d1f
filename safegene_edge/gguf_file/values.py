"""GGUF's metadata values as bytes, in the type that the file had or in one that holds them.

The types' numbers and layouts are of ggml/include/gguf.h.
"""

from __future__ import annotations

import math
import struct
from typing import TypeAlias

from ..errors import SettingError

Scalar: TypeAlias = bool | int | float | str
Value: TypeAlias = Scalar | list[str] | list[float] | list[int]

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
UINT64, INT64, FLOAT64 = 10, 11, 12
FORMATS: dict[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", UINT32: "I", INT32: "i", FLOAT32: "f", BOOL: "?",
    UINT64: "Q", INT64: "q", FLOAT64: "d",
}  # fmt: skip
_FLOAT32_END = 3.4028235677973366e38  # rounds to infinity from here


def pack_string(text: str) -> bytes:
    """A string with its length before it."""
    encoded = text.encode("utf-8", "replace")  # a lone surrogate, from an argument, has no UTF-8
    return struct.pack("<Q", len(encoded)) + encoded


def pack_value(value: Value, kind: int | None = None) -> bytes:
    """A value behind its type's number.

    Args:
        kind: the type, of a list its elements'; where it is None or cannot hold the value, one
            is chosen: uint32 (in lists int32), float32, and the wider ones where these are too
            small.

    Raises:
        SettingError: no type holds all of it.
    """
    items: list[Scalar] = [*value] if isinstance(value, (list, tuple)) else [value]
    if kind is None or not _holds(kind, items):
        kind = _chosen(items, UINT32 if items == [value] else INT32)
    if kind == STRING:
        body = b"".join(pack_string(str(item)) for item in items)
    else:
        body = struct.pack(f"<{len(items)}{FORMATS[kind]}", *items)
    if isinstance(value, (list, tuple)):
        return struct.pack("<IIQ", ARRAY, kind, len(items)) + body
    return struct.pack("<I", kind) + body


def _chosen(items: list[Scalar], narrow: int) -> int:
    for kind in (STRING, BOOL, narrow, INT64, UINT64, FLOAT32, FLOAT64):
        if items and _holds(kind, items):
            return kind
    if items:
        raise SettingError(f"no type of GGUF's metadata holds {items[0]!r} and what is with it")
    return FLOAT32


def _holds(kind: int, items: list[Scalar]) -> bool:
    if kind in (STRING, BOOL):
        wanted = str if kind == STRING else bool
        return all(isinstance(item, wanted) for item in items)
    numbers = [x for x in items if isinstance(x, (int, float)) and not isinstance(x, bool)]
    if len(numbers) < len(items) or kind not in FORMATS:
        return False
    if kind in (FLOAT32, FLOAT64):
        end = _FLOAT32_END if kind == FLOAT32 else math.inf
        exact = (isinstance(x, float) or abs(x) <= 1 << 53 for x in numbers)
        return all(exact) and all(abs(x) < end or not math.isfinite(x) for x in numbers)
    bits = 8 * struct.calcsize(f"<{FORMATS[kind]}")
    low, high = (0, 1 << bits) if FORMATS[kind].isupper() else (-1 << bits - 1, 1 << bits - 1)
    return all(isinstance(x, int) and low <= x < high for x in numbers)
