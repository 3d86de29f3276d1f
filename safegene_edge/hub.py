"""The Hugging Face Hub through its own client: `hf:owner/repo/file.gguf`, wherever a file is read.

The client's cache, token and settings are used as they are: `HF_HUB_OFFLINE=1` takes only what
is cached, `HF_HUB_CACHE` says where. Nothing is asked of the network for any other path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from .errors import FileFormatError, MissingExtraError

PREFIX = "hf:"
FORM = "hf:OWNER/REPO/FILE or hf:OWNER/REPO@REVISION/FILE"
_ADDRESS = re.compile(r"(https?|file|ftp|s3):/")  # one slash: a Path takes the other away
_REPOSITORY = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w.-]+))?")
_SPEC = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w.-]+))?/([^/].*)")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Repository:
    """A repository of models on the Hub.

    Attributes:
        name: OWNER/REPO; revision: a branch, a tag or a commit; None: "main".
    """

    name: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str | os.PathLike[str]) -> Repository | None:
        """What `hf:OWNER/REPO` or `hf:OWNER/REPO@REVISION` names; None for anything else."""
        match = _REPOSITORY.fullmatch(os.fspath(text))
        return cls(match[1], match[2]) if match and ".." not in match[1] else None

    def __str__(self) -> str:
        return f"{PREFIX}{self.name}" + (f"@{self.revision}" if self.revision else "")


def resolve(path: str | os.PathLike[str]) -> Path:
    """The local file behind a path; one that begins with `hf:` is downloaded, or taken cached.

    A revision is a branch, a tag or a commit; without one it is "main". A local file whose own
    name begins with `hf:` is given as `./hf:…`.

    Raises:
        FileFormatError: the name is empty or its form is wrong; or the Hub has no such file, or
            cannot be reached.
        MissingExtraError: huggingface_hub is not installed.
    """
    text = os.fspath(path)
    if not text:
        raise FileFormatError("a file's name is empty", "Name a file")
    if address := _ADDRESS.match(text):
        raise FileFormatError(
            f"{text}: is an address ({address[1]}), not a file", f"Download it, or write {FORM}"
        )
    if not text.startswith(PREFIX):
        local = Path(path)
        return local.absolute() if str(local).startswith(PREFIX) else local
    match = _SPEC.fullmatch(text.replace("\\", "/"))  # a Path on Windows turned the slashes
    if match is None or not {"", ".", ".."}.isdisjoint(match[3].split("/")):
        raise FileFormatError(f"{text}: is no file on the Hugging Face Hub", f"Write {FORM}")
    return _download(match[1], match[2], match[3])


@cache  # one command reads a file several times: always the same one
def _download(repository: str, revision: str | None, file: str) -> Path:
    return download(Repository(repository, revision), file)


def download(repository: Repository, file: str) -> Path:
    """A repository's file in the client's cache; errors as of `resolve`."""
    what, hub = f"{repository}/{file}", _client(f"{repository}/{file}")
    return Path(
        _asked(
            what, lambda: hub.hf_hub_download(repository.name, file, revision=repository.revision)
        )
    )


def sizes(repository: Repository) -> dict[str, int]:
    """Every file of a repository and its bytes; errors as of `resolve`."""
    hub = _client(str(repository))
    found = _asked(
        str(repository),
        lambda: hub.HfApi().model_info(
            repository.name, revision=repository.revision, files_metadata=True
        ),
    )
    return {file.rfilename: file.size or 0 for file in found.siblings or ()}


def upload(
    repository: Repository, files: Mapping[str, Path | bytes], *, message: str, private: bool
) -> str:
    """Write files into a repository in one commit, and make it if need be; its address.

    Raises:
        FileFormatError: the Hub refuses, or cannot be reached.
        MissingExtraError: huggingface_hub is not installed.
    """
    hub = _client(str(repository))
    api = hub.HfApi()
    added = [hub.CommitOperationAdd(name, content) for name, content in files.items()]

    def work() -> str:
        api.create_repo(repository.name, private=private, exist_ok=True)
        made = api.create_commit(
            repository.name, added, commit_message=message, revision=repository.revision
        )
        return str(made.commit_url)

    return _asked(str(repository), work)


def _client(what: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingExtraError(
            f"{what} needs huggingface_hub", "pip install 'safegene-edge[hub]'"
        ) from error
    return huggingface_hub


def _asked(what: str, work: Callable[[], Result]) -> Result:
    """What the client answers; its errors, its transport's and the disk's as one of ours."""
    try:
        return work()
    except Exception as error:
        cause, remedy = _explained(error)
        raise FileFormatError(f"{what}: {cause}", remedy) from error


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
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the Hub is off (HF_HUB_OFFLINE)", "Unset it"
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return "the Hub asks who you are, or does not let you", "Run `hf auth login`"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"the Hub cannot do it ({lines[0]})", "Check the name and the connection"
