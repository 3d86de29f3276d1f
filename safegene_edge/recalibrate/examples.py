"""The prompts that a recalibration looks at."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import resources

from ..errors import FileFormatError, SettingError
from ..files import PathLike, require_file

_KINDS = ("harmful", "harmless", "task")
_MOST = 128  # of a kind: each is read in every pass, and up to nine rows of logits are kept of it


@dataclass(frozen=True)
class Examples:
    """Prompts to calibrate on; no two kinds share one.

    Attributes:
        task: prompts as the model's own job has them; optional. What it answers shall stay, but
            whether it opens with a refusal is not asked.
    """

    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    task: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        seen: dict[str, set[str]] = {}
        for kind in _KINDS:
            plain = [" ".join(text.lower().split()) for text in getattr(self, kind)]
            if not (plain or kind == "task") or not all(plain):
                raise SettingError(
                    f"the {kind} examples are empty", "Give harmful and harmless ones, none blank"
                )
            if len(plain) > _MOST:
                raise SettingError(
                    f"{len(plain)} {kind} examples are too many", f"Give at most {_MOST}"
                )
            if len(set(plain)) < len(plain):
                raise SettingError(
                    f"{len(plain) - len(set(plain))} of {len(plain)} {kind} examples are repeated",
                    "Give each once",
                )
            for other, known in seen.items():
                if shared := known & set(plain):
                    raise SettingError(
                        f"{len(shared)} examples are both {other} and {kind}", "Give each one label"
                    )
            seen[kind] = set(plain)

    @classmethod
    def load(cls, path: PathLike) -> Examples:
        """Read a JSONL of {"prompt", "kind": "harmful", "harmless" or "task"}.

        Task prompts alone are added to the shipped examples.

        Raises:
            FileFormatError: the file is missing, or a line is not such a row.
            SettingError: a kind is missing, or a prompt comes twice.
        """
        found: dict[str, list[str]] = {kind: [] for kind in _KINDS}
        try:
            lines = require_file(path).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise FileFormatError(f"{path}: is not UTF-8 text", "Give a JSONL file") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                found[row["kind"]].append(row["prompt"].strip())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise FileFormatError(
                    f"{path}: line {number} is no example",
                    'A line is {"prompt": "…", "kind": "harmful"}, or "harmless", or "task"',
                ) from error
        if found["task"] and not (found["harmful"] or found["harmless"]):
            return cls.shipped(task=found["task"])
        return cls(*(tuple(found[kind]) for kind in _KINDS))

    @classmethod
    def shipped(cls, task: Iterable[str] = ()) -> Examples:
        """The project's own: 16 harmful ones over all categories, 16 harmless, half borderline.

        None of them is a training prompt: a gene refuses what it has learnt from more readily.

        Args:
            task: prompts of the model's own job, to go with them.
        """
        with resources.as_file(resources.files("safegene_edge") / "data/calibration.jsonl") as file:
            return replace(cls.load(file), task=tuple(task))
