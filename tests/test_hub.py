"""`hf:` paths: a real cache laid out as huggingface_hub lays it out, and a hub on this machine."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from adapters import random_adapter

from safegene_edge import Adapter, SafeLlama, SafetyGene, convert, evaluate, hub, to_peft
from safegene_edge.compat import open_model
from safegene_edge.errors import (
    FileFormatError,
    MissingExtraError,
    NoEffectError,
    OutputError,
    SettingError,
)
from safegene_edge.evals.settings import EvalSettings
from safegene_edge.files import check_output, sha256
from safegene_edge.gguf_file import GGUFFile
from safegene_edge.recalibrate import RecalibrationSettings, recalibrate
from safegene_edge.runtime.requantise import requantise

hub_client = pytest.importorskip("huggingface_hub", reason="pip install 'safegene-edge[hub]'")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL, GENE = "hf:acme/tiny/model.gguf", "hf:acme/tiny/genes/gene.gguf"


def fill(cache, repository, files, revision="main"):
    """Lay out a repository as the client caches it: blobs, a ref, and links in a snapshot."""
    home = cache / f"models--{repository.replace('/', '--')}"
    (home / "blobs").mkdir(parents=True, exist_ok=True)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / revision).write_text(COMMIT)
    for name, source in files.items():
        blob = home / "blobs" / sha256(source)
        blob.write_bytes(Path(source).read_bytes())
        link = home / "snapshots" / COMMIT / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    """The model and the gene as local files."""
    gene = tmp_path_factory.mktemp("hub") / "gene.gguf"
    model = tiny("llama").gguf_path
    random_adapter(model, family="tiny").save(gene)
    return {"model.gguf": model, "genes/gene.gguf": gene}


@pytest.fixture()
def cache(files, tmp_path, monkeypatch):
    """A filled cache, and the client offline."""
    folder = tmp_path / "hub"
    fill(folder, "acme/tiny", files)
    monkeypatch.setattr(hub_client.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(hub_client.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))  # for processes that a test starts
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub._download.cache_clear()
    yield folder
    hub._download.cache_clear()


def run(*arguments, text="", **env):
    return subprocess.run(
        [sys.executable, "-m", "safegene_edge", *map(str, arguments)],
        input=text, capture_output=True, text=True, env=os.environ | env, timeout=120,
    )  # fmt: skip


def one_line(finished):
    """The one line on stderr of a command that exited with 2."""
    assert finished.returncode == 2 and finished.stdout == "", finished
    (line,) = finished.stderr.splitlines()
    return line


# -- what is cached is taken ---------------------------------------------------


def test_other_paths_are_left_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # not even imported
    assert hub.resolve("a/b.gguf") == Path("a/b.gguf")
    assert hub.resolve("./hf:a/b/c.gguf") == Path("hf:a/b/c.gguf").absolute()


def test_files_and_revisions_resolve_into_the_snapshot(cache, files):
    fill(cache, "acme/tiny", {"old.gguf": files["genes/gene.gguf"]}, revision="v1.0")
    found = hub.resolve(GENE)
    assert found == cache / "models--acme--tiny" / "snapshots" / COMMIT / "genes/gene.gguf"
    assert hub.resolve(Path(MODEL)).read_bytes() == files["model.gguf"].read_bytes()
    assert hub.resolve("hf:acme/tiny@v1.0/old.gguf").name == "old.gguf"
    assert hub.resolve(f"hf:acme/tiny@{COMMIT}/model.gguf") == hub.resolve(MODEL)


def test_every_way_into_the_api(cache, files, tiny_adapter, tmp_path):
    model, gene = files.values()
    assert GGUFFile(MODEL).tensors.keys() == open_model(MODEL).tensors.keys()
    assert sha256(GENE) == sha256(gene)
    assert Adapter.load(GENE).n_parameters == SafetyGene.load(gene).n_parameters
    with SafeLlama(MODEL, [GENE], n_ctx=128) as llama:
        assert llama.model_path == str(hub.resolve(MODEL))
        llama.attach(GENE, 0.5)
    kwargs = {"suites": ["harmless"], "settings": EvalSettings(limit=2, max_tokens=4)}
    made = convert(tiny_adapter("llama"), base=MODEL, output=tmp_path / "made.gguf")
    assert made.n_parameters
    facts = evaluate(MODEL, tmp_path / "made.gguf", adapters=[GENE], **kwargs).to_json()
    assert (facts["model"]["name"], facts["model"]["sha256"]) == ("model.gguf", sha256(model))
    assert facts["adapters"][0]["sha256"] == sha256(gene)
    facts = evaluate(MODEL, GENE, **kwargs).to_json()
    assert facts["gene"]["sha256"] == sha256(gene)
    to_peft(GENE, MODEL, tmp_path / "peft")
    requantise(MODEL, tmp_path / "f16.gguf", "F16")
    with suppress(NoEffectError, SettingError):  # a random gene may have nothing to give
        known, settings = SafetyGene.load(GENE), RecalibrationSettings(passes=6)
        found = recalibrate(MODEL, known, settings=settings).expression
        assert (found.target, found.gene) == (sha256(model), SafetyGene.load(gene).sha256)


def test_training_takes_them(cache):
    from safegene_edge.training.models import Source

    source = Source.parse(MODEL)
    assert source.base == hub.resolve(MODEL) and source.digest() == sha256(MODEL)


def test_the_parts_of_a_split_model_are_fetched(cache, files):
    """The first part says how many there are; the others come by their names."""
    from safegene_edge.gguf_file import write_gguf

    whole = GGUFFile(files["model.gguf"])
    names, parts = list(whole.tensors), {}
    for number in (1, 2):
        part = cache.parent / f"part-{number}.gguf"
        chosen = names[number - 1 :: 2]
        facts = {"split.count": 2, "split.no": number - 1}
        write_gguf(part, "llama", facts, [(name, whole.floats(name)) for name in chosen])
        parts[f"big-0000{number}-of-00002.gguf"] = part
    fill(cache, "acme/big", parts)
    assert open_model("hf:acme/big/big-00001-of-00002.gguf").tensors.keys() == set(names)


def test_an_output_is_never_a_cached_input(cache):
    with pytest.raises(OutputError, match="also an input"):
        check_output(hub.resolve(GENE), [GENE])


def test_every_command(cache, files, tiny_adapter, tmp_path):
    """Each with HF_HUB_OFFLINE=1 and HF_HUB_CACHE in its environment, as a user has it."""
    assert json.loads(run("inspect", GENE, "--base", MODEL, "--json").stdout)["misfits"] == []
    for command in (
        ("convert", tiny_adapter("llama"), "--base", MODEL, "-o", tmp_path / "a.gguf"),
        ("to-peft", GENE, "--base", MODEL, "-o", tmp_path / "peft"),
        ("eval", MODEL, "--gene", GENE, "--adapter", tmp_path / "a.gguf", "--suite", "harmless",
         "--limit", "1", "--max-tokens", "4", "--json", tmp_path / "r.json"),
        ("report", "verify", tmp_path / "r.json", "--model", MODEL, "--gene", GENE),
        ("chat", MODEL, "--gene", tmp_path / "a.gguf", "--adapter", GENE, "--max-tokens", "2"),
    ):  # fmt: skip
        done = run(*command, text="Hello\n/gene\n")
        assert done.returncode == 0, done.stderr
    # A random gene may have nothing to give; then that is what is said, and no file is amiss.
    rows = [{"prompt": "Sing!", "kind": "harmful"}, {"prompt": "Hum!", "kind": "harmless"}]
    examples = tmp_path / "examples.jsonl"
    examples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = ("--examples", examples)
    assert "refus" in run("recalibrate", MODEL, GENE, "-o", tmp_path / "e.gguf", *few).stderr
    less = ("--passes", "6", "--suite", "harmless", "--suite", "harmful", "--limit", "2")
    done = run("portfolio", MODEL, "--gene", GENE, "-o", tmp_path / "out", *few, *less)
    assert "refus" in done.stdout + done.stderr and (tmp_path / "out" / "model").is_dir()


# -- what is not there is said -------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    ["hf:", "hf:acme", "hf:acme/tiny", "hf:acme/tiny/", "hf:acme/tiny@/m.gguf", "hf:/acme/m.gguf",
     "hf:acme/tiny/../m.gguf", "hf:acme/tiny//m.gguf", "hf:acme/../m.gguf", "hf:a b/c/m.gguf",
     "hf:--acme/tiny/m.gguf", "hf:acme/tiny/./m.gguf"],
)  # fmt: skip
def test_malformed_paths(cache, spec):
    with pytest.raises(FileFormatError) as caught:
        hub.resolve(spec)
    assert spec in str(caught.value)
    assert "hf:OWNER/REPO/FILE" in str(caught.value) or "Repo id" in str(caught.value)


def test_offline_and_not_cached(cache):
    for spec in ("hf:acme/tiny/other.gguf", "hf:acme/none/m.gguf", "hf:acme/tiny@v9/model.gguf"):
        line = one_line(run("inspect", spec))
        assert line.startswith(f"error: {spec}: is not in the cache")


def test_a_cached_file_is_checked_like_any_other(cache):
    blob = hub.resolve(MODEL).resolve()
    blob.write_bytes(blob.read_bytes()[:5000])
    assert "truncated" in one_line(run("inspect", MODEL))


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    hub._download.cache_clear()
    with pytest.raises(MissingExtraError, match=r"pip install 'safegene-edge\[hub\]'"):
        SafetyGene.load(GENE)


# -- a hub on this machine -----------------------------------------------------


@pytest.fixture(scope="module")
def server(files):
    """The part of the Hub's HTTP interface that a download uses; yields its address."""
    content = files["genes/gene.gguf"].read_bytes()
    errors = {"none": (404, "RepoNotFound"), "gated": (403, "GatedRepo")}

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            _, _, repository, _, revision, file = (self.path + "/" * 5).split("/")[:6]
            if (repository, revision, file) == ("tiny", "main", "gene.gguf"):
                self.answer(200, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'}, content)
                return
            other = (404, "RevisionNotFound" if revision != "main" else "EntryNotFound")
            status, code = errors.get(repository, other)
            self.answer(status, {"X-Error-Code": code}, b"")

        do_GET = do_HEAD  # noqa: N815

        def answer(self, status, headers, body):
            self.send_response(status)
            sent = {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **headers}
            for name, value in sent.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


@pytest.fixture()
def online(server, tmp_path):
    return {"HF_ENDPOINT": server, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}


def test_a_download_is_kept(online, files):
    spec = "hf:acme/tiny/gene.gguf"
    shown = json.loads(run("inspect", spec, "--json", **online).stdout)
    assert shown["family"] == "tiny" and online["HF_HUB_CACHE"] in shown["file"]
    assert sha256(shown["file"]) == sha256(files["genes/gene.gguf"])
    again = run("inspect", spec, "--json", **{**online, "HF_HUB_OFFLINE": "1"})
    assert json.loads(again.stdout) == shown


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("hf:acme/none/gene.gguf", "no such repository"),
        ("hf:acme/gated/gene.gguf", "is gated"),
        ("hf:acme/tiny@v9/gene.gguf", "no such revision"),
        ("hf:acme/tiny/other.gguf", "no such file"),
    ],
)
def test_what_the_hub_refuses(online, spec, reason):
    line = one_line(run("inspect", spec, **online))
    assert line.startswith(f"error: {spec}: ") and reason in line


def test_what_is_cached_is_used_when_nobody_answers(cache):
    dead = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    assert json.loads(run("inspect", GENE, "--json", **dead).stdout)["kind"] == "safety gene"
