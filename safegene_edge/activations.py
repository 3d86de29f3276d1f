"""Where the inputs of a gene's tensors lie: a few directions that merging must not disturb.

Rounding errors that are spread evenly over a weight's columns are harmless only if activations
are, too. They are not: on SmolLM2 one direction holds two thirds of what attention reads, and the
first token, on which attention rests, holds nearly all of what one feed-forward layer does. An
error that leans on these shifts every answer alike. With C = E[x x^T] over the family's aligned
model, l_i and v_i its largest eigenvalues and their vectors, and r the mean of the other
eigenvalues, a direction is the row sqrt(l_i / r) v_i: for an error e of a row of weights,
|e|^2 + sum_i (direction_i . e)^2 is E[(e . x)^2] / r, with the rest of C taken as even.

Directions are kept in 4 bits. What the coding of one leaves over, the next ones may take up.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .errors import FileFormatError

Floats = npt.NDArray[np.float32]
Directions: TypeAlias = Mapping[str, Floats]  # tensor to k×in
_LEVELS = 7  # 4 bits: twice the directions do more than twice the precision
_MOST, _COLUMNS = 16, 96  # directions an input, and how many columns there are for each of them
_TURNS = 60  # of the power iteration; a vector that is not quite the largest serves as well


def directions_of(inputs: Floats, count: int | None = None) -> Floats:
    """The directions (k×in) of a sample of activations (tokens×in).

    Args:
        count: how many at most; default: one for 96 columns, 16 at most.
    """
    left = inputs.astype(np.float64)
    width = left.shape[1]
    count = max(1, min(_MOST, width // _COLUMNS)) if count is None else count
    rows = []
    for _ in range(min(count, width - 1)):
        along = _principal(left)
        if along is None:
            break
        along = np.rint(along * (_LEVELS / np.abs(along).max()))
        along /= np.linalg.norm(along)
        seen = left @ along
        left -= np.outer(seen, along)
        rows.append(np.linalg.norm(seen) * along)
    rest = np.square(left).sum() / (width - len(rows)) or 1.0
    return np.array(rows, np.float32).reshape(-1, width) / np.float32(np.sqrt(rest))


def _principal(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
    """The direction that most of the rows' energy lies along; None where there is no energy."""
    sizes = np.square(rows).sum(axis=1)
    vector: npt.NDArray[np.float64] = rows[sizes.argmax()]
    for _ in range(_TURNS):
        length = np.linalg.norm(vector)
        if not length > 1e-9:
            return None
        vector = rows.T @ (rows @ (vector / length))
    return vector / np.linalg.norm(vector)


def packed(directions: Directions) -> tuple[list[str], list[str]]:
    """Texts for a GGUF's metadata: names of tensors that share an input, and its directions.

    A text is base 85 of k and the width (uint32), k float32 steps, and k rows of 4-bit integers,
    two a byte, the first one low, 8 standing for 0.
    """
    names: dict[str, list[str]] = {}
    for tensor, rows in directions.items():
        if not len(rows):
            continue
        steps = np.abs(rows).max(axis=1, initial=1e-30) / _LEVELS
        codes = (np.rint(rows / steps[:, None]) + 8).astype(np.uint8).reshape(-1)
        codes = np.append(codes, np.zeros(codes.size % 2, np.uint8))
        head = np.array(rows.shape, "<u4").tobytes() + steps.astype("<f4").tobytes()
        text = base64.b85encode(head + (codes[::2] | codes[1::2] << 4).tobytes()).decode()
        names.setdefault(text, []).append(tensor)
    return [" ".join(group) for group in names.values()], list(names)


def unpacked(names: Sequence[str], texts: Sequence[str], widths: Mapping[str, int]) -> Directions:
    """What `packed` packed, for the tensors of `widths` (tensor to columns).

    Raises:
        FileFormatError: a text is damaged, or of another width.
    """
    found: dict[str, Floats] = {}
    for group, text in zip(names, texts, strict=True):
        wanted = [tensor for tensor in group.split() if tensor in widths]
        if not wanted:
            continue
        rows = _rows(text, f"the activations of '{wanted[0]}'")
        for tensor in wanted:
            if rows.shape[1] != widths[tensor]:
                raise FileFormatError(
                    f"the activations of '{tensor}' have {rows.shape[1]} columns, "
                    f"not {widths[tensor]}"
                )
            found[tensor] = rows
    return found


def _rows(text: str, what: str) -> Floats:
    try:
        raw = base64.b85decode(text)
        count, width = map(int, np.frombuffer(raw, "<u4", 2))
        if not 0 < count * width <= 2 * len(raw):
            raise ValueError(f"it counts {count} rows of {width}")
        steps = np.frombuffer(raw, "<f4", count, 8)
        pairs = np.frombuffer(raw, np.uint8, -(-count * width // 2), 8 + 4 * count)
    except (ValueError, binascii.Error) as error:
        raise FileFormatError(f"{what} are damaged ({error})") from error
    if not np.isfinite(steps).all():
        raise FileFormatError(f"{what} hold a step that is not finite")
    codes = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1)[: count * width]
    whole = codes.astype(np.float32) - 8
    return np.asarray(whole.reshape(count, width) * steps[:, None], np.float32)
