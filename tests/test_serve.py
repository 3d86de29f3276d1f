"""The server, asked by OpenAI's own client."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import openai
import pytest
from adapters import random_adapter
from serving import running

from safegene_edge.errors import SettingError
from safegene_edge.files import sha256
from safegene_edge.serve import ServeSettings
from safegene_edge.serve.schema import (
    IGNORED,
    NEUTRAL,
    POLICY,
    ChatRequest,
    CompletionRequest,
    ResponseRequest,
)

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
LONG = 4000  # tokens that the tiny model takes seconds for


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("llama", max_position_embeddings=8192).gguf_path


@pytest.fixture(scope="module")
def gene(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("gene") / "gene.gguf"
    random_adapter(model).save(path)
    return path


@pytest.fixture(scope="module")
def server(model, gene):
    with running(model, gene, ctx=8192, max_tokens=5000) as found:
        yield found


@pytest.fixture(scope="module")
def bare(model):
    with running(model) as found:
        yield found


def ask(client, text, stream=False, **options):
    """The text of an answer."""
    options = {"model": client.models.list().data[0].id, "max_tokens": 24, **options}
    messages = [{"role": "user", "content": text}]
    answer = client.chat.completions.create(messages=messages, stream=stream, **options)
    if not stream:
        return answer.choices[0].message.content
    return "".join(chunk.choices[0].delta.content or "" for chunk in answer)


def test_an_answer_in_one_piece(server, gene, model):
    answer = server.client().chat.completions.create(
        model=model.stem, messages=HELLO, max_tokens=9, stop=["\0never"]
    )
    (choice,) = answer.choices
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert choice.message.content
    assert answer.system_fingerprint == f"gene-{sha256(gene)[:12]}"
    assert answer.usage.completion_tokens == 9
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 9
    assert answer.model == model.stem


@pytest.mark.parametrize("chat", [True, False])
def test_a_stream_says_the_same(server, model, chat):
    client = server.client()
    asked = {"messages": HELLO} if chat else {"prompt": "Hello"}
    create = client.chat.completions.create if chat else client.completions.create
    whole = create(model=model.stem, max_tokens=20, **asked)
    usage = {"include_usage": True}
    stream = create(model=model.stem, max_tokens=20, stream=True, stream_options=usage, **asked)
    *chunks, last = list(stream)
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint}
    assert {chunk.id for chunk in chunks} == {last.id}
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert not any(reasons[:-1])
    if chat:
        assert chunks[0].choices[0].delta.role == "assistant"
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == whole.choices[0].message.content
    else:
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_thirty_two_clients_get_the_answers_of_one(server):
    texts = [f"Question number {n}" + " and more" * (n % 7) for n in range(64)]
    client = server.client()
    alone = [ask(client, text) for text in texts]
    assert len(set(alone)) > 32
    barrier = threading.Barrier(32)

    def one(start):
        mine = server.client()
        barrier.wait(30)
        return [ask(mine, texts[n], stream=n % 2 == 0) for n in range(start, 64, 32)]

    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(one, range(32)))
    assert [together[n % 32][n // 32] for n in range(64)] == alone


def test_parts_and_fields_without_effect(server, model):
    client = server.client()
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "Two"}]
    answer = client.chat.completions.create(
        model=model.stem,
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": parts},
        ],
        max_completion_tokens=3,
        n=1,
        user="somebody",
        logprobs=False,
        tools=[],
        response_format={"type": "text"},
        seed=1,
        temperature=0.5,
        top_p=0.9,
    )
    assert 1 <= answer.usage.completion_tokens <= 3


def test_models_health_and_metrics(server, model):
    client = server.client()
    (listed,) = client.models.list().data
    assert client.models.retrieve(model.stem).id == listed.id == model.stem
    assert listed.gene.startswith("gene-")
    assert server.ask("GET", "/health").json == {"status": "ok"}
    ask(client, "count me")
    before = server.ask("GET", "/metrics").body.decode()
    ask(client, "count me, too", max_tokens=7)
    after = server.ask("GET", "/metrics").body.decode()

    def value(text, name):
        return float(next(line for line in text.splitlines() if line.startswith(name)).split()[-1])

    name = "safegene_answer_tokens_total"
    assert value(after, name) - value(before, name) == 7
    requests = f'safegene_requests_total{{path="{CHAT}",status="200"}}'
    assert value(after, requests) - value(before, requests) == 1


# -- the gene is policy -------------------------------------------------------


def test_the_gene_changes_answers_and_they_say_so(server, bare):
    texts = [f"Question {n}" for n in range(5)]
    with_gene = [ask(server.client(), text) for text in texts]
    without = [ask(bare.client(), text) for text in texts]
    assert all(a != b for a, b in zip(with_gene, without, strict=True))
    assert bare.post(CHAT, {"messages": HELLO, "max_tokens": 1}).json["system_fingerprint"] == (
        "no-gene"
    )


OFF = {"lora": [{"id": 0, "scale": 0}], "logit_bias": {"5": 100}, "chat_template": "{{ 1 }}"}
OF_POLICY = [*POLICY, "loras", "lora_adapters", "adapters", "adapter_id", "genes", "gene_scale",
             "control_vectors", "logit_bias", "logits_processors", "chat_template_kwargs",
             "grammar_lazy", "guided_json"]  # fmt: skip
# Would weaken the gene as well, were they known to anything here.
UNKNOWN = ["peft", "safety", "bad_words", "template", "raw", "structured_outputs", "regex",
           "add_generation_prompt", "continue_final_message", "assistant_prefix", "min_tokens",
           "samplers", "id_slot", "prompt_embeds", "input_prefix", "generation",
           "made_up", "Lora", "temperature ", "messages[0]"]  # fmt: skip


ASKED = {
    CHAT: {"messages": HELLO},
    "/v1/completions": {"prompt": "Hello"},
    "/v1/responses": {"input": "Hello"},
}


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
def test_no_field_takes_the_gene_off(server, path):
    asked = ASKED[path]
    for name in OF_POLICY:
        for value in (OFF.get(name, 0), None):
            reply = server.post(path, {**asked, "max_tokens": 5, name: value})
            if reply.status == 200:  # null asks for nothing
                assert value is None
                continue
            error = reply.json["error"]
            assert (reply.status, error["code"], error["param"]) == (400, "policy", name)
    for name in UNKNOWN:
        assert server.post(path, {**asked, "max_tokens": 1, name: None}).status == 200
        reply = server.post(path, {**asked, name: 0})
        error = reply.json["error"]
        assert (reply.status, error["code"], error["param"]) == (400, "unknown_field", name)


def test_fields_without_effect_have_none(server, model):
    plain = server.post(CHAT, {"messages": HELLO, "max_tokens": 8}).json["choices"]
    for name in sorted(IGNORED):
        value = {"lora": 0} if name == "metadata" else "gene=off"
        assert server.post(CHAT, {"messages": HELLO, "max_tokens": 8, name: value}).json[
            "choices"
        ] == (plain)


@pytest.mark.parametrize("request_kind", [ChatRequest, CompletionRequest, ResponseRequest])
def test_every_field_is_of_one_kind(request_kind):
    kinds = [set(request_kind.model_fields), set(POLICY), IGNORED, set(NEUTRAL)]
    for i, kind in enumerate(kinds):
        for other in kinds[i + 1 :]:
            assert not kind & other


def test_compare_is_there_only_when_asked_for(model, gene, server, bare):
    name = f"{model.stem}:no-gene"
    assert server.post(CHAT, {"model": name, "messages": HELLO}).status == 404
    with running(model, gene, compare=True, slots=2) as comparing:
        client = comparing.client()
        assert [m.gene[:4] for m in client.models.list().data] == ["gene", "no-g"]
        for n in range(3):
            text = f"Question {n}"
            assert ask(client, text) == ask(server.client(), text)
            assert ask(client, text, model=name) == ask(bare.client(), text)
        both = [("", True), (name, False)] * 8
        with ThreadPoolExecutor(16) as pool:  # side by side, none crosses over
            texts = list(pool.map(lambda kind: ask(client, "Q", model=kind[0] or model.stem), both))
        assert len(set(texts[::2])) == len(set(texts[1::2])) == 1
        assert texts[0] != texts[1]


def test_chat_only_means_it(model):
    with running(model, chat_only=True) as chatting:
        assert chatting.post("/v1/completions", {"prompt": "x"}).status == 404
        assert chatting.post(CHAT, {"messages": HELLO, "max_tokens": 1}).status == 200


# -- who may ask --------------------------------------------------------------


def test_a_key_is_wanted(model):
    with running(model, api_key="right") as locked:
        with pytest.raises(openai.AuthenticationError):
            ask(locked.client("wrong"), "Hello")
        assert ask(locked.client("right"), "Hello")
        assert locked.ask("GET", "/v1/models", Authorization="bearer right").status == 200
        assert locked.ask("GET", "/v1/models", Authorization="Basic right").status == 401
        for path in ("/v1/models", "/metrics", "/nothing"):
            assert locked.ask("GET", path).status == 401
            assert locked.ask("GET", path, Authorization="Bearer righ").status == 401
        for path in ("/", "/page.js", "/health"):
            assert locked.ask("GET", path).status == 200


def test_pages_of_other_sites_are_kept_out(server):
    body = {"messages": HELLO, "max_tokens": 1}
    for headers in ({"Host": "evil.example"}, {"Host": "evil.example:8080"}, {"Host": ""}):
        assert server.ask("GET", "/v1/models", **headers).status in (400, 403)
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{server.port}.evil.example"):
        assert server.post(CHAT, body, Origin=origin).status == 403
    assert server.post(CHAT, body, Content_Type="text/plain").status == 415
    for charset in ("utf-16", "latin-1", "utf-16; boundary=x"):
        kind = f"application/json; charset={charset}"
        assert server.post(CHAT, body, Content_Type=kind).status == 415
    for kind in ("application/json; charset=UTF-8", 'Application/JSON; Charset="utf-8"'):
        assert server.post(CHAT, body, Content_Type=kind).status == 200
    own = server.post(CHAT, body, Origin=f"http://127.0.0.1:{server.port}")
    assert own.status == 200
    assert not [name for name in own.headers if name.startswith("access-control")]


def test_cors_opens_to_those_named(model):
    friend = "http://localhost:3000"
    with running(model, cors=(friend,), api_key="k") as opened:
        flight = opened.ask("OPTIONS", CHAT, Origin=friend, Access_Control_Request_Method="POST")
        assert flight.status == 200
        assert flight.headers["access-control-allow-origin"] == friend
        assert "authorization" in flight.headers["access-control-allow-headers"]
        asked = "authorization,content-type,x-stainless-os"  # as the openai package sends them
        for names, answer in ((asked, asked), ("x\ty", "authorization, content-type")):
            flight = opened.ask(
                "OPTIONS", CHAT, Origin=friend, Access_Control_Request_Headers=names
            )
            assert flight.headers["access-control-allow-headers"] == answer
        asked = opened.post(CHAT, {"messages": HELLO, "max_tokens": 1}, Origin=friend)
        assert asked.status == 401
        assert opened.ask("OPTIONS", CHAT, Origin="http://localhost:3001").status == 403
    for wrong in ("*", "http://", "http://a/b", "localhost:3000", "http://a b"):
        with pytest.raises(SettingError, match="origin"):
            ServeSettings(cors=(wrong,))


def test_apps_made_of_pages_and_clients_in_containers_are_let_in(model):
    body = {"messages": HELLO, "max_tokens": 1}
    own = "app://obsidian.md"
    with running(model, cors=(own, "http://LOCALHOST:3000"), allow_host=("Docker.Internal",)) as it:
        for origin in (own, "http://localhost:3000"):
            assert it.post(CHAT, body, Origin=origin).status == 200
        assert it.post(CHAT, body, Origin="app://other").status == 403
        for host, status in (("docker.internal:8080", 200), ("docker.internal.evil", 403)):
            assert it.ask("GET", "/v1/models", Host=host).status == status
        assert it.post(CHAT, body, Content_Encoding="Identity").status == 200
    with pytest.raises(SettingError, match="--allow-host http://a is no host's name"):
        ServeSettings(allow_host=("http://a",))


@pytest.mark.parametrize(("cache_ram", "kept"), [(64, True), (0, False)])
def test_a_conversation_that_comes_back_is_not_read_anew(model, cache_ram, kept):
    first, other = ([{"role": "user", "content": word * 40}] for word in ("tree ", "boat "))
    with running(model, slots=1, cache_ram=cache_ram) as server:
        used = [server.post(CHAT, {"messages": messages, "max_tokens": 2}).json["usage"]
                for messages in (first, other, first)]  # fmt: skip
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in used]
    assert cached[2] == (used[0]["prompt_tokens"] - 1 if kept else cached[1])
    with pytest.raises(SettingError, match="cache_ram"):
        ServeSettings(cache_ram=-1)


# -- limits -------------------------------------------------------------------


def begun(server):
    """A connection on which an answer of LONG tokens has begun to come."""
    sock = socket.create_connection(("127.0.0.1", server.port), 30)
    body = json.dumps({"messages": HELLO, "max_tokens": LONG, "stream": True}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    data = b""
    while data.count(b"data: ") < 3:
        data += sock.recv(1 << 16)
    return sock


def test_more_than_may_wait_learn_when_to_come_again(model):
    limits = {"slots": 1, "queue": 1, "ctx": 8192, "max_tokens": LONG}
    with (
        running(model, **limits) as small,
        ThreadPoolExecutor(1) as pool,
        closing(begun(small)),
    ):
        waiting = pool.submit(small.post, CHAT, {"messages": HELLO, "max_tokens": 1})
        while "requests_waiting 1" not in small.ask("GET", "/metrics").body.decode():
            time.sleep(0.01)
        refused = small.post(CHAT, {"messages": HELLO, "max_tokens": 1})
        assert refused.status == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError):
            ask(small.client(), "Hello", max_tokens=1)
        assert small.ask("GET", "/health").status == 200
        assert not waiting.done()
    assert waiting.result().status == 200  # who hung up freed the slot


def idle(server):
    """Wait until nothing is asked, and the counts of answers by how they ended."""
    for _ in range(500):
        shown = server.ask("GET", "/metrics").body.decode()
        if "requests_active 0" in shown and "requests_waiting 0" in shown:
            return dict(re.findall(r'answers_total{reason="(\w+)"} (\d+)', shown))
        time.sleep(0.02)
    raise AssertionError(shown)


def test_more_prompts_than_slots_wait_for_their_turn(model):
    with running(model, slots=2, queue=1, max_tokens=8) as small:
        answer = small.post("/v1/completions", {"prompt": ["a"] * 9, "max_tokens": 3})
        assert [c["index"] for c in answer.json["choices"]] == list(range(9))
        assert idle(small) == {"length": "9"}


def test_who_hangs_up_wants_no_prompt_answered(model):
    with running(model, slots=2, ctx=8192, max_tokens=LONG) as small:
        fields = json.dumps({"prompt": ["a"] * 5, "max_tokens": LONG}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost:{small.port}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(fields)}\r\n\r\n"
        with closing(socket.create_connection(("127.0.0.1", small.port), 30)) as sock:
            sock.sendall(head.encode() + fields)
            while "requests_active 2" not in small.ask("GET", "/metrics").body.decode():
                time.sleep(0.01)
        assert int(idle(small)["cancelled"]) >= 2


def test_time_is_limited(model):
    with running(model, slots=1, ctx=8192, max_tokens=LONG, seconds=0.5) as hasty:
        answer = hasty.post(CHAT, {"messages": HELLO, "max_tokens": LONG}).json
        assert answer["choices"][0]["finish_reason"] == "length"
        assert 0 < answer["usage"]["completion_tokens"] < LONG


def test_a_prompt_too_long_is_refused(server):
    reply = server.post(CHAT, {"messages": [{"role": "user", "content": "a b " * 9000}]})
    assert (reply.status, reply.json["error"]["code"]) == (400, "context_length_exceeded")


# -- the command --------------------------------------------------------------


def command(*arguments):
    return [sys.executable, "-m", "safegene_edge", "serve", *map(str, arguments)]


def test_the_command_serves_and_finishes_what_runs(model, gene):
    arguments = (model, "--gene", gene, "--port", 0, "--max-tokens", LONG)
    process = subprocess.Popen(
        command(*arguments),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "SAFEGENE_API_KEY": "k"},
    )
    try:
        assert "loading" in process.stderr.readline()
        url = process.stderr.readline().split()[0]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)
        stream = client.chat.completions.create(
            model=model.stem, messages=HELLO, max_tokens=400, stream=True
        )
        next(stream)
        process.send_signal(signal.SIGTERM)
        *_, last = stream
        assert last.choices[0].finish_reason == "length"
        assert process.wait(20) == 0
        assert process.stdout.read() == ""
    finally:
        process.kill()


def failing(*arguments, before=""):
    """The one line that the command fails with."""
    code = f"{before}\nimport sys\nfrom safegene_edge.cli import main\nmain()"
    line = [sys.executable, "-c", code, "serve", *map(str, arguments)]
    run = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    return run.stderr.splitlines()[-1]


def test_user_mistakes_are_one_line(model, server):
    assert str(server.port) in failing(model, "--port", server.port)
    assert "--gene" in failing(model, "--compare", "--port", 0)
    assert "origin" in failing(model, "--cors", "*")
    assert "no-such" in failing("no-such.gguf", "--port", 0)
    missing = failing(model, before="import sys; sys.modules['fastapi'] = None")
    assert "pip install 'safegene-edge[serve]'" in missing
