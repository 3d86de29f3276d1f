"""Read a report's JSON, and hold it against the published schema before anything trusts it.

`problems` knows the keywords that data/report.schema.json uses, so that the core needs no
JSON Schema package.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

from ...errors import FileFormatError
from ...files import PathLike, no_constant, parse_json, read_text

Schema: TypeAlias = Mapping[str, Any]
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}
_ANNOTATIONS = {"$schema", "$id", "$defs", "$comment", "title", "description"}


@cache
def report_schema() -> Schema:
    """The JSON Schema (draft 2020-12) of a report."""
    file = resources.files(__package__).joinpath("data/report.schema.json")
    schema: Schema = json.loads(file.read_text(encoding="utf-8"))
    return schema


def read_report(path: PathLike) -> dict[str, Any]:
    """A report's JSON, known to have the schema's shape.

    Raises:
        FileFormatError: names the file and the place in it that is wrong.
    """
    try:
        report = parse_json(read_text(path), parse_constant=no_constant)
    except ValueError as fault:
        why = "it is no text" if isinstance(fault, UnicodeDecodeError) else fault
        raise FileFormatError(
            f"{path}: is not JSON ({why})", "Give a file that `eval --json` wrote"
        ) from fault
    for problem in problems(report):
        raise FileFormatError(f"{Path(path)}: {problem}", "Give a file that `eval --json` wrote")
    return dict(report)


def problems(value: Any, schema: Schema | None = None, place: str = "") -> Iterator[str]:
    """What does not fit the schema, each with its place, such as `suites[0].kind`."""
    schema = report_schema() if schema is None else schema
    for keyword, wanted in schema.items():
        if keyword not in _ANNOTATIONS:
            yield from _KEYWORDS[keyword](value, wanted, place, schema)


def _says(place: str, what: str) -> str:
    return f"{place.lstrip('.') or 'the report'} {what}"


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)  # which Python takes for 0 or 1, and JSON does not


def _is(value: Any, kind: str) -> bool:
    if _is_bool(value):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[kind])


def _type(value: Any, wanted: Any, place: str, _: Schema) -> Iterator[str]:
    kinds = [wanted] if isinstance(wanted, str) else wanted
    if not any(_is(value, kind) for kind in kinds):
        yield _says(place, f"is {_brief(value)}, not of the type {' or '.join(kinds)}")


def _enum(value: Any, wanted: Any, place: str, _: Schema) -> Iterator[str]:
    if not any(value == item and _is_bool(value) == _is_bool(item) for item in wanted):
        yield _says(place, f"is {_brief(value)}, not {' or '.join(map(_brief, wanted))}")


def _const(value: Any, wanted: Any, place: str, schema: Schema) -> Iterator[str]:
    yield from _enum(value, [wanted], place, schema)


def _minimum(value: Any, wanted: Any, place: str, _: Schema) -> Iterator[str]:
    if _is(value, "number") and value < wanted:
        yield _says(place, f"is {value}, less than {wanted}")


def _maximum(value: Any, wanted: Any, place: str, _: Schema) -> Iterator[str]:
    if _is(value, "number") and value > wanted:
        yield _says(place, f"is {value}, more than {wanted}")


def _pattern(value: Any, wanted: Any, place: str, _: Schema) -> Iterator[str]:
    if isinstance(value, str) and not re.search(wanted, value):
        yield _says(place, f"is {_brief(value)}, which does not look like {wanted}")


def _min_items(value: Any, wanted: Any, place: str, _: Schema) -> Iterator[str]:
    if isinstance(value, list) and len(value) < wanted:
        yield _says(place, f"has {len(value)} items, not {wanted}")


def _max_items(value: Any, wanted: Any, place: str, _: Schema) -> Iterator[str]:
    if isinstance(value, list) and len(value) > wanted:
        yield _says(place, f"has {len(value)} items, not {wanted}")


def _required(value: Any, wanted: Any, place: str, _: Schema) -> Iterator[str]:
    if isinstance(value, dict):
        for name in wanted:
            if name not in value:
                yield _says(place, f"has no '{name}'")


def _properties(value: Any, wanted: Any, place: str, _: Schema) -> Iterator[str]:
    if isinstance(value, dict):
        for name, schema in wanted.items():
            if name in value:
                yield from problems(value[name], schema, f"{place}.{name}")


def _others(value: Any, wanted: Any, place: str, schema: Schema) -> Iterator[str]:
    if isinstance(value, dict):
        for name in value.keys() - schema.get("properties", {}).keys():
            yield from problems(value[name], wanted, f"{place}.{name}")


def _names(value: Any, wanted: Any, place: str, _: Schema) -> Iterator[str]:
    if isinstance(value, dict):
        for name in value:
            yield from problems(name, wanted, f"{place} the name")


def _items(value: Any, wanted: Any, place: str, _: Schema) -> Iterator[str]:
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from problems(item, wanted, f"{place}[{index}]")


def _ref(value: Any, wanted: str, place: str, _: Schema) -> Iterator[str]:
    yield from problems(value, report_schema()["$defs"][wanted.removeprefix("#/$defs/")], place)


_KEYWORDS: dict[str, Callable[[Any, Any, str, Schema], Iterator[str]]] = {
    "$ref": _ref,
    "type": _type,
    "enum": _enum,
    "const": _const,
    "minimum": _minimum,
    "maximum": _maximum,
    "pattern": _pattern,
    "minItems": _min_items,
    "maxItems": _max_items,
    "required": _required,
    "properties": _properties,
    "additionalProperties": _others,
    "propertyNames": _names,
    "items": _items,
}
