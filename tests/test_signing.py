"""Signatures in minisign's format: by its own program, by the library, and broken in every way."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from adapters import random_adapter
from click.testing import CliRunner

from safegene_edge import signing
from safegene_edge.cli import cli
from safegene_edge.errors import MissingExtraError, SettingError, SignatureError
from safegene_edge.serve.settings import ServeSettings
from safegene_edge.signing import verify

minisign = pytest.importorskip("minisign", reason="needs the extra sign")

# Made by minisign's author with his program, of the file "test" that holds "test".
KEY = "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3"
SIGNATURE = """\
untrusted comment: signature from minisign secret key
RWQf6LRCGA9i59SLOFxz6NxvASXDJeRtuZykwQepbDEGt87ig1BNpWaVWuNrm73YiIiJbq71Wi+dP9eKL8OC351vwIasSSbXxwA=
trusted comment: timestamp:1555779966\tfile:test
QtKMXWyYcwdpZAlPF7tE2ENJkRd1ujvKjlj1m9RtHTBnZPa5WKU5uWRs5GoP5M/VqE81QFuMKI5k/SfNQUaOAA==
"""


@pytest.fixture
def signed(tmp_path):
    path = tmp_path / "test"
    path.write_bytes(b"test")
    (tmp_path / "test.minisig").write_text(SIGNATURE)
    return path


@pytest.fixture(scope="module")
def pair():
    return minisign.KeyPair.generate()


def sign(path, pair):
    """As `minisign -S` does it."""
    with open(path, "rb") as handle:
        made = pair.secret_key.sign(handle, trusted_comment=f"file:{path.name}")
    path.with_name(f"{path.name}.minisig").write_bytes(bytes(made) + b"\n")
    return pair.public_key.to_base64().decode()


def test_a_signature_of_minisign_itself_is_read(signed, tmp_path):
    found = verify(signed, KEY)
    assert found.comment == "timestamp:1555779966\tfile:test"
    assert found.sha256.startswith("9f86d081884c7d65")
    public = tmp_path / "minisign.pub"
    public.write_text(f"untrusted comment: minisign public key\n{KEY}\n")
    assert verify(signed, str(public)) == found


@pytest.mark.skipif(not shutil.which("minisign"), reason="needs the program minisign")
def test_what_the_program_signs_today_is_read(tmp_path):
    path = tmp_path / "gene.gguf"
    path.write_bytes(bytes(range(256)) * 50)
    public, secret = tmp_path / "key.pub", tmp_path / "key"
    for line in (["-G", "-W", "-p", public, "-s", secret], ["-S", "-s", secret, "-m", path]):
        subprocess.run(["minisign", *line], check=True, capture_output=True)
    assert "file:gene.gguf" in verify(path, str(public)).comment


def another_byte(text):
    lines = text.splitlines()
    lines[1] = lines[1][:40] + ("A" if lines[1][40] != "A" else "B") + lines[1][41:]
    return "\n".join(lines)


BROKEN = {
    "no signature": (None, "is not signed"),
    "empty": ("", "is not signed"),
    "another byte": (another_byte(SIGNATURE), "is not what the key"),
    "another comment": (SIGNATURE.replace("file:test", "file:best"), "is not what the key"),
    "text": ("hello", "is no minisign signature"),
    "bytes": (b"\xff\xfe" * 300, "is no minisign signature"),
    "huge": ("a" * 200_000, "is no minisign signature"),
    "cut": (SIGNATURE[:200], "is no minisign signature"),
    "one line more": (SIGNATURE + "x\n", "is no minisign signature"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_signature_is_refused(name, signed):
    content, words = BROKEN[name]
    file = signed.with_name("test.minisig")
    if content is None:
        file.unlink()
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content)
    with pytest.raises(SignatureError, match=words) as caught:
        verify(signed, KEY)
    assert "\n" not in str(caught.value) and str(signed) in str(caught.value)


def test_a_changed_file_or_another_key_is_refused(signed, pair):
    with pytest.raises(SignatureError, match="is not what the key"):
        verify(signed, pair.public_key.to_base64().decode())
    signed.write_bytes(b"tesT")
    with pytest.raises(SignatureError, match="is not what the key"):
        verify(signed, KEY)


@pytest.mark.parametrize("key", ["", "abc", "RWQf", KEY[:-4], "/none/key.pub"])
def test_what_is_no_key_is_named(key, signed):
    with pytest.raises(SettingError, match="neither a minisign public key nor"):
        verify(signed, key)


def test_without_the_library_it_says_what_to_install(signed, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "minisign", None)
    with pytest.raises(MissingExtraError, match=r"safegene-edge\[sign\]"):
        verify(signed, KEY)


def test_inspect_says_who_signed_a_gene(tiny, tmp_path, pair):
    path = tmp_path / "gene.gguf"
    random_adapter(tiny("llama").gguf_path, family="tiny").save(path)
    key = sign(path, pair)
    run = CliRunner().invoke(cli, ["inspect", str(path), "--signed-by", key, "--json"])
    assert json.loads(run.stdout)["signed"] == "file:gene.gguf"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    run = CliRunner().invoke(cli, ["inspect", str(path), "--signed-by", key])
    assert isinstance(run.exception, SignatureError) and not run.stdout


# -- the server ----------------------------------------------------------------


def start(*args, **more):
    from safegene_edge.serve.run import opened

    with opened(*args, **more):
        pass


def test_a_server_that_requires_signatures_takes_only_signed_files(tiny, tmp_path, pair):
    pytest.importorskip("uvicorn")
    model, gene, task = tiny("llama").gguf_path, tmp_path / "gene.gguf", tmp_path / "task.gguf"
    random_adapter(model, family="tiny").save(gene)
    random_adapter(model, seed=1).save(task)
    key = sign(gene, pair)
    settings = ServeSettings(require_signed=key)
    start(model, gene, [], settings)
    with pytest.raises(SignatureError, match=r"task\.gguf: is not signed"):
        start(model, gene, [task], settings)
    sign(task, pair)
    start(model, gene, [task], settings)
    with pytest.raises(SettingError, match="no gene that could be signed"):
        start(model, None, [task], settings)
    random_adapter(model, seed=2, family="tiny").save(gene)  # with the old one's signature
    with pytest.raises(SignatureError, match=r"gene\.gguf: is not what the key"):
        start(model, gene, [task], settings)


def test_a_gene_that_is_changed_after_the_check_is_not_served(tiny, tmp_path, pair, monkeypatch):
    from safegene_edge.serve import run

    model, gene = tiny("llama").gguf_path, tmp_path / "gene.gguf"
    random_adapter(model, family="tiny").save(gene)
    key = sign(gene, pair)

    def swapped(path, key):
        found = signing.verify(path, key)
        random_adapter(model, seed=2, family="tiny").save(gene)
        return found

    monkeypatch.setattr(run, "verify", swapped)
    with pytest.raises(SignatureError, match="was changed while it was loaded"):
        start(model, gene, [], ServeSettings(require_signed=key))
