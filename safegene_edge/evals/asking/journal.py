"""What a run has found so far, on disk: a killed run goes on where it was.

A journal is a JSONL file: a header line, then `{"key", "value"}` for each finished item,
written in one piece as it finishes. The key is a hash of all that the value depends on
(model, adapters and scales, settings, the very messages), so that a changed model or
prompt finds nothing old, and whatever is unchanged is never asked again.

Journals hold answers to harmful prompts: they are readable by the user alone, and the
command line deletes its own when the report is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

from ...errors import FileFormatError, OutputError
from ...files import PathLike, cache_folder, parse_json, reading, writing

_HEADER = {"safegene_edge_journal": 1}
_HEADER_LINE = json.dumps(_HEADER).encode() + b"\n"


def fingerprint(*parts: Any) -> str:
    """A hash of JSON values, the key of whatever they determine."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def journal_folder() -> Path:
    """Where runs that are under way are kept."""
    return cache_folder() / "runs"


class Journal:
    """Values by key, in memory and, with a path, on disk as they come. Threads may share it.

    Args:
        path: a journal to go on with, or a file to begin; None keeps nothing on disk.

    Raises:
        FileFormatError: the file is no journal; it is left as it is.
        OutputError: it cannot be written.
    """

    def __init__(self, path: PathLike | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._values: dict[str, Any] = {}
        self._used: set[str] = set()
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        if self.path is not None:
            self._open(self.path)

    def _open(self, path: Path) -> None:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
            descriptor = os.open(path, flags, 0o600)
        try:
            if not path.is_file():
                raise FileFormatError(f"{path}: is no regular file", "Name another file")
            whole = self._read(path)
            with writing(path):
                os.truncate(descriptor, whole)  # the torn line of a run that was killed
                if not whole:
                    os.write(descriptor, _HEADER_LINE)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def _read(self, path: Path) -> int:
        """Take in the whole lines; returns how many bytes they have."""
        with reading(path):
            data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if not whole and _HEADER_LINE.startswith(data):
            return 0
        if not data.startswith(_HEADER_LINE):
            raise FileFormatError(f"{path}: is no journal of an evaluation", "Name another file")
        for row, line in enumerate(data[len(_HEADER_LINE) : whole].splitlines(), 2):
            try:
                record = parse_json(line)
                self._values[record["key"]] = record["value"]
            except (ValueError, KeyError, TypeError) as error:
                raise FileFormatError(
                    f"{path}, row {row}: is no entry of a journal", "Delete the file"
                ) from error
        return whole

    @property
    def count(self) -> int:
        """How many values it holds."""
        return len(self._values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        self._used.add(key)
        return self._values[key]

    @property
    def all_used(self) -> bool:
        """Whether every value was read: no other run has left some."""
        return self._used >= self._values.keys()

    def put(self, key: str, value: Any) -> None:
        """Keep a JSON value; when this returns, killing the process does not lose it."""
        line = json.dumps({"key": key, "value": value}, ensure_ascii=True).encode() + b"\n"
        with self._lock:
            self._values[key] = value
            self._used.add(key)
            if self._descriptor is not None:
                try:
                    os.write(self._descriptor, line)  # one write to an append-only file
                except OSError as error:
                    raise OutputError(f"{self.path}: {error.strerror}") from error

    def close(self) -> None:
        """Close the file, and keep it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def delete(self) -> None:
        """Close the file and remove it: the run is done."""
        self.close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
