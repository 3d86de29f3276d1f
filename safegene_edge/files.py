"""Files and folders: paths, hashes, outputs that appear whole or not at all.

Every file that the package reads passes through `require_file`, where `hf:` paths become
local ones. Every output is written under a temporary name in its own folder and renamed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from .errors import FileFormatError, OutputError
from .hub import resolve

PathLike: TypeAlias = str | os.PathLike[str]


def cache_folder() -> Path:
    """This project's folder in the user's own cache."""
    if folder := os.environ.get("XDG_CACHE_HOME"):
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
    if path.is_dir():
        raise FileFormatError(f"{path}: is a folder", _folder_remedy(path))
    if not path.is_file():
        raise FileFormatError(f"{path}: no such file", "Check the path")
    if not os.access(path, os.R_OK):
        raise FileFormatError(f"{path}: cannot be read", "Check its permissions")
    if path.stat().st_size == 0:
        raise FileFormatError(f"{path}: the file is empty", "Download or write it again")
    return path


def sha256(path: PathLike) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(require_file(path), "rb") as handle:
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


def _folder_remedy(folder: Path) -> str:
    """What to do with a folder that was given for a file."""
    if (folder / "adapter_config.json").is_file():
        given = f"safegene-edge convert {folder} --base MODEL.gguf -o ADAPTER.gguf"
        return f"It holds a PEFT or MLX adapter: convert it first with `{given}`"
    if (folder / "config.json").is_file():
        return "It holds a Hugging Face model: convert it with llama.cpp's convert_hf_to_gguf.py"
    return "Give a file"


def check_output(path: PathLike, inputs: Iterable[PathLike] = ()) -> Path:
    """Raise OutputError where `path` cannot become a file, or is one of the inputs."""
    path = Path(path)
    for source in inputs if path.exists() else ():
        local = resolve(source)
        if local.exists() and path.samefile(local):
            raise OutputError(f"{path}: is also an input", "Name another output")
    if path.is_dir():
        raise OutputError(f"{path}: is a folder", "Name an output file")
    _require_parent(path)
    return path


@contextmanager
def atomic_output(path: PathLike, inputs: Iterable[PathLike] = ()) -> Iterator[Path]:
    """A temporary path in the output's folder, renamed to `path` when the block succeeds.

    A reader sees the old file or the whole new one. When the block raises, nothing is left.
    """
    path = check_output(path, inputs)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        _settle(temporary, [temporary], 0o666)
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def _require_parent(path: Path) -> None:
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"{path}: the folder {folder} does not exist", "Create it first")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{path}: the folder {folder} is not writable", "Choose another")


def _settle(made: Path, files: Iterable[Path], mode: int) -> None:
    """Write files through to the disk, and give what was made the mode that the user's mask allows.

    mkstemp's 0600 would surprise whoever shares the file.
    """
    for file in files:
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())
    umask = os.umask(0)
    os.umask(umask)
    made.chmod(mode & ~umask)


def write_text(path: PathLike, text: str, inputs: Iterable[PathLike] = ()) -> None:
    """Write a text file atomically, as UTF-8."""
    with atomic_output(path, inputs) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_folder(folder: PathLike) -> Path:
    """Raise OutputError where `folder` cannot be made, or holds something."""
    folder = Path(folder)
    if folder.is_dir():
        if any(folder.iterdir()):
            raise OutputError(f"{folder}: the folder is not empty", "Name a new folder")
    elif folder.exists() or folder.is_symlink():
        raise OutputError(f"{folder}: is not a folder", "Name a new folder")
    _require_parent(folder)
    return folder


@contextmanager
def atomic_folder(folder: PathLike) -> Iterator[Path]:
    """A temporary folder beside `folder`, renamed to it when the block succeeds."""
    folder = check_folder(folder)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
    try:
        yield temporary
        _settle(temporary, temporary.iterdir(), 0o777)
        if folder.exists():
            folder.rmdir()  # empty, as checked; not every system renames over an empty folder
        os.replace(temporary, folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
