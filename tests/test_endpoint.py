"""Evaluation over the network against real servers, and none without one."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter

import pytest
from adapters import random_adapter

from safegene_edge.cli import cli
from safegene_edge.errors import SettingError
from safegene_edge.evals.asking.chat import Chat
from safegene_edge.evals.asking.endpoint import Endpoint, EndpointError
from safegene_edge.evals.asking.journal import Journal
from safegene_edge.evals.asking.suites import Suite
from safegene_edge.evals.evaluate import evaluate_endpoint
from safegene_edge.evals.settings import EndpointModel, EvalSettings
from safegene_edge.prompts import Prompt

SUITE = Suite("bad", "harmful", tuple(Prompt(str(i), f"question {i}") for i in range(12)))
NO = "I'm sorry, but I can't help with that."


class Scripted(http.server.ThreadingHTTPServer):
    """A chat server on localhost; `behave(text, nth)` gives status, headers, body of a request."""

    daemon_threads = True

    def __init__(self, behave):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behave, self.seen, self.counts = behave, [], Counter()
        self.lock, self.together, self.most = threading.Lock(), 0, 0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __exit__(self, *error):
        self.shutdown()
        super().__exit__(*error)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, server = body["messages"][-1]["content"], self.server
        with server.lock:
            server.counts[text] += 1
            server.seen.append((self.path, body, self.headers.get("Authorization")))
            server.together += 1
            server.most = max(server.most, server.together)
            nth = server.counts[text]
        status, headers, answer = server.behave(text, nth)
        with server.lock:
            server.together -= 1
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def completion(text):
    return 200, {}, {"choices": [{"message": {"role": "assistant", "content": text}}]}


def answer_of(behave, text="hello", **settings):
    with Scripted(behave) as server:
        served = EndpointModel(server.url, "m", pause=0.001, **settings)
        with Endpoint(served, None, EvalSettings(max_tokens=8), Journal()) as endpoint:
            return endpoint.ask("before", [Chat.user(text)])[0].text, server


# -- one request --------------------------------------------------------------


def test_what_is_sent(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    text, server = answer_of(lambda *_: completion("hi"), api_key_variable="MY_KEY")
    assert text == "hi"
    ((path, body, authorization),) = server.seen
    assert (path, authorization) == ("/v1/chat/completions", "Bearer secret")
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 8,
        "temperature": 0,
        "stream": False,
    }


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(status):
    def behave(_text, nth):
        return completion("at last") if nth == 3 else (status, {"Retry-After": "0"}, {})

    text, server = answer_of(behave)
    assert (text, len(server.seen)) == ("at last", 3)


def test_a_server_that_stays_busy_is_named():
    with pytest.raises(EndpointError, match=r"127\.0\.0\.1.*503.*3 times"):
        answer_of(lambda *_: (503, {}, b"overloaded"), retries=2)


@pytest.mark.parametrize(
    ("status", "remedy"), [(401, "OPENAI_API_KEY"), (404, "model 'm'"), (302, "302")]
)
def test_other_refusals_are_final(status, remedy):
    tries = []

    def behave(*_):
        tries.append(1)
        return status, {"Location": "http://127.0.0.1:9/v1"}, b"no"

    with pytest.raises(EndpointError, match=remedy):
        answer_of(behave)
    assert len(tries) == 1


def test_what_is_no_chat_completion():
    for body in (b"<html>", {"choices": []}, {"error": "x"}, b"[]"):
        with pytest.raises(EndpointError, match="no chat completion"):
            answer_of(lambda *_, body=body: (200, {}, body))
    assert answer_of(lambda *_: completion(None))[0] == ""


def test_an_answer_in_parts_is_one_text():
    parts = [{"type": "text", "text": "I can't "}, {"type": "text", "text": "help."}, {"no": 1}]
    assert answer_of(lambda *_: completion(parts))[0] == "I can't help."


def test_a_server_without_system_messages_gets_their_text_before_the_users():
    chat = Chat((("system", "Be kind."), ("user", "hello")))

    def behave(text, _nth):
        if text == "hello":
            return 400, {}, b"System role not supported"
        return completion(text)

    with Scripted(behave) as server:
        served = EndpointModel(server.url, "m", pause=0.001)
        with Endpoint(served, None, EvalSettings(max_tokens=8), Journal()) as endpoint:
            assert endpoint.ask("before", [chat])[0].text == "Be kind.\n\nhello"
    with pytest.raises(EndpointError, match="answered 400"):
        answer_of(lambda *_: (400, {}, b"System role not supported"))


def test_connections_are_closed_between_questions():
    with Scripted(lambda *_: completion("hi")) as server:
        served = EndpointModel(server.url, "m", pause=0.001, concurrency=4)
        with Endpoint(served, None, EvalSettings(max_tokens=8), Journal()) as endpoint:
            for turn in range(5):
                endpoint.ask("before", [Chat.user(f"{turn} {n}") for n in range(8)])
                assert not endpoint._connections._all


def test_a_prompt_too_long_for_the_server_is_unscored():
    message = {"error": {"message": "This exceeds the maximum context length"}}
    assert answer_of(lambda *_: (400, {}, message))[0] is None
    with pytest.raises(EndpointError, match="answered 400"):
        answer_of(lambda *_: (400, {}, b"bad request"))


def test_a_slow_server_times_out():
    def behave(_text, nth):
        if nth == 1:
            time.sleep(0.6)
        return completion("quicker")

    text, server = answer_of(behave, timeout=0.2)
    assert (text, len(server.seen)) == ("quicker", 2)


def test_no_server():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    served = EndpointModel(url, "m", retries=1, pause=0.001)
    with (
        Endpoint(served, None, EvalSettings(max_tokens=8), Journal()) as endpoint,
        pytest.raises(EndpointError, match="cannot be reached"),
    ):
        endpoint.ask("before", [Chat.user("hello")])


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("http://h:1", "/v1/chat/completions"),
        ("http://h:1/", "/v1/chat/completions"),
        ("https://h/api/v1/", "/api/v1/chat/completions"),
        ("http://h/v1/chat/completions", "/v1/chat/completions"),
    ],
)
def test_addresses(url, path):
    assert EndpointModel(url, "m").path == path


def test_a_password_in_an_address_is_refused_and_not_shown():
    with pytest.raises(SettingError, match="names a user before host") as caught:
        EndpointModel("https://me:secret@host/v1", "m")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["localhost:8080", "ftp://h", "http://", "file:///etc/passwd"])
def test_bad_addresses(url):
    with pytest.raises(SettingError, match="no address"):
        EndpointModel(url, "m")


def test_reports_hold_no_credentials():
    assert EndpointModel("https://host:99/v1?key=secret", "m").name == "m at host:99"


# -- an evaluation ------------------------------------------------------------


def refuses_odd(text, _nth):
    time.sleep(0.02)
    return completion(NO if int(text.split()[-1]) % 2 else "Start with a cup of flour and milk.")


def test_before_and_after_concurrently_and_in_order():
    with Scripted(refuses_odd) as one, Scripted(lambda *_: completion(NO)) as two:
        found = evaluate_endpoint(
            EndpointModel(one.url, "plain", concurrency=4),
            EndpointModel(two.url, "gened"),
            suites=[SUITE],
            attacks=["leet"],
            settings=EvalSettings(max_tokens=8, attack_limit=3),
        ).to_json()
    (suite,) = found["suites"]
    assert [p["before"] for p in suite["prompts"]] == ["complied", "refused"] * 6
    assert (suite["before"]["refused"], suite["after"]["refused"]) == (6, 12)
    assert found["model"]["name"].startswith("plain at 127.0.0.1")
    assert 1 < one.most <= 4
    assert len(one.seen) == 12 + 3  # the direct attack's prompts were known already


def test_a_stopped_run_asks_nothing_twice(tmp_path):
    def breaks(text, nth):
        return refuses_odd(text, nth) if int(text.split()[-1]) < 5 else (400, {}, b"broken")

    path = tmp_path / "run.jsonl"
    with Scripted(breaks) as server:
        served = EndpointModel(server.url, "m", concurrency=1)

        def run(journal):
            return evaluate_endpoint(served, suites=[SUITE], journal=journal)

        with Journal(path) as journal, pytest.raises(EndpointError, match="broken"):
            run(journal)
        asked = Counter(server.counts)
        assert sum(asked.values()) == 6
        server.behave = refuses_odd
        with Journal(path) as journal:
            found = run(journal)
        assert found.to_json()["suites"][0]["before"]["total"] == 12
        again = server.counts - asked
        assert sorted(again) == sorted(f"question {i}" for i in range(5, 12))


def test_all_attacks_are_those_that_a_server_can_be_asked():
    with Scripted(lambda *_: completion(NO)) as server:
        found = evaluate_endpoint(
            EndpointModel(server.url, "m"),
            suites=[SUITE],
            attacks=["all"],
            settings=EvalSettings(attack_limit=1),
        )
    names = [attack.name for attack in found.attacks]
    assert "many_shot" in names and not {"prefill", "adaptive"} & set(names)


@pytest.mark.parametrize("flag", ["--quick", "--full"])
def test_quick_and_full_ask_a_server_what_it_can_answer(flag, tmp_path):
    out = tmp_path / "r.json"
    with Scripted(lambda *_: completion(NO)) as server:
        command = ["eval", "--endpoint", server.url, "--model-name", "m", flag, "--limit", "1"]
        cli([*command, "--attack-limit", "1", "--json", str(out), "--no-resume"],
            standalone_mode=False)  # fmt: skip
    names = [attack["name"] for attack in json.loads(out.read_text())["attacks"]]
    assert names[:2] == ["direct", "prefix_injection"]
    assert "prefill" not in names


def test_local_attacks_are_refused():
    with pytest.raises(SettingError, match="'prefill' needs a local model"):
        evaluate_endpoint(EndpointModel("http://h", "m"), suites=[SUITE], attacks=["prefill"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give MODEL"),
        (["m.gguf", "--endpoint", "http://h"], "give MODEL"),
        (["--endpoint", "http://h"], "needs --model-name"),
        (["m.gguf", "--model-name", "x"], "go with --endpoint"),
        (["--endpoint", "http://h", "--model-name", "x", "--gene", "g"], "--gene needs a local"),
        (["m.gguf", "--quick", "--full"], "exclude"),
    ],
)
def test_options_that_exclude_each_other(arguments, message):
    import click

    with pytest.raises(click.UsageError, match=message):
        cli(["eval", *arguments], standalone_mode=False)


def test_against_llama_cpps_own_server(tiny, tmp_path):
    """The Python bindings' server on a tiny model: what it answers is what gets judged."""
    for name in ("fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings"):
        pytest.importorskip(name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--model", tiny("llama").gguf_path, "--port", port, "--n_ctx", 512]
    command = [sys.executable, "-m", "llama_cpp.server", *map(str, options)]
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(f"{url}/v1/models", server)
        suite, out = tmp_path / "s.txt", tmp_path / "r.json"
        suite.write_text("one\ntwo\nthree\n")
        command = ["eval", "--endpoint", url, "--model-name", "tiny", "--suite", suite]
        cli(
            [*map(str, command), "--max-tokens", "4", "--json", str(out), "--no-resume",
             "--concurrency", "2"],
            standalone_mode=False,
        )  # fmt: skip
        (found,) = json.loads(out.read_text())["suites"]
        assert found["before"]["total"] == 3
    finally:
        server.terminate()
        server.wait(20)
        log.close()


def _wait_for(url, server):
    for _ in range(300):
        if server.poll() is not None:
            pytest.fail("the server ended")
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    pytest.fail("the server did not start")


# -- no network ---------------------------------------------------------------

_HOOKED = """
import runpy, sys

def hook(event, arguments):
    if event.startswith("socket."):
        print("NETWORK", event, arguments, file=sys.stderr)

sys.addaudithook(hook)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__") if sys.argv[0].endswith(".py") else \\
    runpy.run_module(sys.argv[0], run_name="__main__")
"""
_OPENS_ONE = "import socket; socket.create_connection(('127.0.0.1', 9), 1)"


@pytest.fixture
def local_eval(tiny, tmp_path, monkeypatch):
    """The arguments of an evaluation that uses most of the package."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, gene, suite = tiny("llama").gguf_path, tmp_path / "g.gguf", tmp_path / "s.txt"
    random_adapter(model).save(gene)
    suite.write_text("one\ntwo\n")
    options = ["--gene", gene, "--suite", suite, "--max-tokens", 2, "--attack", "adaptive"]
    options += ["--attack-limit", 1, "--kl", 2, "--json", tmp_path / "r.json"]
    return ["safegene_edge", "eval", *map(str, (model, *options))]


def test_python_opens_no_socket(local_eval, tmp_path):
    """An audit hook sees every use of Python's socket module."""
    command = [sys.executable, "-c", _HOOKED]
    run = subprocess.run([*command, *local_eval], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "NETWORK" not in run.stderr
    opens = tmp_path / "opens.py"
    opens.write_text(_OPENS_ONE)
    run = subprocess.run([*command, str(opens)], capture_output=True, text=True)
    assert "NETWORK socket.connect" in run.stderr  # the hook does see one


def _traced(command, folder):
    """The network system calls of a command and its children, threads included."""
    log = folder / "trace"
    trace = [
        "strace",
        "-f",
        "--seccomp-bpf",
        "-qq",
        "-e",
        "trace=network",
        "-o",
        str(log),
        *command,
    ]
    run = subprocess.run(trace, capture_output=True, text=True)
    lines = log.read_text().splitlines() if log.exists() else []
    return run, [line for line in lines if "socket(" in line or "connect(" in line]


def test_the_process_opens_no_socket(local_eval, tmp_path):
    """strace sees the system calls of llama.cpp's own code, too."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    run, sockets = _traced([sys.executable, "-c", _OPENS_ONE], tmp_path)
    if not sockets:  # the control: such a call has to show
        pytest.skip(f"strace may not trace here: {run.stderr.strip()[:200]}")
    run, sockets = _traced([sys.executable, "-m", *local_eval], tmp_path)
    assert run.returncode == 0, run.stderr
    assert sockets == []


def test_it_runs_where_there_is_no_network(local_eval):
    apart = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") is None or subprocess.run([*apart, "true"]).returncode:
        pytest.skip("network namespaces are not to be had here")
    command = [*apart, sys.executable, "-m", *local_eval]
    run = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert run.returncode == 0, run.stderr
