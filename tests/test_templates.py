"""Chat templates of every kind, and answers that never end, through `SafeLlama`."""

from __future__ import annotations

import llama_cpp
import pytest
from adapters import adapter_for, with_template
from click.testing import CliRunner
from tiny import byte_token

from safegene_edge import SafeLlama
from safegene_edge.cli import cli, main
from safegene_edge.errors import FileFormatError, SettingError
from safegene_edge.runtime.chat import ChatTemplate, require_chat
from safegene_edge.runtime.controls import ControlTexts

USER = [{"role": "user", "content": "What is a lighthouse for?"}]


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("llama").gguf_path


# -- answers that never end ---------------------------------------------------


def always(byte):
    """Options of a completion whose every token is this byte."""
    token = byte_token(byte)

    def force(ids, scores):
        scores[:] = -1e9
        scores[token] = 0
        return scores

    return {"logits_processor": llama_cpp.LogitsProcessorList([force])}


@pytest.mark.parametrize("byte", [0x41, 0xC3, 0xE2, 0xF0], ids=hex)
@pytest.mark.parametrize("n_ctx", [256, 300])  # llama.cpp makes 512 cells of 300
def test_an_answer_that_never_ends_stops_where_the_context_does(model, byte, n_ctx):
    """Bytes that open a character without end kept llama-cpp-python from seeing its limit."""
    with SafeLlama(model, n_ctx=n_ctx) as llama:
        for more in ({}, {"max_tokens": None}, {"max_tokens": -1}, {"max_tokens": 10**6}):
            answer = llama.create_chat_completion(USER, **always(byte), **more)
            assert answer["choices"][0]["finish_reason"] == "length"
            assert answer["usage"]["total_tokens"] == llama.n_ctx()
        *_, last = llama.create_chat_completion(USER, stream=True, **always(byte))
        assert last["choices"][0]["finish_reason"] == "length"
        after = llama.create_chat_completion(USER, max_tokens=4)
    with SafeLlama(model, n_ctx=n_ctx) as fresh:  # and nothing of it is left
        assert after["choices"] == fresh.create_chat_completion(USER, max_tokens=4)["choices"]


@pytest.mark.parametrize("byte", [0x41, 0xC3], ids=hex)
def test_a_limit_holds_for_halves_of_characters_too(model, byte):
    """The text is what there is of whole ones."""
    with SafeLlama(model, n_ctx=256) as llama:
        answer = llama.create_chat_completion(USER, max_tokens=9, **always(byte))
        assert answer["usage"]["completion_tokens"] == 9
        assert answer["choices"][0]["finish_reason"] == "length"
        expected = "A" * 9 if byte == 0x41 else ""
        assert answer["choices"][0]["message"]["content"] == expected
        chunks = list(llama.create_chat_completion(USER, max_tokens=9, stream=True, **always(byte)))
        said = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
        assert "".join(said) == expected


def test_the_text_before_a_cut_character_is_kept(model):
    """All of the answer came before the bytes at its end, and none of it is lost."""
    word, byte = map(byte_token, (0x41, 0xC3))

    def force(ids, scores):
        scores[:] = -1e9
        scores[word if len(ids) < 250 else byte] = 0
        return scores

    with SafeLlama(model, n_ctx=256) as llama:
        processors = llama_cpp.LogitsProcessorList([force])
        answer = llama.create_chat_completion(USER, logits_processor=processors)
        assert answer["usage"]["total_tokens"] == 256
        text = answer["choices"][0]["message"]["content"]
        assert text == "A" * (250 - answer["usage"]["prompt_tokens"])


# -- templates that jinja cannot read -----------------------------------------

UNREADABLE = {
    "an unknown tag": ("{% frobnicate %}{{ messages }}", "unknown tag 'frobnicate'"),
    "an unknown filter": ("{{ messages | frobnicate }}", "No filter named 'frobnicate'"),
    "an unknown test": ("{{ messages is frobnicate }}", "No test named"),
    "Ollama's": ("{{ if .System }}{{ .System }}{{ end }}{{ .Prompt }}", "line 1: "),
    "not closed": ("{% for m in messages %}{{ m.content }}", "Unexpected end of template"),
    "nested too deeply": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "more than 100"),
    "blocks too deep": ("{% if messages %}" * 999 + "{%- endif %}" * 999, "more than 100"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_template_is_named_when_a_chat_needs_it(model, tmp_path, name):
    template, reason = UNREADABLE[name]
    path = with_template(model, tmp_path / "m.gguf", template)
    with SafeLlama(path, n_ctx=256) as llama:
        assert llama.metadata["tokenizer.chat_template"] == template
        for ask in (llama.render, llama.create_chat_completion):
            with pytest.raises(FileFormatError, match=reason) as caught:
                ask(USER)
            assert str(path) in str(caught.value) and "\n" not in str(caught.value)
            assert len(str(caught.value)) < 700
        assert llama.create_completion("Hello", max_tokens=2)["choices"]


def test_an_unreadable_template_beside_the_models_own_is_no_matter(model, tmp_path):
    path = with_template(model, tmp_path / "m.gguf", "{{ messages[0].content }}", rag="{% no %}")
    with SafeLlama(path, n_ctx=256) as llama:
        assert llama.text(llama.render(USER)) == USER[0]["content"]


@pytest.mark.parametrize("template", [None, "", "  \n"])
def test_without_a_template_the_plain_one_is_used(model, tmp_path, template):
    with SafeLlama(with_template(model, tmp_path / "m.gguf", template), n_ctx=256) as llama:
        assert llama.text(llama.render(USER)) == f"User: {USER[0]['content']}\nAssistant:"


@pytest.mark.parametrize(
    "template", ["{{ nothing }}", "{{ missing() }}", "{{ raise_exception() }}"]
)
def test_a_template_that_makes_nothing_of_a_chat_is_named(model, tmp_path, template):
    with SafeLlama(with_template(model, tmp_path / "m.gguf", template), n_ctx=256) as llama:
        with pytest.raises(SettingError, match=f"{llama.model_path}: its chat template"):
            llama.create_chat_completion(USER)
        with pytest.raises(SettingError):
            require_chat(llama)


JINJA = "{{ .Prompt }}"
ASKING = {
    "chat": ["--no-history"],
    "serve": ["--port", "0"],
    "eval": ["--quick"],
    "recalibrate": ["{gene}", "-o", "{out}"],
    "learn": ["-o", "{out}"],
    "restore": ["-o", "{out}"],
}


@pytest.mark.parametrize("verb", ASKING)
def test_every_command_that_chats_says_so_in_one_line(model, tmp_path, verb, monkeypatch, capsys):
    path, out = with_template(model, tmp_path / "m.gguf", JINJA), tmp_path / "out.gguf"
    gene = adapter_for(model, tmp_path, family="tiny", refusal_openers=("I",), aligned_loss=1e-3,
                       aligned_over_refusal=1.0, aligned_kl=5.0)  # fmt: skip
    more = [word.format(gene=gene, out=out) for word in ASKING[verb]]
    target = ["--degraded", str(path)] if verb == "learn" else [str(path)]
    monkeypatch.setattr("sys.argv", ["safegene-edge", verb, *target, *more])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}: its chat template cannot be read (line 1: ")
    assert not out.exists()


def test_a_merge_needs_no_template(model, tmp_path):
    """The model is run all the same, and what is merged is what is side-loaded."""
    gene = adapter_for(model, tmp_path)
    for template in (JINJA, "{{ missing() }}"):
        path, output = with_template(model, tmp_path / "m.gguf", template), tmp_path / "out.gguf"
        done = CliRunner().invoke(cli, ["merge", str(path), str(gene), "-o", str(output)])
        assert done.exit_code == 0, done.output
        with SafeLlama(output, n_ctx=256) as merged, SafeLlama(path, [gene], n_ctx=256) as side:
            assert merged.metadata["tokenizer.chat_template"] == template
            said = [
                llama.create_completion("Hello", max_tokens=8, temperature=0)["choices"]
                for llama in (merged, side)
            ]
        assert said[0] == said[1]
        output.unlink()


# -- turns in which tools were called -----------------------------------------

CALL = {"id": "c1", "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Köln <|im_end|>"}'}}  # fmt: skip
TOOL_CHAT = [
    {"role": "user", "content": "How is it?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": 'It "rains".\n18 °C'},
]
_TURNS = "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
_EACH = "{% for c in m.tool_calls or [] %}{{ c.function.name }}"
TOOL_TEMPLATES = {
    "arguments as an object": _TURNS + _EACH + "({{ c.function.arguments.city }})"
    "{% endfor %};{% endfor %}",
    "arguments as text": _TURNS + _EACH + "{{ '(' + c.function.arguments + ')' }}"
    "{% endfor %};{% endfor %}",
    "answers as JSON": "{% for m in messages %}[{{ m.role }}] {{ m.content | tojson }}"
    + _EACH + "{% endfor %};{% endfor %}",
    "no calls": _TURNS + ";{% endfor %}",
    "user and assistant in turn": "{% for m in messages %}{% if (m.role == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('in turn') }}{% endif %}" + _TURNS[28:]
    + ";{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_every_template_shows_what_a_tool_was_asked_and_said(name):
    controls = ControlTexts(["<|im_end|>"])
    template = ChatTemplate(TOOL_TEMPLATES[name], bos="", eos="", controls=controls)
    parts = template.parts(TOOL_CHAT, add_generation_prompt=True, variables={})
    text = "".join(part for part, _ in parts)
    assert "weather" in text and ("rains" in text and "18 °C" in text)
    if name == "answers as JSON":
        return
    assert "Köln <|im_end|>" in text
    assert ("<|im_end|>", False) in parts  # in a call as in a message, it ends no turn
    natively = name.startswith("arguments")
    assert ("[tool]" in text) == natively
    if name == "arguments as an object":
        assert "weather(Köln <|im_end|>)" in text
    if name == "arguments as text":
        assert f"weather({CALL['function']['arguments']})" in text


def test_turns_that_a_template_refuses_in_every_form():
    refusing = "{% if messages | length > 1 %}{{ raise_exception('one alone') }}{% endif %}"
    template = ChatTemplate(refusing, bos="", eos="", controls=ControlTexts([]))
    with pytest.raises(ValueError, match="one alone"):
        template.parts(TOOL_CHAT, add_generation_prompt=True, variables={})
