"""Files and folders: paths, hashes, outputs that appear whole or not at all.

Every file that the package reads passes through `require_file`, where `hf:` paths become
local ones. Every output is written under a temporary name in its own folder and renamed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeAlias

from .errors import FileFormatError, OutputError, command
from .hub import resolve

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PathLike: TypeAlias = str | os.PathLike[str]

_SUFFIX = ".tmp"
_NAME_BYTES = 80  # of the output's name in that of its temporary file
_PART = re.compile(r"-\d{5}-of-(\d{5})$")
_NEAR = 0.75  # of a name's letters must agree before it is suggested


def cache_folder() -> Path:
    """This project's folder in the user's own cache."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(folder):  # noqa: PTH117 - the specification ignores any other
        base = Path(folder)
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path.home() / ".cache"
    return base / "safegene-edge"


def require_file(path: PathLike) -> Path:
    """The path, if it is a readable, non-empty file; else FileFormatError.

    Every file that is read passes here or through `GGUFFile`, which is where `hf:` paths
    become local ones.
    """
    path = resolve(path)
    with reading(path):
        if path.is_dir():
            raise FileFormatError(f"{path}: is a folder", folder_remedy(path))
        if path.exists() and not path.is_file():  # a pipe or a device, which might never end
            raise FileFormatError(f"{path}: is no regular file", "Give a file")
        if not path.is_file():
            raise FileFormatError(f"{path}: no such file", _missing_remedy(path))
        if not os.access(path, os.R_OK):
            raise FileFormatError(f"{path}: cannot be read", "Check its permissions")
        if path.stat().st_size == 0:
            raise FileFormatError(f"{path}: the file is empty", "Download or write it again")
    return path


@contextmanager
def reading(path: PathLike) -> Iterator[None]:
    """An error of the system in the block is this input's, though an output is being written."""
    try:
        yield
    except OSError as error:
        raise FileFormatError(
            f"{path}: cannot be read ({error.strerror or error})", "Check the path and the disk"
        ) from error


def read_text(path: PathLike) -> str:
    """A file's text; ValueError, such as UnicodeDecodeError, where it is no text."""
    path = require_file(path)
    with reading(path):
        return as_text(path.read_bytes())


def as_text(data: bytes) -> str:
    """UTF-8 with or without a mark at its beginning, its lines ended by a line feed.

    Raises:
        ValueError: it is not UTF-8. That is UTF-16 without a mark, too, whose ASCII would pass.
    """
    text = data.decode("utf-8-sig")
    if "\0" in text:
        raise ValueError("it holds NUL characters")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str | bytes, *, foreign: bool = False, **options: Any) -> Any:
    """`json.loads` of what a user writes.

    Args:
        foreign: it comes from a program: take a name's last value, and half a character, as
            `json.loads` does.

    Raises:
        ValueError: it is no JSON, is nested too deeply, gives a name twice, or spells half a
            character by an escape, which no encoding has.
    """
    if not foreign:
        options.setdefault("object_pairs_hook", _once)
    try:
        found = json.loads(text, **options)
        if not foreign and ("\\u" if isinstance(text, str) else b"\\u") in text:  # type: ignore[operator]
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("it holds half of a character (an escape of a surrogate)") from error
    return found


def no_constant(name: str) -> Any:
    """For `parse_constant`: NaN and the infinities, which Python alone reads, are a ValueError."""
    raise ValueError(f"{name} is no JSON number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it has '{name[:64]}' twice")
        found[name] = value
    return found


def sha256(path: PathLike) -> str:
    """SHA-256 of a file, in hexadecimal."""
    path = require_file(path)
    with reading(path), open(path, "rb") as handle:
        return (
            hashlib.file_digest(handle, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _sha256_by_block(handle)
        )


def _sha256_by_block(handle: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    while block := handle.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def folder_remedy(folder: Path, otherwise: str = "Give a file") -> str:
    """What to do with a folder that was given in place of a GGUF file."""
    if (folder / "adapter_config.json").is_file():
        given = command("convert", folder, "--base", "MODEL.gguf", "-o", "ADAPTER.gguf")
        return f"The folder holds a PEFT or MLX adapter: convert it first with `{given}`"
    if (folder / "config.json").is_file():
        return (
            "The folder holds a Hugging Face model: llama.cpp's convert_hf_to_gguf.py converts it"
        )
    return otherwise


def _missing_remedy(path: Path) -> str:
    """The file that was meant, where one beside it has nearly this name."""
    import difflib  # a start of the package should not wait for it

    if not path.parent.is_dir():
        return f"There is no folder {path.parent} either: check the path"
    if part := _PART.search(path.stem):  # of a split model: its other parts have nearly this name
        return f"The model is split into {int(part[1])} files: put all of them there"
    with suppress(OSError):  # a folder that cannot be listed
        there = [file for file in path.parent.iterdir() if file.is_file()]
        there.sort(key=lambda file: file.suffix == path.suffix)  # of one stem the last is kept
        stems = {file.stem: file for file in there if not file.name.startswith(".")}
        for stem in difflib.get_close_matches(path.stem, stems, n=1, cutoff=_NEAR):
            return f"Did you mean {stems[stem]}?"
    return "Check the path"


def check_output(path: PathLike, inputs: Iterable[PathLike] = ()) -> Path:
    """Raise OutputError where `path` cannot become a file, or is one of the inputs."""
    named, path = os.fspath(path), Path(path)
    if not named:
        raise OutputError("the output's name is empty", "Name an output file")
    if named == "-":
        raise OutputError("-: nothing is written to standard output", "Name an output file")
    if named.endswith(("/", os.sep)):
        raise OutputError(f"{named}: names a folder", "Name an output file")
    there = _is_there(path)
    with writing(path):
        if path.is_dir():
            raise OutputError(f"{path}: is a folder", "Name an output file")
        if path.is_symlink() and not path.exists():
            raise OutputError(f"{path}: is a link that leads nowhere", "Remove it, or name a file")
        if path.exists() and not path.is_file():  # a device or a pipe, which would be replaced
            raise OutputError(f"{path}: is no regular file", "Name an output file")
        for source in inputs if there else ():
            local = resolve(source)
            if local.exists() and path.exists() and path.samefile(local):
                raise OutputError(f"{path}: is also an input", "Name another output")
        _require_parent(path)
    return path


def _is_there(path: Path) -> bool:
    """Whether something has this name; OutputError where nothing could have it."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # too long, or with a NUL
        raise _unwritable(path, error) from error
    return True


@contextmanager
def writing(path: PathLike) -> Iterator[None]:
    """An error of the system in the block is this output's, but for one that names an input."""
    try:
        yield
    except OSError as error:
        if _names_another(error, Path(path)):
            cause = f"{error.filename}: {error.strerror or error}"
            raise FileFormatError(cause, "Check the path and the disk") from error
        raise _unwritable(path, error) from error


def _unwritable(path: PathLike, error: Exception) -> OutputError:
    cause = getattr(error, "strerror", None) or str(error)
    return OutputError(f"{path}: cannot be written ({cause})", "Check its name and the disk")


def _names_another(error: OSError, path: Path) -> bool:
    """Whether the error is of a file that is neither the output nor a temporary one of it."""
    if not isinstance(error.filename, str) or not error.filename:
        return False
    named = Path(error.filename)
    parts = (named, *named.parents)
    temporary = any(part.name.startswith(".") and part.suffix == _SUFFIX for part in parts)
    return not temporary and path not in parts and named not in path.parents


@contextmanager
def atomic_output(path: PathLike, inputs: Iterable[PathLike] = ()) -> Iterator[Path]:
    """A temporary path in the output's folder, renamed to `path` when the block succeeds.

    A reader sees the old file or the whole new one. When the block raises, nothing is left.
    """
    path = check_output(path, inputs)
    temporary = _temporary(path)
    try:
        with writing(path):
            # Not mkstemp's mode 0600, which would surprise whoever shares the file. The system
            # takes the user's mask off: to ask for the mask, all threads would lose it.
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))
            yield temporary
            _flush([temporary])
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """A name beside the path that nothing has; short, since the path's may be as long as can be."""
    begin = os.fsencode(path.name)[:_NAME_BYTES].decode("utf-8", "ignore")
    return path.with_name(f".{begin}.{secrets.token_hex(6)}{_SUFFIX}")


def _require_parent(path: Path) -> None:
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"{path}: the folder {folder} does not exist", "Create it first")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{path}: the folder {folder} is not writable", "Choose another")


def _flush(files: Iterable[Path]) -> None:
    """Write files through to the disk."""
    for file in files:
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())


def hold(path: PathLike) -> IO[bytes] | None:
    """A file, opened for this process alone until it is closed, or the process ends.

    Returns:
        None where another process holds it. Where the system has no locks, nobody does.

    Raises:
        FileNotFoundError: it is not there, or went away meanwhile.
    """
    # Opened for writing, without which NFS locks nothing.
    handle = open(path, "rb+")  # noqa: SIM115 - the caller closes it
    try:
        if fcntl is not None:
            with _where_there_are_locks():
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(handle.fileno()), Path(path).stat()):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    except BlockingIOError:
        handle.close()
        return None
    except BaseException:
        handle.close()
        raise
    return handle


@contextmanager
def _where_there_are_locks() -> Iterator[None]:
    """Goes on where the file system has none."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def write_text(path: PathLike, text: str, inputs: Iterable[PathLike] = ()) -> None:
    """Write a text file atomically, as UTF-8."""
    with atomic_output(path, inputs) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_folder(folder: PathLike) -> Path:
    """Raise OutputError where `folder` cannot be made, or holds something."""
    folder = Path(folder)
    there = _is_there(folder)
    with writing(folder):
        if folder.is_dir():
            if any(folder.iterdir()):
                raise OutputError(f"{folder}: the folder is not empty", "Name a new folder")
        elif there:
            raise OutputError(f"{folder}: is not a folder", "Name a new folder")
        _require_parent(folder)
    return folder


@contextmanager
def atomic_folder(folder: PathLike) -> Iterator[Path]:
    """A temporary folder beside `folder`, renamed to it when the block succeeds."""
    folder = check_folder(folder)
    temporary = _temporary(folder)
    try:
        with writing(folder):
            temporary.mkdir()
            yield temporary
            _flush(temporary.iterdir())
            if folder.exists():
                folder.rmdir()  # empty, as checked; not every system renames over an empty folder
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for temporary files that goes with the block.

    Raises:
        OutputError: none can be made.
    """
    try:
        made = tempfile.TemporaryDirectory(prefix="safegene-", ignore_cleanup_errors=True)
    except OSError as error:
        raise _no_scratch(error) from error
    with made as folder:
        yield Path(folder)


def scratch_file() -> IO[bytes]:
    """A file without a name that goes when it is closed; OutputError where none can be made."""
    try:
        return tempfile.TemporaryFile(buffering=0)
    except OSError as error:
        raise _no_scratch(error) from error


def _no_scratch(error: OSError) -> OutputError:
    cause = f"no temporary file can be made ({error.strerror or error})"
    return OutputError(cause, "Name a folder with free space in TMPDIR")
