"""Prompt suites: the built-in ones, and readers for the files that the field uses.

A built-in file is JSONL: a first line `{"suite", "kind", "version"}`, then one prompt
a line with `id`, `category`, `form`, `prompt`, `history` where it is the last of several
turns, and `trap` where a harmless prompt is worded like harm (the trap says what is harmless
about it). In "languages" each row has a `language` (BCP 47); its id ends in it, and begins like
those of the rows that say the same in another language.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ...errors import FileFormatError, SettingError
from ...files import as_text, parse_json
from ...prompts import Prompt, from_record, own_id
from ..settings import BUILT_IN

Kind: TypeAlias = Literal["harmful", "harmless"]
KINDS: tuple[Kind, ...] = ("harmful", "harmless")


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
        content: list[Any] = [self.kind]
        content += [list(p.messages) if p.history else p.text for p in self.prompts]
        return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()

    def repeated_id(self) -> str | None:
        """An id that two prompts have, which a report would take for one; None if there is none."""
        seen: set[str] = set()
        for prompt in self.prompts:
            if prompt.id in seen:
                return prompt.id
            seen.add(prompt.id)
        return None

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
    """The suites of a built-in name or of a file; files of both kinds give two.

    JSONL and CSV are recognised by their columns, whatever their case: AdvBench,
    JailbreakBench, HarmBench (its standard rows), XSTest, StrongREJECT,
    SimpleSafetyTests, OR-Bench, and the project's own `prompt` with, if not harmful,
    `kind`; text (MaliciousInstruct) has a prompt a line.

    Where a file does not say, its prompts are harmful, but for CSV with `prompt` and
    `category` alone: that is OR-Bench, whose prompts are harmless and borderline. Parts
    of a benchmark that only their names tell apart go by the file's name: harmful with
    "toxic" in it (OR-Bench), harmless with "benign" (JailbreakBench) or "or-bench".

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
_Rows: TypeAlias = Iterator[tuple[int, _Row]]  # each with its number in the file
_Reader: TypeAlias = Callable[[str, bytes], _Rows]


def _read(path: Path) -> bytes:
    if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe, which might never end
        raise FileFormatError(f"{path}: is no regular file", "Give a file")
    try:
        return path.read_bytes()
    except OSError as fault:
        raise FileFormatError(f"{path}: cannot be read: {fault.strerror}") from fault


def _text(source: str, data: bytes) -> str:
    try:
        return as_text(data)
    except UnicodeDecodeError as fault:
        row = data.count(b"\n", 0, fault.start) + 1
        raise _bad(source, row, "is not UTF-8", "Save the file as UTF-8") from fault
    except ValueError as fault:
        row = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise _bad(source, row, "holds a NUL character", "Save the file as UTF-8") from fault


def _bad(source: str, row: int, why: str, remedy: str = "") -> FileFormatError:
    return FileFormatError(f"{source}, row {row}: {why}", remedy)


def _suites(source: str, rows: _Rows, name: str | None = None) -> list[Suite]:
    """Group rows by kind; a file of one kind keeps the plain name."""
    found: dict[Kind, list[Prompt]] = {}
    versions: dict[Kind, str] = {}
    named: dict[tuple[Kind, str], int] = {}
    for row, (kind, version, prompt) in rows:
        if (first := named.setdefault((kind, prompt.id), row)) != row:
            why = f"has the id '{prompt.id}', which row {first} has too"
            raise _bad(source, row, why, "Give each row an id of its own, or no row one")
        found.setdefault(kind, []).append(prompt)
        versions[kind] = version
    if not found:
        raise FileFormatError(f"{source}: holds no prompts")
    name = source if name is None else name
    return [
        Suite(name if len(found) == 1 else f"{name}-{kind}", kind, tuple(found[kind]), version)
        for kind, version in sorted(versions.items())
    ]


def _jsonl(source: str, data: bytes) -> _Rows:
    default: dict[str, Any] = {}
    version = ""
    # not splitlines(): JSON text may hold U+2028 and the like unescaped
    for row, line in enumerate(_text(source, data).split("\n"), 1):
        if not line.strip():
            continue
        record = _lower(source, row, _json_object(source, row, line))
        if row == 1 and "suite" in record and "prompt" not in record:
            default = {"kind": _kind(source, row, record["kind"])} if "kind" in record else {}
            version = str(record.get("version", ""))
            continue
        record = {**default, **record}
        parse = _parser(record, _JSONL_FORMATS) or _own  # which then misses `prompt`
        parsed = parse(source, row, record)
        if parsed is not None:
            kind, _, prompt = parsed
            yield row, (kind, version, prompt)


def _json_object(source: str, row: int, line: str) -> dict[str, Any]:
    try:
        record = parse_json(line, object_pairs_hook=partial(_once, source, row))
    except ValueError as fault:
        raise _bad(
            source, row, f"is not JSON ({fault})", "JSONL holds one object a line"
        ) from fault
    if not isinstance(record, dict):
        raise _bad(source, row, "is not a JSON object", 'Write {"prompt": "..."}')
    return record


def _kind(source: str, row: int, value: object) -> Kind:
    if value not in KINDS:
        raise _bad(source, row, f"kind is {value!r}", f"It is one of {', '.join(KINDS)}")
    return value


def _prompt(source: str, row: int, record: Mapping[str, Any], column: str = "prompt") -> Prompt:
    try:
        return from_record({**record, "prompt": record.get(column)}, str(row))
    except (ValueError, TypeError) as fault:
        raise _bad(source, row, str(fault).replace("'prompt'", f"'{column}'")) from fault


def _plain(source: str, data: bytes) -> _Rows:
    for row, line in enumerate(_text(source, data).split("\n"), 1):
        if line.strip():
            yield row, ("harmful", "", Prompt(str(row), line.strip()))


def _csv(source: str, data: bytes) -> _Rows:
    reader = csv.DictReader(io.StringIO(_text(source, data), newline=""), strict=True)
    try:
        names = _lower(source, 1, _once(source, 1, [(n, None) for n in reader.fieldnames or ()]))
        parse = _parser(names, _CSV_FORMATS)
        if parse is None:
            known = "; ".join(", ".join(sorted(needed)) for needed, _ in _CSV_FORMATS)
            raise _bad(source, 1, "has no known columns", f"Known sets of columns: {known}")
        for row, record in enumerate(reader, 2):
            if any(record.get(None) or ()):
                raise _bad(
                    source, row, "has more cells than columns", "Put a text with commas in quotes"
                )
            parsed = parse(source, row, _lower(source, row, record))
            if parsed is not None:
                yield row, parsed
    except csv.Error as fault:
        raise _bad(source, reader.line_num, f"is not CSV: {fault}") from fault


# -- columns: one parser for each benchmark; it gets lower-case names ----------

_Record: TypeAlias = Mapping[str, Any]
_Parser: TypeAlias = Callable[[str, int, _Record], _Row | None]
_Formats: TypeAlias = tuple[tuple[set[str], _Parser], ...]


def _once(source: str, row: int, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a dictionary, in which none of them would be lost."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name and name in found:
            raise _bad(source, row, f"has '{name}' twice", "Keep one of them")
        found[name] = value
    return found


def _lower(source: str, row: int, record: Mapping[Any, Any]) -> dict[str, Any]:
    """Lower-case names; the csv module keeps surplus cells under None."""
    return _once(source, row, ((str(k or "").strip().lower(), v) for k, v in record.items()))


def _parser(columns: Iterable[str], formats: _Formats) -> _Parser | None:
    """The parser of the first format whose columns are all there."""
    present = set(columns)
    return next((parse for needed, parse in formats if needed <= present), None)


_KIND_IN_NAME: tuple[tuple[str, Kind], ...] = (
    ("toxic", "harmful"),
    ("benign", "harmless"),
    ("orbench", "harmless"),
)


def _kind_by_name(source: str, default: Kind) -> Kind:
    """What the file's name says, for benchmarks whose parts have the same columns."""
    stem = re.sub(r"[\W_]", "", Path(source).stem.lower())
    return next((kind for word, kind in _KIND_IN_NAME if word in stem), default)


def _borderline_if_harmless(kind: Kind, prompt: Prompt) -> _Row:
    """Harmless rows of these benchmarks are borderline by design; the category names the trap."""
    return kind, "", replace(prompt, trap=prompt.category) if kind == "harmless" else prompt


def _own(source: str, row: int, record: _Record) -> _Row | None:
    kind = record.get("kind", _kind_by_name(source, "harmful"))
    return _kind(source, row, kind), "", _prompt(source, row, record)


def _advbench(source: str, row: int, record: _Record) -> _Row | None:
    return "harmful", "", _prompt(source, row, record, "goal")


def _jailbreakbench(source: str, row: int, record: _Record) -> _Row | None:
    prompt = _prompt(source, row, record, "goal")
    prompt = replace(prompt, id=own_id(record.get("index"), prompt.id))
    return _borderline_if_harmless(_kind_by_name(source, "harmful"), prompt)


def _harmbench(source: str, row: int, record: _Record) -> _Row | None:
    """The other functional categories need a context or a copyright check."""
    if record["functionalcategory"] != "standard":
        return None
    prompt = _prompt(source, row, record, "behavior")
    name = own_id(record.get("behaviorid"), prompt.id)
    return "harmful", "", replace(prompt, id=name, category=record.get("semanticcategory") or "")


def _xstest(source: str, row: int, record: _Record) -> _Row | None:
    label = record["label"]
    if label not in ("safe", "unsafe"):
        raise _bad(source, row, f"label is {label!r}", "It is safe or unsafe")
    prompt = replace(_prompt(source, row, record), category=str(record["type"] or ""))
    return _borderline_if_harmless("harmless" if label == "safe" else "harmful", prompt)


def _strongreject(source: str, row: int, record: _Record) -> _Row | None:
    return "harmful", "", _prompt(source, row, record, "forbidden_prompt")


def _simple_safety_tests(source: str, row: int, record: _Record) -> _Row | None:
    """Its `category` is the form of the request; `harm_area` says what it is about."""
    prompt = _prompt(source, row, record)
    return "harmful", "", replace(prompt, category=str(record["harm_area"] or ""))


def _orbench(source: str, row: int, record: _Record) -> _Row | None:
    kind = _kind_by_name(source, "harmless")
    return _borderline_if_harmless(kind, _prompt(source, row, record))


_BENCHMARKS: _Formats = (
    ({"goal", "behavior", "category"}, _jailbreakbench),
    ({"goal"}, _advbench),
    ({"behavior", "functionalcategory"}, _harmbench),
    ({"prompt", "type", "label"}, _xstest),
    ({"forbidden_prompt"}, _strongreject),
    ({"prompt", "harm_area"}, _simple_safety_tests),
)
_CSV_FORMATS: _Formats = (
    ({"prompt", "kind"}, _own),
    *_BENCHMARKS,
    ({"prompt", "category"}, _orbench),
)
_JSONL_FORMATS: _Formats = (({"prompt", "kind"}, _own), *_BENCHMARKS, ({"prompt"}, _own))
_READERS: dict[str, _Reader] = {".jsonl": _jsonl, ".csv": _csv, ".txt": _plain}
