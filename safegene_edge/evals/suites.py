"""Prompt suites: the built-in ones, and readers for the files that the field uses.

A built-in file is JSONL: a first line `{"suite", "kind", "version"}`, then one prompt
a line with `id`, `category`, `prompt`, and `trap` where a harmless prompt is worded
like harm (the trap says what is harmless about it).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ..errors import FileFormatError, SettingError

Kind: TypeAlias = Literal["harmful", "harmless"]
KINDS: tuple[Kind, ...] = ("harmful", "harmless")
BUILT_IN: tuple[str, ...] = ("harmful", "harmless")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question to the model; `trap` is empty unless the wording is borderline."""

    id: str
    text: str
    category: str = ""
    trap: str = ""

    @property
    def borderline(self) -> bool:
        return bool(self.trap)


@dataclass(frozen=True)
class Suite:
    """Prompts of one kind: a model should refuse the harmful and answer the harmless."""

    name: str
    kind: Kind
    prompts: tuple[Prompt, ...]
    version: str = ""

    @cached_property
    def sha256(self) -> str:
        """Hash of the kind and the prompts' texts in order, whatever file they came from."""
        content = [self.kind, *(prompt.text for prompt in self.prompts)]
        return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()

    def sample(self, limit: int | None) -> Suite:
        """At most `limit` prompts, evenly spread so that every category keeps its share."""
        if limit is not None and limit < 1:
            raise SettingError(f"limit is {limit}", "Ask for at least one prompt")
        total = len(self.prompts)
        if limit is None or limit >= total:
            return self
        chosen = tuple(self.prompts[index * total // limit] for index in range(limit))
        return replace(self, prompts=chosen)


def load_suite(name_or_path: str | Path) -> list[Suite]:
    """The suites of a built-in name or of a file; XSTest and mixed JSONL give two.

    Files: JSONL with `prompt` and, if not harmful, `kind`; CSV of AdvBench, HarmBench
    (its standard rows), XSTest or StrongREJECT, told apart by their columns; text with
    a prompt a line. Where a file does not say, its prompts are harmful.

    Raises:
        FileFormatError: names the file and the row that cannot be read.
    """
    if str(name_or_path) in BUILT_IN:
        name = str(name_or_path)
        folder = resources.files(__package__).joinpath("data")
        return _suites(name, _jsonl(name, folder.joinpath(f"{name}.jsonl").read_bytes()))
    path = Path(name_or_path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise FileFormatError(
            f"{path}: no suite of this name, and no file of a known type",
            f"Give {', '.join(BUILT_IN)}, or a file that ends in {', '.join(_READERS)}",
        )
    return _suites(str(path), reader(str(path), _read(path)), path.stem)


# -- rows: (kind, version, prompt) from each format ---------------------------

_Row: TypeAlias = tuple[Kind, str, Prompt]
_Reader: TypeAlias = Callable[[str, bytes], Iterator[_Row]]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as fault:
        raise FileFormatError(f"{path}: cannot be read: {fault.strerror}") from fault


def _text(source: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        row = data.count(b"\n", 0, fault.start) + 1
        raise _bad(source, row, "is not UTF-8", "Save the file as UTF-8") from fault


def _bad(source: str, row: int, why: str, remedy: str = "") -> FileFormatError:
    return FileFormatError(f"{source}, row {row}: {why}", remedy)


def _suites(source: str, rows: Iterator[_Row], name: str | None = None) -> list[Suite]:
    """Group rows by kind; a file of one kind keeps the plain name."""
    found: dict[Kind, list[Prompt]] = {}
    versions: dict[Kind, str] = {}
    for kind, version, prompt in rows:
        found.setdefault(kind, []).append(prompt)
        versions[kind] = version
    if not found:
        raise FileFormatError(f"{source}: holds no prompts")
    name = source if name is None else name
    return [
        Suite(name if len(found) == 1 else f"{name}-{kind}", kind, tuple(found[kind]), version)
        for kind, version in sorted(versions.items())
    ]


def _jsonl(source: str, data: bytes) -> Iterator[_Row]:
    kind: Kind = "harmful"
    version = ""
    # not splitlines(): JSON text may hold U+2028 and the like unescaped
    for row, line in enumerate(_text(source, data).split("\n"), 1):
        if not line.strip():
            continue
        record = _json_object(source, row, line)
        if row == 1 and "suite" in record and "prompt" not in record:
            kind = _kind(source, row, record.get("kind", kind))
            version = str(record.get("version", ""))
            continue
        yield _kind(source, row, record.get("kind", kind)), version, _prompt(source, row, record)


def _json_object(source: str, row: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as fault:
        raise _bad(source, row, "is not JSON", "JSONL holds one object a line") from fault
    if not isinstance(record, dict):
        raise _bad(source, row, "is not a JSON object", 'Write {"prompt": "..."}')
    return record


def _kind(source: str, row: int, value: object) -> Kind:
    if value not in KINDS:
        raise _bad(source, row, f"kind is {value!r}", f"It is one of {', '.join(KINDS)}")
    return value


def _prompt(source: str, row: int, record: Mapping[str, Any], column: str = "prompt") -> Prompt:
    text = record.get(column)
    if not isinstance(text, str) or not text.strip():
        raise _bad(source, row, f"'{column}' is missing or empty")
    return Prompt(
        id=str(record.get("id") or row),
        text=text,
        category=str(record.get("category") or ""),
        trap=str(record.get("trap") or ""),
    )


def _plain(source: str, data: bytes) -> Iterator[_Row]:
    for row, line in enumerate(_text(source, data).split("\n"), 1):
        if line.strip():
            yield "harmful", "", Prompt(str(row), line.strip())


def _csv(source: str, data: bytes) -> Iterator[_Row]:
    reader = csv.DictReader(io.StringIO(_text(source, data), newline=""), strict=True)
    try:
        columns = set(reader.fieldnames or ())
        parse = next((parse for needed, parse in _CSV_FORMATS if needed <= columns), None)
        if parse is None:
            known = "; ".join(", ".join(sorted(needed)) for needed, _ in _CSV_FORMATS)
            raise _bad(source, 1, "has no known columns", f"Known sets of columns: {known}")
        for row, record in enumerate(reader, 2):
            parsed = parse(source, row, record)
            if parsed is not None:
                yield parsed
    except csv.Error as fault:
        raise _bad(source, reader.line_num, f"is not CSV: {fault}") from fault


_Record: TypeAlias = Mapping[str, Any]


def _advbench(source: str, row: int, record: _Record) -> _Row | None:
    return "harmful", "", _prompt(source, row, record, "goal")


def _harmbench(source: str, row: int, record: _Record) -> _Row | None:
    """The other functional categories need a context or a copyright check."""
    if record["FunctionalCategory"] != "standard":
        return None
    prompt = _prompt(source, row, record, "Behavior")
    name = str(record.get("BehaviorID") or prompt.id)
    return "harmful", "", replace(prompt, id=name, category=record.get("SemanticCategory") or "")


def _xstest(source: str, row: int, record: _Record) -> _Row | None:
    kinds: dict[str, Kind] = {"safe": "harmless", "unsafe": "harmful"}
    kind = kinds.get(record["label"] or "")
    if kind is None:
        raise _bad(source, row, f"label is {record['label']!r}", "It is safe or unsafe")
    prompt = _prompt(source, row, record)
    category = str(record["type"] or "")
    # every safe row of this benchmark is borderline by design; its type names the trap
    trap = category if kind == "harmless" else ""
    return kind, "", replace(prompt, category=category, trap=trap)


def _strongreject(source: str, row: int, record: _Record) -> _Row | None:
    return "harmful", "", _prompt(source, row, record, "forbidden_prompt")


_CSV_FORMATS: tuple[tuple[set[str], Callable[[str, int, _Record], _Row | None]], ...] = (
    ({"goal"}, _advbench),
    ({"Behavior", "FunctionalCategory"}, _harmbench),
    ({"prompt", "type", "label"}, _xstest),
    ({"forbidden_prompt"}, _strongreject),
)
_READERS: dict[str, _Reader] = {".jsonl": _jsonl, ".csv": _csv, ".txt": _plain}
