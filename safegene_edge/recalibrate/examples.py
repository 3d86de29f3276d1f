"""The prompts that a recalibration looks at."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import FileFormatError, SettingError
from ..files import PathLike, parse_json, read_text
from ..prompts import Prompt, from_record, listed_prompts, rows

PARTS = ("fit", "validation")
_KINDS = ("harmful", "harmless", "task")
_SAME = {"borderline": "harmless", "plain": "harmless"}  # as the package's own files have it
_MOST = 128  # of a kind: up to nine rows of logits are kept of each


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
    def load(cls, path: PathLike, part: str = "fit") -> Examples | None:
        """Read a JSONL of {"prompt", "kind": "harmful", "harmless" or "task"}.

        A row may have "history", [["user", "…"], ["assistant", "…"]], and "part", "fit" (where
        it has none) or "validation". Task prompts alone are added to the shipped examples.

        Args:
            part: the rows to take.

        Returns:
            None where the file has no row of the part "validation" and that is asked for.

        Raises:
            FileFormatError: the file is missing, or a line is not such a row.
            SettingError: a kind is missing, or a prompt comes twice.
        """
        try:
            lines = read_text(path).split("\n")
        except ValueError as error:
            raise FileFormatError(f"{path}: is not UTF-8 text", "Give a JSONL file") from error
        found: dict[str, dict[str, list[Prompt]]] = {
            name: {kind: [] for kind in _KINDS} for name in PARTS
        }
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
                found[row.get("part", "fit")][row["kind"]].append(from_record(row, ""))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise FileFormatError(
                    f"{path}: line {number} is no example",
                    'A line is {"prompt": "…", "kind": "harmful"}, or "harmless", or "task"',
                ) from error
        if found["validation"]["task"]:
            raise SettingError(
                f"{path}: {len(found['validation']['task'])} task prompts are in the validation, "
                "where none are counted",
                'Leave out their "part"',
            )
        chosen = found[part]
        if part != "fit" and not any(chosen.values()):
            return None
        if chosen["task"] and not (chosen["harmful"] or chosen["harmless"]):
            return cls.shipped(part, chosen["task"])
        return cls(*(tuple(chosen[kind]) for kind in _KINDS))

    @classmethod
    def shipped(cls, part: str = "fit", task: Iterable[Prompt | str] = ()) -> Examples:
        """The project's own: 48 of a kind in every form, harmless ones mostly twins of harmful.

        None of them is a training prompt: a gene refuses what it has learnt from more readily.

        Args:
            part: "fit" or "validation", which share no prompt.
            task: prompts of the model's own job, to go with them.
        """
        if part not in PARTS:
            raise SettingError(f"the part is '{part}'", f"One of {', '.join(PARTS)}")
        kinds: dict[str, list[Any]] = {
            "harmful": [],
            "harmless": [],
            "task": [*listed_prompts(task)],
        }
        for row in rows("calibration.jsonl"):
            if row["part"] == part:
                kinds[_SAME.get(row["kind"], row["kind"])].append(from_record(row, ""))
        return cls(**{kind: tuple(prompts) for kind, prompts in kinds.items()})

    @classmethod
    def every_shipped(cls) -> Examples:
        """Both parts as one, the fit's first: what an aligned model is measured on."""
        parts = [cls.shipped(part) for part in PARTS]
        return cls(
            tuple(prompt for part in parts for prompt in part.harmful),
            tuple(prompt for part in parts for prompt in part.harmless),
        )

    def without(self, others: Examples) -> Examples:
        """Those that are not among others, under either label.

        Raises:
            SettingError: of a kind none is left.
        """
        seen = others.seen
        harmful, harmless = (
            tuple(prompt for prompt in kind if compared(prompt) not in seen)
            for kind in (self.harmful, self.harmless)
        )
        if not (harmful and harmless):
            raise SettingError(
                "the examples hold all shipped ones that the result is counted on",
                "Give others for the validation",
            )
        return Examples(harmful, harmless)

    @property
    def seen(self) -> set[str]:
        """The harmful and harmless prompts as they are compared."""
        return {compared(prompt) for prompt in (*self.harmful, *self.harmless)}

    @property
    def digest(self) -> str:
        """SHA-256 of the harmful and harmless prompts, in hexadecimal."""
        texts = [[list(p.messages) for p in kind] for kind in (self.harmful, self.harmless)]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def compared(prompt: Prompt) -> str:
    """A prompt's text, whatever its case and spaces."""
    return " ".join(" ".join(text for _, text in prompt.messages).lower().split())


def require_apart(fit: Examples, validation: Examples) -> None:
    """What the result is counted on, the fit has not seen, under either label.

    Raises:
        SettingError: a prompt is in both.
    """
    if shared := fit.seen & validation.seen:
        raise SettingError(
            f"{len(shared)} examples are in the fit and in the validation, such as "
            f"'{min(shared)[:60]}'",
            "Give each once",
        )


def _checked(kind: str, prompts: tuple[Prompt, ...]) -> set[str]:
    """The prompts as they are compared."""
    plain = [compared(prompt) for prompt in prompts]
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
