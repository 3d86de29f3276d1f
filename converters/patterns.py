"""PEFT's tables from modules to values: the first key that matches, as a regular expression, wins.

A key comes with a file from the internet, and Python's `re` tries every way in which an expression
can match. So a key with too many ways is refused, and so are keys that together take too long.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from ..errors import FileFormatError

try:
    from re import _constants as _op  # type: ignore[attr-defined]
    from re import _parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_constants as _op
    import sre_parse as _parser

_Value = TypeVar("_Value", int, float)
_Any = TypeVar("_Any")
_PLAIN = re.compile(r"[\w.]+")
_WAYS = 1e7  # of one key to be tried on a name: about a tenth of a second
_LETTERS = 200  # of a module's name at most: GGUF's have 63
_SECONDS = 4.0  # of the processor, for all keys on all modules
_REMEDY = "Write the modules' names out, without repeats in repeats"


class Patterns(Generic[_Value]):
    """A `rank_pattern` or `alpha_pattern`.

    Args:
        values: key to value.
        where: for messages: the file and the table's name.

    Raises:
        FileFormatError: a key is no regular expression, or one that can take for ever.
    """

    def __init__(self, values: Mapping[str, _Value], where: str) -> None:
        self._where, self._left = where, _SECONDS
        self._keys: list[tuple[re.Pattern[str], _Value]] = [
            (self._timed(self._compiled, key), value) for key, value in values.items()
        ]
        self._known: dict[str, _Value | None] = {}

    def _compiled(self, key: str) -> re.Pattern[str]:
        try:
            ways, repeats = (1.0, 0) if _PLAIN.fullmatch(key) else _ways(_parser.parse(key))
            matcher = re.compile(rf"(.*\.)?({key})$")  # as PEFT matches it
        except (re.error, OverflowError, RecursionError) as error:
            raise FileFormatError(
                f"{self._where} has the key {key[:80]!r}, not a regular expression ({error})",
                "Correct it",
            ) from error
        if ways * math.comb(_LETTERS + repeats, repeats) > _WAYS:
            raise FileFormatError(
                f"{self._where} has the key {key[:80]!r}, which can match in too many ways", _REMEDY
            )
        return matcher

    def get(self, module: str, default: _Value) -> _Value:
        """The value of a module, or the default.

        Raises:
            FileFormatError: all calls together took too long, or the name is too long.
        """
        if self._keys and len(module) > _LETTERS:
            raise FileFormatError(f"{self._where}: a module's name has {len(module)} letters")
        if module not in self._known:
            self._known[module] = self._first(module)
        found = self._known[module]
        return default if found is None else found

    def _first(self, module: str) -> _Value | None:
        return next((v for key, v in self._keys if self._timed(key.match, module)), None)

    def _timed(self, do: Callable[[str], _Any], text: str) -> _Any:
        began = time.process_time()
        found = do(text)
        self._left -= time.process_time() - began
        if self._left < 0:
            raise FileFormatError(f"{self._where}: its keys take too long to match", _REMEDY)
        return found


def _ways(parsed: Any) -> tuple[float, int]:
    """In how many ways an expression may be tried: a factor, and how many repeats have no end."""
    factor, repeats = 1.0, 0
    for kind, value in parsed:
        more, ends = _ways_of(kind, value)
        factor, repeats = factor * more, repeats + ends
    return factor, repeats


def _ways_of(kind: Any, value: Any) -> tuple[float, int]:
    if kind is _op.BRANCH:
        found = [_ways(branch) for branch in value[1]]
        return sum(ways for ways, _ in found), max(ends for _, ends in found)
    if kind is _op.SUBPATTERN:
        return _ways(value[-1])
    if kind in (_op.ASSERT, _op.ASSERT_NOT):
        return _ways(value[1])
    if kind in (_op.MAX_REPEAT, _op.MIN_REPEAT):
        return _repeated(*value)
    return (1.0, 0) if kind in _SINGLE else (math.inf, 0)


def _repeated(least: int, most: int, body: Any) -> tuple[float, int]:
    ways, ends = _ways(body)
    if most <= 1:
        return ways + 1, ends
    if ways > 1 or ends:  # each turn may be tried in several ways
        return (math.inf, 0) if most > 4 else (ways**most, ends * most)
    return (1.0, 0) if least == most else (1.0, 1)


_SINGLE = (_op.LITERAL, _op.NOT_LITERAL, _op.IN, _op.ANY, _op.AT, _op.GROUPREF)
