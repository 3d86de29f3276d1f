"""The prompts that a recalibration looks at."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import FileFormatError, SettingError
from ..files import PathLike, require_file
from ..prompts import Prompt, from_record, rows

_KINDS = ("harmful", "harmless", "task")
_SAME = {"borderline": "harmless", "plain": "harmless"}  # as the package's own files have it
_MOST = 128  # of a kind: each is read in every pass, and up to nine rows of logits are kept of it


@dataclass(frozen=True)
class Examples:
    """Prompts to calibrate on; no two kinds share one. Texts become `Prompt`s.

    Attributes:
        task: prompts as the model's own job has them; optional. What it answers shall stay, but
            whether it opens with a refusal is not asked.
    """

    harmful: tuple[Prompt, ...]
    harmless: tuple[Prompt, ...]
    task: tuple[Prompt, ...] = ()

    def __post_init__(self) -> None:
        seen: dict[str, set[str]] = {}
        for kind in _KINDS:
            made = (p if isinstance(p, Prompt) else Prompt("", p) for p in getattr(self, kind))
            object.__setattr__(self, kind, tuple(made))
            seen[kind] = _checked(kind, getattr(self, kind))
            for other in list(seen)[:-1]:
                if shared := seen[other] & seen[kind]:
                    raise SettingError(
                        f"{len(shared)} examples are both {other} and {kind}", "Give each one label"
                    )

    @classmethod
    def load(cls, path: PathLike) -> Examples:
        """Read a JSONL of {"prompt", "kind": "harmful", "harmless" or "task"}.

        A row may have "history", [["user", "…"], ["assistant", "…"]]. Task prompts alone are added
        to the shipped examples.

        Raises:
            FileFormatError: the file is missing, or a line is not such a row.
            SettingError: a kind is missing, or a prompt comes twice.
        """
        try:
            lines = require_file(path).read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise FileFormatError(f"{path}: is not UTF-8 text", "Give a JSONL file") from error
        found: dict[str, list[Prompt]] = {kind: [] for kind in _KINDS}
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                found[row["kind"]].append(from_record(row, ""))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise FileFormatError(
                    f"{path}: line {number} is no example",
                    'A line is {"prompt": "…", "kind": "harmful"}, or "harmless", or "task"',
                ) from error
        if found["task"] and not (found["harmful"] or found["harmless"]):
            return cls.shipped(task=found["task"])
        return cls(*(tuple(found[kind]) for kind in _KINDS))

    @classmethod
    def shipped(cls, task: Iterable[Prompt | str] = ()) -> Examples:
        """The project's own: 16 harmful ones over all categories, 16 harmless, half borderline.

        None of them is a training prompt: a gene refuses what it has learnt from more readily.

        Args:
            task: prompts of the model's own job, to go with them.
        """
        return cls._of(rows("calibration.jsonl"), task)

    @classmethod
    def balanced(cls, part: str = "fit", task: Iterable[Prompt | str] = ()) -> Examples:
        """More of them: 56 a kind over all categories and forms, harmless ones mostly twins.

        Args:
            part: "fit" or "validation", which share no prompt.
            task: as for `shipped`.
        """
        return cls._of((row for row in rows("balanced.jsonl") if row["part"] == part), task)

    @classmethod
    def _of(cls, found: Iterable[Mapping[str, Any]], task: Iterable[Prompt | str]) -> Examples:
        kinds: dict[str, list[Any]] = {"harmful": [], "harmless": [], "task": list(task)}
        for row in found:
            kinds[_SAME.get(row["kind"], row["kind"])].append(from_record(row, ""))
        return cls(**{kind: tuple(prompts) for kind, prompts in kinds.items()})


def _checked(kind: str, prompts: tuple[Prompt, ...]) -> set[str]:
    """The prompts' texts, whatever their case and spaces."""
    plain = [" ".join(" ".join(text for _, text in p.messages).lower().split()) for p in prompts]
    if not (plain or kind == "task") or not all(p.text.strip() for p in prompts):
        raise SettingError(
            f"the {kind} examples are empty", "Give harmful and harmless ones, none blank"
        )
    if len(plain) > _MOST:
        raise SettingError(f"{len(plain)} {kind} examples are too many", f"Give at most {_MOST}")
    if len(set(plain)) < len(plain):
        raise SettingError(
            f"{len(plain) - len(set(plain))} of {len(plain)} {kind} examples are repeated",
            "Give each once",
        )
    return set(plain)
