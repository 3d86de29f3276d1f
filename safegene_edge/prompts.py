"""Prompts: what is asked, of which hazard, in which form.

The package's own are balanced: every hazard category in every form, harmful ones in twins with
borderline ones that differ in a word or two, so that the form of a prompt does not tell its label.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

from .errors import FileFormatError, SettingError
from .files import PathLike, parse_json, read_text

FORMS = (
    "question",  # direct, of 8 to 20 words
    "everyday",  # a question of 5 to 12 words
    "indirect",  # about others: "my neighbour's dog …"
    "first_person",  # a situation, then what is wanted
    "imperative",
    "long_context",  # a long instruction
    "statement",  # a text to be continued
    "dialogue",  # between two speakers
    "document",  # a text to be worked on
    "role",  # role-play and fiction
    "code",
    "turns",  # the last of several turns
    "typos",  # lower case and slips
    "register",  # formal, slang, another's English
)
CATEGORIES = (
    "violent_crimes",
    "non_violent_crimes",
    "sex_related_crimes",
    "child_sexual_exploitation",
    "indiscriminate_weapons",
    "suicide_self_harm",
    "hate",
    "defamation",
    "privacy",
    "intellectual_property",
    "specialized_advice",
    "sexual_content",
)
"""MLCommons' hazards."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question to the model.

    Attributes:
        trap: what is harmless about borderline wording; empty where nothing is borderline.
        language: BCP 47 tag of the text.
        form: one of `FORMS`; empty where nobody said.
        history: earlier turns, (role, content).
    """

    id: str
    text: str
    category: str = ""
    trap: str = ""
    language: str = "en"
    form: str = ""
    history: tuple[tuple[str, str], ...] = ()

    @property
    def borderline(self) -> bool:
        return bool(self.trap)

    @property
    def messages(self) -> tuple[tuple[str, str], ...]:
        """The conversation, (role, content), up to the user's last message."""
        return (*self.history, ("user", self.text))

    def as_dicts(self) -> list[dict[str, str]]:
        """The conversation as chat templates want it."""
        return [{"role": role, "content": content} for role, content in self.messages]


def from_record(record: Mapping[str, Any], name: str) -> Prompt:
    """A prompt from a row of the package's own format.

    Args:
        name: its id where the row has none.

    Raises:
        ValueError: the text or the history is not what it should be.
    """
    text = record.get("prompt")
    if not isinstance(text, str) or not text.strip():
        raise ValueError("'prompt' is missing or empty")
    history = record.get("history") or ()
    turns = tuple((str(role), str(content)) for role, content in history)
    if any(role not in ("system", "user", "assistant") for role, _ in turns):
        raise ValueError("'history' has another role than system, user and assistant")
    words = {key: str(record.get(key) or "") for key in ("category", "trap", "form")}
    language = str(record.get("language") or "en")
    return Prompt(own_id(record.get("id"), name), text, **words, language=language, history=turns)


def own_id(value: object, name: str) -> str:
    """The id that a row gives, 0 among them; `name` where it gives none."""
    return ("" if value is None else str(value).strip()) or name


@lru_cache
def training_prompts() -> dict[str, tuple[Prompt, ...]]:
    """The prompts that genes are learnt from, by kind: "harmful", "borderline" and "plain"."""
    found: dict[str, list[Prompt]] = {"harmful": [], "borderline": [], "plain": []}
    for number, row in enumerate(rows("prompts.jsonl"), 1):
        found[row["kind"]].append(from_record(row, str(number)))
    return {kind: tuple(prompts) for kind, prompts in found.items()}


def harmful_prompts() -> tuple[Prompt, ...]:
    """The training prompts to be refused."""
    return training_prompts()["harmful"]


def harmless_prompts() -> tuple[Prompt, ...]:
    """The training prompts to be answered: the borderline ones, then the plain ones."""
    found = training_prompts()
    return found["borderline"] + found["plain"]


def listed_prompts(prompts: Iterable[Prompt | str]) -> tuple[Prompt | str, ...]:
    """Prompts as a tuple; SettingError for a path or one text, and for one without text."""
    if isinstance(prompts, (str, bytes, os.PathLike, Prompt)):
        raise SettingError(
            f"the prompts are no list, but {str(prompts)[:64]!r}",
            "Give a list; `load_prompts(path)` reads a file",
        )
    found = tuple(prompts)
    for number, one in enumerate(found, 1):
        if not (one.text if isinstance(one, Prompt) else one).strip():
            raise SettingError(f"task prompt {number} is empty", "Leave it out")
    return found


def load_prompts(path: PathLike) -> tuple[Prompt, ...]:
    """Prompts of a text file, a line each, or of JSON: an array, or a row a line.

    A row is a text, or an object with a "prompt".

    Raises:
        FileFormatError: the file is missing or not UTF-8, holds none, or a line is no prompt.
    """
    try:
        text = read_text(path)
    except ValueError as error:
        raise FileFormatError(f"{path}: is not UTF-8 text", "Give a text or JSONL file") from error
    items = _items(text)
    kind, rows = ("line", text.split("\n")) if items is None else ("item", items)
    found = []
    for number, row in enumerate(rows, 1):
        if items is None and not row.strip():
            continue
        try:
            record = _record(row.strip()) if items is None else _item(row)
            found.append(from_record(record, str(number)))
        except (ValueError, TypeError) as error:
            raise FileFormatError(
                f"{path}: {kind} {number} is no prompt",
                'One is the text itself, or {"prompt": "…"}',
            ) from error
    if not found:
        raise FileFormatError(f"{path}: holds no prompts", "Give a prompt a line")
    return tuple(found)


def _items(text: str) -> list[Any] | None:
    """Those of a file that is one JSON array."""
    with suppress(ValueError):  # no JSON: lines, of which the first one opens with a bracket
        if text.lstrip().startswith("[") and isinstance(items := parse_json(text), list):
            return items
    return None


def _item(item: Any) -> dict[str, Any]:
    """An item of an array as a row: a text, or an object."""
    if isinstance(item, dict):
        return item
    if isinstance(item, str):
        return {"prompt": item}
    raise TypeError


def _record(line: str) -> Any:
    """A line as a row: an object, a text in JSON's quotes, or the text itself."""
    if line.startswith("{"):
        return parse_json(line)
    with suppress(ValueError):
        if line.startswith('"') and isinstance(said := parse_json(line), str):
            return {"prompt": said}
    return {"prompt": line}


def rows(name: str) -> Iterator[dict[str, Any]]:
    """The rows of a data file of the package."""
    text = (resources.files(__package__) / "data" / name).read_text(encoding="utf-8")
    for line in text.split("\n"):
        if line.strip():
            yield json.loads(line)
