"""The model that a fine-tune says it was made from, looked for in a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..compat import open_model
from ..errors import FileFormatError, MismatchError
from ..files import PathLike
from ..gguf_file import GGUFFile

Model = PathLike | Sequence[PathLike]
_KEY = re.compile(r"general\.base_model\.\d+\.(name|repo_url)")


def files_of(model: Model | None, target: PathLike | None = None) -> list[PathLike]:
    """A model as a file and the adapters that it is run with; [] for None.

    A folder stands for the GGUF in it that `target` names as its base.
    """
    if model is None:
        return []
    if not isinstance(model, (str, os.PathLike)):
        return list(model)
    if target is not None and Path(model).is_dir():
        return [find_base(open_model(target), Path(model))]
    return [model]


def find_base(target: GGUFFile, folder: Path) -> Path:
    """The GGUF in a folder whose name the target's `general.base_model` keys give.

    Of several, the one that is quantised like the target, else the largest.

    Raises:
        MismatchError: the target names no base, or none of these files is it.
    """
    named = {_plain(str(value)) for key, value in target.metadata.items() if _KEY.fullmatch(key)}
    if not named:
        raise MismatchError(
            f"{target.path}: does not say what it was made from (general.base_model.*)",
            "Give the aligned model's own file (--aligned)",
        )
    found, seen = [], []
    for path in sorted(folder.rglob("*.gguf")):
        try:
            file = GGUFFile(path)
        except FileFormatError:
            continue
        if file.metadata.get("general.type", "model") != "model" or path.samefile(target.path):
            continue
        names = {
            _plain(str(file.metadata.get(f"general.{key}", ""))) for key in ("name", "repo_url")
        }
        seen.append(str(file.metadata.get("general.name", path.name)))
        if names & named:
            found.append(file)
    if not found:
        raise MismatchError(
            f"{folder}: none of its {len(seen)} models is {' or '.join(sorted(named))}, which "
            f"{target.path} was made from",
            "Give the aligned model's own file (--aligned)",
        )
    kind = target.metadata.get("general.file_type")
    found.sort(key=lambda file: (file.metadata.get("general.file_type") != kind,
                                 -file.path.stat().st_size))  # fmt: skip
    return found[0].path


def _plain(name: str) -> str:
    """A name however it is written; of an address the last part."""
    return re.sub(r"[\W_]+", " ", name.rstrip("/").rpartition("/")[2]).strip().lower()
