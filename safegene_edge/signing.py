"""Signatures of genes and adapters, in minisign's format: Ed25519, in a file beside the signed one.

Whoever makes a gene signs it with the `minisign` program; `verify` is the other side. A signature
says who made the file, and that it is as it was. It does not say that the gene does any good.
Needs the extra `sign`.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any

from .errors import FileFormatError, MissingExtraError, SettingError, SignatureError
from .files import PathLike, reading, require_file

_LONGEST = 1 << 16  # bytes of a key or a signature; real ones have some hundred


@dataclass(frozen=True)
class Verified:
    """A file that was signed.

    Attributes:
        sha256: of the bytes that were checked, in hexadecimal.
        comment: what the signer says of it; signed, too.
    """

    sha256: str
    comment: str


def verify(path: PathLike, key: str) -> Verified:
    """Check that a file is signed by a key; its signature lies in `path`.minisig.

    Args:
        key: a minisign public key, or the file that holds it.

    Raises:
        SignatureError: it is not signed, or by another key, or was changed since.
        SettingError: the key is none.
        MissingExtraError: the extra `sign` is not installed.
    """
    minisign = _minisign()
    public, data = _public(minisign, key), _read(path)
    file = f"{path}.minisig"
    try:
        text = _read(file, _LONGEST)
    except FileFormatError as error:
        raise SignatureError(
            f"{path}: is not signed ({error.message})",
            f"Sign it with `minisign -Sm {path}`, or get its .minisig from where it came",
        ) from error
    try:
        signature = minisign.Signature.from_bytes(text)
        public.verify(data, signature)
    except minisign.ParseError as error:
        raise SignatureError(f"{file}: is no minisign signature ({error})") from error
    except minisign.VerifyError as error:
        raise SignatureError(
            f"{path}: is not what the key {key} signed ({error})",
            "Do not use it: get the file, its signature and the key anew",
        ) from error
    return Verified(hashlib.sha256(data).hexdigest(), str(signature.trusted_comment))


def _minisign() -> Any:
    try:
        import minisign
    except ImportError as error:
        raise MissingExtraError(
            f"signatures need {error.name}", "Run: pip install 'safegene-edge[sign]'"
        ) from error
    return minisign


def _public(minisign: Any, key: str) -> Any:
    """The key from its text, or from minisign's .pub file."""
    try:
        if os.path.exists(key):  # noqa: PTH110 - of a name too long Path.exists raises
            return minisign.PublicKey.from_bytes(_read(key, _LONGEST))
        return minisign.PublicKey.from_base64(key.strip())
    except (minisign.ParseError, ValueError) as error:
        raise SettingError(
            f"'{key}' is neither a minisign public key nor the file of one ({error})",
            "Give the second line of minisign.pub, or its path",
        ) from error


def _read(path: PathLike, most: int = -1) -> bytes:
    path = require_file(path)
    with reading(path), open(path, "rb") as handle:
        return handle.read(most)
