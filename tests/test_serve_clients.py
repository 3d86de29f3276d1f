"""What clients of OpenAI's API send, and how they spell it, through OpenAI's own client."""

from __future__ import annotations

import openai
import pytest
from adapters import random_adapter, with_template
from serving import running

from safegene_edge import SafeLlama
from safegene_edge.files import sha256

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
MOST = 40  # tokens that the server gives
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
}
CALLED = [
    {"role": "user", "content": "How is it?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "It rains."},
]
WITH_TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }} {{ c.function.arguments.city }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("llama").gguf_path


@pytest.fixture(scope="module")
def gene(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("gene") / "gene.gguf"
    random_adapter(model).save(path)
    return path


@pytest.fixture(scope="module")
def server(model, gene):
    with running(model, gene, ctx=512, max_tokens=MOST, slots=2) as found:
        yield found


@pytest.fixture
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def rendered(model):
    """How many tokens messages are, by the model's own template."""
    with SafeLlama(model, n_ctx=512) as llama:
        yield lambda messages: len(llama.render(messages))


def said(client, messages=HELLO, **options):
    """The choice of an answer."""
    options = {"model": client.models.list().data[0].id, **options}
    answer = client.chat.completions.create(messages=messages, **options)
    return answer.choices[0], answer.usage


def test_several_prompts_are_answered_in_their_order(client):
    texts, options = ["Hello", "A list of", "Hello", "1 2 3"], {"max_tokens": 6, "temperature": 0}
    create = client.completions.create
    model = client.models.list().data[0].id
    together = create(model=model, prompt=texts, **options)
    alone = [create(model=model, prompt=text, **options) for text in texts]
    assert [c.index for c in together.choices] == [0, 1, 2, 3]
    assert [c.text for c in together.choices] == [one.choices[0].text for one in alone]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        counts = [getattr(one.usage, name) for one in alone]
        assert getattr(together.usage, name) == sum(counts)
    with pytest.raises(openai.BadRequestError, match="not streamed") as found:
        create(model=model, prompt=texts, stream=True)
    assert found.value.param == "stream"
    with pytest.raises(openai.BadRequestError, match="do not fit") as found:
        create(model=model, prompt=["Hello", "a b c " * 9000, "Hello"])
    assert found.value.param == "prompt.1"


# -- limits of an answer ------------------------------------------------------


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_limit_beyond_the_servers_is_clamped(client, name):
    for wanted in (MOST + 1, 10**6, 1 << 64):
        choice, usage = said(client, **{name: wanted})
        assert (usage.completion_tokens, choice.finish_reason) == (MOST, "length")
    choice, usage = said(client, **{name: 7})
    assert (usage.completion_tokens, choice.finish_reason) == (7, "length")


def test_what_ends_by_itself_says_stop(client):
    whole, _ = said(client)
    word = whole.message.content[5:9]
    choice, usage = said(client, max_tokens=10**6, stop=[word])
    assert choice.finish_reason == "stop" and usage.completion_tokens < MOST
    assert choice.message.content == whole.message.content.partition(word)[0]


@pytest.mark.parametrize("value", [-1, None])
def test_no_limit_is_the_servers_own(server, value):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = server.post(CHAT, {"messages": HELLO, name: value}).json
        assert answer["usage"]["completion_tokens"] == MOST
    both = {"messages": HELLO, "max_tokens": 3, "max_completion_tokens": value}
    expected = MOST if value == -1 else 3
    assert server.post(CHAT, both).json["usage"]["completion_tokens"] == expected
    bare = server.post("/v1/completions", {"prompt": "Hello"}).json
    raw = server.post("/v1/completions", {"prompt": "Hello", "max_tokens": value}).json
    assert raw["choices"] == bare["choices"]
    assert (
        raw["usage"]["completion_tokens"] > 16
    )  # what completions gave by default in OpenAI's API
    reply = server.post("/v1/responses", {"input": "Hello", "max_output_tokens": value}).json
    assert reply["top_p"] == 0.95  # what it is sampled with
    assert reply["usage"]["output_tokens"] == MOST


def test_an_answer_ends_with_the_context(model):
    """Not at the messages' fault, whatever limit was asked for."""
    with running(model, ctx=256, max_tokens=10_000) as small:
        for wanted in (None, -1, 255, 256, 10_000, 1 << 40):
            choice, usage = said(small.client(), max_tokens=wanted)
            assert (usage.total_tokens, choice.finish_reason) == (256, "length")
        long = [{"role": "user", "content": "ab " * 300}]
        reply = small.post(CHAT, {"messages": long, "max_tokens": 10})
        assert (reply.status, reply.json["error"]["code"]) == (400, "context_length_exceeded")
        assert reply.json["error"]["param"] == "messages"
        raw = small.post("/v1/completions", {"prompt": "ab " * 300})
        assert raw.json["error"]["param"] == "prompt"
        assert small.post("/v1/responses", {"input": long}).json["error"]["param"] == "input"


def test_null_is_absent_in_every_field(server):
    from safegene_edge.serve.schema import IGNORED, NEUTRAL, POLICY, ChatRequest

    names = {*ChatRequest.model_fields, *IGNORED, *NEUTRAL, *POLICY, "made_up"} - {"messages"}
    plain = server.post(CHAT, {"messages": HELLO}).json["choices"]
    nulls = dict.fromkeys(sorted(names))
    assert server.post(CHAT, {"messages": HELLO, **nulls}).json["choices"] == plain
    options = {"stream_options": {"include_usage": None, "unheard_of": None}}
    assert server.post(CHAT, {"messages": HELLO, **options}).json["choices"] == plain
    fields = ["name", "tool_call_id", "tool_calls", "function_call", "refusal", "annotations",
              "audio", "reasoning_content", "unheard_of"]  # fmt: skip
    messages = [{**HELLO[0], **dict.fromkeys(fields)}]
    assert server.post(CHAT, {"messages": messages}).json["choices"] == plain
    parts = [{"type": "text", "text": "Hello", "cache_control": None, "unheard_of": None}]
    messages = [{"role": "user", "content": parts}]
    assert server.post(CHAT, {"messages": messages}).json["choices"] == plain
    for name in ("messages", "model"):
        reply = server.post(CHAT, {"messages": HELLO, name: None})
        assert reply.status == (400 if name == "messages" else 200)


# -- messages -----------------------------------------------------------------


def test_an_answer_is_taken_back_as_it_was_given(client, rendered):
    choice, _ = said(client)
    answer = choice.message.model_dump()
    assert {"refusal", "tool_calls", "function_call"} <= set(answer)
    _, usage = said(client, [*HELLO, answer, *HELLO])
    plain = {"role": "assistant", "content": choice.message.content}
    assert usage.prompt_tokens == rendered([*HELLO, plain, *HELLO])


def test_a_history_of_tool_calls(model, tmp_path):
    """Call and answer reach the model: as its template has them, or written out."""
    knowing = with_template(model, tmp_path / "knowing.gguf", WITH_TOOLS)
    for path in (model, knowing):
        with SafeLlama(path, n_ctx=512) as llama, running(path, ctx=512) as server:
            text = llama.text(llama.render(CALLED))
            assert "weather" in text and "Rome" in text and "It rains." in text
            assert ("<call>weather Rome</call>" in text) == (path == knowing)
            _, usage = said(server.client(), CALLED, max_tokens=1)
            assert usage.prompt_tokens == len(llama.render(CALLED))


def test_roles_and_fields_that_clients_send(client, rendered):
    sent = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "name": "ada", "content": "Hi"},
        {"role": "assistant", "content": "Hey.", "tool_calls": [], "reasoning_content": "Hm.",
         "refusal": None, "annotations": []},
        {"role": "assistant", "content": None, "refusal": "I will not."},
        {"role": "user", "content": [
            {"type": "text", "text": "One", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "Two"},
        ]},
    ]  # fmt: skip
    plain = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hey."),
             ("assistant", "I will not."), ("user", "One\nTwo")]  # fmt: skip
    choice, usage = said(client, sent)
    as_dicts = [{"role": role, "content": content} for role, content in plain]
    assert usage.prompt_tokens == rendered(as_dicts)
    assert choice.message.content == said(client, as_dicts)[0].message.content


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
TEXT = {"type": "text", "text": "x"}


def content(*parts):
    return {"messages": [*HELLO, {"role": "user", "content": list(parts)}]}


FAULTS = {
    "an image": (content(TEXT, IMAGE), "messages.1.content.1", "is an image"),
    "audio": (content({"type": "input_audio", "input_audio": {}}), "messages.1.content.0", "audio"),
    "a file": (content({"type": "file", "file": {}}), "messages.1.content.0", "is a file"),
    "a strange part": (content({"type": "thing"}), "messages.1.content.0", "of type 'thing'"),
    "a part without a type": (content(TEXT, {"text": "x"}), "messages.1.content.1.type", "text"),
    "a text that is none": (content({"type": "text", "text": 5}), "messages.1.content.0.text",
                            "should be a string"),
    "a number as content": ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content",
                            "a string, or a list of parts"),
    "no content": ({"messages": [*HELLO, {"role": "user"}]}, "messages.1.content", "is missing"),
    "a role": ({"messages": [{"role": "robot", "content": ""}]}, "messages.0.role", "developer"),
    "arguments": ({"messages": [{"role": "assistant", "tool_calls": [
        CALL, {"function": {"name": "f", "arguments": 5}}]}]},
        "messages.0.tool_calls.1.function.arguments", "should be a string"),
    "a stop": ({"messages": HELLO, "stop": ["a", 5]}, "stop.1", "string"),
    "stop": ({"messages": HELLO, "stop": 5}, "stop", "a string or a list"),
    "temperature": ({"messages": HELLO, "temperature": "hot"}, "temperature", "number"),
    "stream options": ({"messages": HELLO, "stream_options": {"include_usage": 1}},
                       "stream_options.include_usage", "boolean"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_the_error_names_the_part_at_fault(server, name):
    body, where, why = FAULTS[name]
    reply = server.post(CHAT, body)
    error = reply.json["error"]
    assert (reply.status, error["param"], error["code"]) == (400, where, "invalid_value")
    assert error["message"].startswith(f"{where}: ") and why in error["message"]


# -- paths --------------------------------------------------------------------

BASES = ["/v1", "/v1/", "", "/", "/v1//", "//v1", "/v1/v1"]


@pytest.mark.parametrize("base", BASES)
def test_base_urls_as_people_write_them(server, base):
    client = openai.OpenAI(base_url=server.url + base, api_key="none", max_retries=0)
    assert said(client, max_tokens=2)[0].message.role == "assistant"
    assert client.responses.create(model=None, input="Hello", max_output_tokens=2).output_text
    assert client.models.list().data


def test_paths_with_slashes_too_many(server):
    body = {"messages": HELLO, "max_tokens": 1}
    for path in ("//v1/chat/completions", "/v1/chat/completions/", "/v1//chat//completions//",
                 "/chat/completions", "/chat/completions/"):  # fmt: skip
        assert server.post(path, body).status == 200, path
    for path in ("/v1/models/", "/models", "//models//", "/health/", "//"):
        assert server.ask("GET", path).status == 200, path
    assert 'path="other"' not in "".join(
        line for line in server.ask("GET", "/metrics").body.decode().splitlines() if "200" in line
    )


def test_other_addresses_are_told_where_to_go(server):
    for path in ("/api/chat", "/v1/chat", "/v1/chat/completions/chat/completions", "/v2/responses",
                 "/v1/responses/resp_1", "/completionss"):  # fmt: skip
        reply = server.post(path, {"messages": HELLO})
        assert reply.status == 404
        assert "/v1/chat/completions" in reply.json["error"]["message"]


def test_no_spelling_of_a_path_needs_no_key(model):
    with running(model, api_key="k") as locked:
        for path in ("//v1/models", "/models", "/v1/models/", "//metrics/", "/v1//v1/models"):
            assert locked.ask("GET", path).status == 401, path
        assert locked.post("/chat/completions/", {"messages": HELLO}).status == 401
        assert locked.ask("GET", "//health/").status == 200


# -- the responses API --------------------------------------------------------


def test_a_response_says_what_a_chat_does(client, gene, model):
    choice, usage = said(client, [{"role": "system", "content": "Be kind."}, *HELLO], max_tokens=9)
    answer = client.responses.create(
        model=model.stem, instructions="Be kind.", input="Hello", max_output_tokens=9
    )
    assert answer.output_text == choice.message.content
    assert (answer.object, answer.model, answer.error) == ("response", model.stem, None)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.usage.input_tokens == usage.prompt_tokens
    assert (answer.usage.output_tokens, answer.max_output_tokens) == (9, 9)
    assert answer.usage.total_tokens == usage.total_tokens
    assert answer.system_fingerprint == f"gene-{sha256(gene)[:12]}"
    (message,) = answer.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "incomplete")
    assert answer.id.startswith("resp_") and message.id.startswith("msg_")


def test_a_response_that_ends_by_itself_is_completed(server, client, model):
    text = client.responses.create(model=model.stem, input="Hello").output_text
    answer = server.post("/v1/responses", {"input": "Hello", "stop": [text[5:9]]}).json
    assert answer["status"] == "completed" and answer["incomplete_details"] is None


def test_a_responses_stream_says_the_same(client, model):
    asked = {"model": model.stem, "input": HELLO, "max_output_tokens": 12}
    whole = client.responses.create(**asked)
    with client.responses.create(stream=True, **asked) as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added",
                         "response.content_part.added"]  # fmt: skip
    assert kinds[-4:] == ["response.output_text.done", "response.content_part.done",
                          "response.output_item.done", "response.incomplete"]  # fmt: skip
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = "".join(event.delta for event in events[4:-4])
    assert deltas == events[-4].text == whole.output_text
    last = events[-1].response
    assert last.output_text == whole.output_text and last.usage == whole.usage
    assert {last.id} == {event.response.id for event in events[:2]}
    stop = {"stop": [whole.output_text[5:9]]}  # the helper wants a response that was completed
    with client.responses.stream(extra_body=stop, **asked) as helped:
        helped.until_done()
        final = helped.get_final_response()
    assert final.output_text == whole.output_text.partition(stop["stop"][0])[0]


def test_a_responses_history(client, model):
    """Items of a conversation, with what the server itself answered, and with tool calls."""
    first = client.responses.create(model=model.stem, input="Hello", max_output_tokens=5)
    back = [item.model_dump() for item in first.output]
    items = [{"role": "user", "content": "Hello"}, *back,
             {"role": "user", "content": [{"type": "input_text", "text": "More"}]}]  # fmt: skip
    messages = [*HELLO, {"role": "assistant", "content": first.output_text},
                {"role": "user", "content": "More"}]  # fmt: skip
    answer = client.responses.create(model=model.stem, input=items)
    assert answer.output_text == said(client, messages)[0].message.content
    called = [
        {"role": "user", "content": "How is it?"},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "function_call", "call_id": "call_1", "name": "weather",
         "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "call_1", "output": "It rains."},
    ]  # fmt: skip
    answer = client.responses.create(model=model.stem, input=called)
    assert answer.usage.input_tokens == said(client, CALLED)[1].prompt_tokens


REFUSED = {
    "a prefill": ({"input": [*HELLO, {"role": "assistant", "content": "Sure"}]}, "input", "policy"),
    "an image": ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
                 "input.0.content.0", "invalid_value"),
    "a reference": ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type",
                    "invalid_value"),
    "an earlier response": ({"input": "x", "previous_response_id": "resp_1"},
                            "previous_response_id", "unsupported_value"),
    "a schema": ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "text.format.type",
                 "invalid_value"),
    "tools": ({"input": "x", "tools": [{"type": "web_search"}]}, "tools", "unsupported_value"),
    "in the background": ({"input": "x", "background": True}, "background", "unsupported_value"),
    "no input": ({"instructions": "x"}, "input", "invalid_value"),
    "an empty input": ({"input": []}, "input", "invalid_value"),
    "the gene": ({"input": "x", "gene": 0}, "gene", "policy"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_response_cannot_be_asked(server, name):
    body, param, code = REFUSED[name]
    reply = server.post("/v1/responses", body)
    error = reply.json["error"]
    assert (reply.status, error["param"], error["code"]) == (400, param, code)


def test_a_stream_that_fails_says_so(model):
    """No answer was begun in time: an event of its own kind."""
    with running(model, slots=1, seconds=1e-6) as hasty:
        asked = {"model": model.stem, "input": "Hello"}
        *_, last = hasty.client().responses.create(stream=True, **asked)
        assert (last.type, last.response.status) == ("response.failed", "failed")
        assert "in time" in last.response.error.message
        with pytest.raises(openai.InternalServerError, match="in time"):
            hasty.client().responses.create(**asked)
