"""`hf:owner/repo/file.gguf`, wherever a file is read: the Hugging Face Hub through its own client.

The client's cache, token and settings are used as they are: `HF_HUB_OFFLINE=1` takes only what
is cached, `HF_HUB_CACHE` says where. Nothing is asked of the network for any other path.
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

from .errors import FileFormatError, MissingExtraError

PREFIX = "hf:"
FORM = "hf:OWNER/REPO/FILE or hf:OWNER/REPO@REVISION/FILE"
_SPEC = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w.-]+))?/([^/].*)")


def resolve(path: str | os.PathLike[str]) -> Path:
    """The local file behind a path; one that begins with `hf:` is downloaded, or taken cached.

    A revision is a branch, a tag or a commit; without one it is "main". A local file whose own
    name begins with `hf:` is given as `./hf:…`.

    Raises:
        FileFormatError: the form is wrong, or the Hub has no such file, or cannot be reached.
        MissingExtraError: huggingface_hub is not installed.
    """
    text = os.fspath(path)
    if not text.startswith(PREFIX):
        return Path(path)
    match = _SPEC.fullmatch(text.replace("\\", "/"))  # a Path on Windows turned the slashes
    if match is None or not {"", ".", ".."}.isdisjoint(match[3].split("/")):
        raise FileFormatError(f"{text}: is no file on the Hugging Face Hub", f"Write {FORM}")
    return _download(match[1], match[2], match[3])


@cache  # one command reads a file several times: always the same one
def _download(repository: str, revision: str | None, file: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise MissingExtraError(
            f"{PREFIX}{repository}/{file} needs huggingface_hub",
            "pip install 'safegene-edge[hub]'",
        ) from error
    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except Exception as error:  # the client's own, its transport's, or the disk's
        at = f"@{revision}" if revision else ""
        cause, remedy = _explained(error)
        raise FileFormatError(f"{PREFIX}{repository}{at}/{file}: {cause}", remedy) from error


def _explained(error: Exception) -> tuple[str, str]:
    """Cause and remedy of the client's error; its own messages are paragraphs."""
    from huggingface_hub import errors

    known: tuple[tuple[type[Exception], str, str], ...] = (  # the first that fits is taken
        (
            errors.GatedRepoError,
            "the repository is gated",
            "Accept its terms on the Hub, then run `hf auth login`",
        ),
        (
            errors.RepositoryNotFoundError,
            "there is no such repository, or it is private",
            "Check the name; for a private one run `hf auth login`",
        ),
        (errors.RevisionNotFoundError, "there is no such revision", "Check the part behind the @"),
        (
            errors.LocalEntryNotFoundError,
            "is not in the cache, and the Hub is off (HF_HUB_OFFLINE) or cannot be reached",
            "Go online once, or give a local file",
        ),
        (errors.EntryNotFoundError, "the repository has no such file", "Check the file's name"),
    )
    for kind, cause, remedy in known:
        if isinstance(error, kind):
            return cause, remedy
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"cannot be downloaded ({lines[0]})", "Check the name and the connection"
