"""What a gene's file says of the gene besides its tensors, read and checked.

Every function raises FileFormatError where a value cannot be what it stands for.
"""

from __future__ import annotations

from .errors import FileFormatError
from .expression import wrong_coefficient
from .gguf_file import GGUFFile

OUTSIDE_BLOCKS = -1  # the layer number of tensors that belong to no block, such as the output


def keyed(file: GGUFFile, key: str, values: list[str]) -> dict[str, str]:
    """The names under a key, each with the value in its place."""
    names = file.strings(key)
    if len(names) != len(values):
        raise FileFormatError(f"{file.path}: {key} has {len(names)} names for {len(values)} values")
    if len(set(names)) < len(names):
        raise FileFormatError(f"{file.path}: {key} has a name twice")
    return dict(zip(names, values, strict=True))


def share(file: GGUFFile, name: str) -> float:
    """A number from 0 to 1; 0 where there is none."""
    value = float(file.number(f"safegene.{name}", 0.0))
    if not 0 <= value <= 1:
        raise FileFormatError(
            f"{file.path}: safegene.{name} is {value:g}, and a share is 0 to 1",
            "Extract the gene again: before its release this was in nats",
        )
    return value


def not_negative(file: GGUFFile, key: str) -> float:
    """A number from 0 on; 0 where there is none."""
    value = float(file.number(key, 0.0))
    if value < 0:
        raise FileFormatError(f"{file.path}: {key} is {value:g}, and it cannot be")
    return value


def given(file: GGUFFile, key: str) -> float | None:
    """A number; None where there is none."""
    return float(file.number(key, 0.0)) if key in file.metadata else None


def by_layer(file: GGUFFile, key: str) -> dict[int, float]:
    """A layer to its number, from two lists in one order."""
    layers, values = file.numbers(f"{key}.layers"), file.numbers(key)
    if len(layers) != len(values):
        raise FileFormatError(
            f"{file.path}: {key} has {len(values)} values for {len(layers)} layers"
        )
    if any(layer < OUTSIDE_BLOCKS or layer != int(layer) for layer in layers):
        raise FileFormatError(f"{file.path}: {key}.layers has a number that is no layer's")
    if len(set(layers)) < len(layers):
        raise FileFormatError(f"{file.path}: {key}.layers has a layer twice")
    return {int(layer): value for layer, value in zip(layers, values, strict=True)}


def coefficients(file: GGUFFile) -> dict[int, float]:
    """The coefficients by layer, finite and not negative."""
    found = by_layer(file, "safegene.coefficients")
    if wrong := wrong_coefficient(found):
        raise FileFormatError(f"{file.path}: {wrong[0]}", wrong[1])
    return found
