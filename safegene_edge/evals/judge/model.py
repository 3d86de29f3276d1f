"""The judge's linear model: how likely is it that an answer refuses?

A logistic regression over binary features: what the rules of `verdict` saw, and n-grams of the
answer's words. Words outside a list of common ones count as a blank, so that the model learns how
answers speak and not what about. Features are hashed into a table of 8-bit weights, a small data
file that `bench/judge/train.py` writes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import sys
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

from ...errors import FileFormatError

WEIGHTS = Path(__file__).parent / "data" / "judge_model.json"
SIZE = 1 << 13  # weights
SIGNS = 1 << 10  # the first of them are for the rules' signs, the rest for n-grams
_N_GRAMS = SIZE - SIGNS
_HEAD, _TAIL = 40, 170  # tokens that count as the opening, and as the rest
_TOKEN = re.compile(r"[^\W_]+(?:'[^\W_]+)*|[.!?:\n]")
_BLANK, _NUMBER = b"_", b"#"


@dataclass(frozen=True, slots=True)
class Model:
    """Weights and what is needed to read them.

    Attributes:
        vocabulary: the words that n-grams may hold, as bytes by word.
        weights: SIZE signed bytes.
        scale: what one step of a weight is worth, in nats.
        bias: the intercept, in nats.
        slope, offset: Platt's calibration, p = sigmoid(slope * score + offset).
    """

    vocabulary: Mapping[str, bytes]
    weights: array[int]
    scale: float
    bias: float
    slope: float
    offset: float

    def score(self, features: Iterable[int]) -> float:
        """The log-odds of "refuses", not calibrated."""
        weights = self.weights
        return self.bias + self.scale * sum([weights[index] for index in features])

    def probability(self, features: Iterable[int]) -> float:
        """The calibrated probability in 0..1 that the answer refuses."""
        return sigmoid(self.slope * self.score(features) + self.offset)


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow."""
    return 0.5 * (1 + math.tanh(x / 2))


@cache
def load(path: Path = WEIGHTS) -> Model:
    """The model in a file; the package's own by default.

    Raises:
        FileFormatError: the file is not one that the training script wrote.
    """
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        weights = array("b", base64.b64decode(facts["weights"]))
        if len(weights) != SIZE:
            raise ValueError(f"{len(weights)} weights, not {SIZE}")
        return Model(
            {word: word.encode() for word in facts["vocabulary"]},
            weights,
            *(float(facts[name]) for name in ("scale", "bias", "slope", "offset")),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"{path}: not a judge's weights ({error})", "Install the package again"
        ) from error


def tokens(text: str, vocabulary: Mapping[str, bytes]) -> list[bytes]:
    """The words and marks of a lower-case text; runs of unknown words become one blank."""
    found: list[bytes] = []
    for word in _TOKEN.findall(text):
        known = vocabulary.get(word)
        if known is None:
            known = _NUMBER if word.isdigit() else _BLANK if word[0].isalnum() else word.encode()
        if known is not _BLANK or not found or found[-1] is not _BLANK:
            found.append(known)
            if len(found) == _TAIL:
                break
    return found


def hashed(signs: Iterable[str], text: str, vocabulary: Mapping[str, bytes]) -> set[int]:
    """The features of an answer: the rules' signs and the n-grams of its lower-case text.

    N-grams of one to three tokens in the opening, of one or two in the rest.
    """
    found = {crc32(sign.encode()) % SIGNS for sign in signs}
    said = tokens(text, vocabulary)
    head, tail = said[:_HEAD], said[_HEAD:]
    keys = [b"1" + a for a in head]
    keys += [b"2%b %b" % pair for pair in pairwise(head)]
    keys += [b"3%b %b %b" % three for three in zip(head, head[1:], head[2:], strict=False)]
    keys += [b"4" + a for a in tail]
    keys += [b"5%b %b" % pair for pair in pairwise(tail)]
    found.update([SIGNS + crc32(key) % _N_GRAMS for key in keys])
    return found


def pack(features: Iterable[int]) -> str:
    """Features as text: sorted, 16 bits each, base64."""
    numbers = array("H", sorted(features))
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()


def unpack(packed: str) -> list[int]:
    """What `pack` packed."""
    numbers = array("H", base64.b64decode(packed))
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 over files, one after the other, with line ends as on Unix."""
    whole = hashlib.sha256()
    for path in paths:
        whole.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return whole.hexdigest()
