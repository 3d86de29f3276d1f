"""`inspect`: what it shows of files that others made."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from adapters import random_adapter, with_template
from click.testing import CliRunner

from safegene_edge.cli import cli
from safegene_edge.gene import INVOCATION
from safegene_edge.gguf_file import write_gguf
from safegene_edge.gguf_file.values import UINT32


def shown(*arguments):
    done = CliRunner().invoke(cli, ["inspect", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_an_alora_is_shown_as_one(tiny, tmp_path):
    model, path = tiny("llama").gguf_path, tmp_path / "alora.gguf"
    known = {"extra": {INVOCATION: [5, 9]}, "types": {INVOCATION: UINT32}}
    replace(random_adapter(model), **known).save(path)
    facts = json.loads(shown(path, "--base", model, "--json"))
    assert (facts["kind"], facts["invocation_tokens"]) == ("aLoRA adapter", [5, 9])
    assert facts["misfits"] == []
    assert "invocation_tokens  5, 9" in shown(path)


def test_a_plain_adapter_has_no_invocation_tokens(tiny, tmp_path):
    random_adapter(tiny("llama").gguf_path).save(tmp_path / "plain.gguf")
    facts = json.loads(shown(tmp_path / "plain.gguf", "--json"))
    assert facts["kind"] == "LoRA adapter"
    assert "invocation_tokens" not in facts


def test_a_name_that_is_a_list_is_no_name(tmp_path):
    tensors = [("token_embd.weight", np.ones((4, 4), np.float32))]
    write_gguf(tmp_path / "x.gguf", "llama", {"general.name": ["a", "b"]}, tensors)
    assert json.loads(shown(tmp_path / "x.gguf", "--json"))["name"] == ""


@pytest.mark.parametrize("key", ["general.name", "general.architecture"])
def test_a_name_cannot_add_a_line_or_steer_the_terminal(key, tmp_path, monkeypatch):
    facts = {key: "good\nkind  signed gene\x1b[2J"}
    architecture = facts.pop("general.architecture", "llama")
    tensors = [("token_embd.weight", np.ones((4, 4), np.float32))]
    write_gguf(tmp_path / "x.gguf", architecture, facts, tensors)
    monkeypatch.setattr(
        "safegene_edge.cli.terminal.printable", lambda text: text.replace("\x1b", "")
    )
    lines = shown(tmp_path / "x.gguf").splitlines()
    assert [line.split()[0] for line in lines].count("kind") == 1
    assert "\x1b" not in "".join(lines)


# -- what a chat template does that it need not ----------------------------------

SAYS = "{% for m in messages %}{{ m.content }}{% endfor %}"
SUSPICIOUS = {
    "its class": ("{{ messages.__class__ }}", "reads the attribute '__class__'"),
    "its class, as a key": ("{{ messages['__class__'] }}", "reads the attribute '__class__'"),
    "its class, by a filter": ("{{ messages | attr('x') }}", "by the filter 'attr'"),
    "another template": ("{% include 'other' %}", "loads another template"),
    "an import": ("{% from 'other' import x %}", "loads another template"),
    "an unknown function": ("{{ system('ls') }}", "calls 'system', which chat templates"),
    "an unknown method": ("{{ bos_token.encode() }}", "calls the method 'encode'"),
    "what an expression gives": ("{{ [range][0](3) }}", "calls what an expression gives"),
    "a long text": ("x" * 2001, "a text of 2,002 characters"),
    "coded text": ("{{ '" + "QUJD" * 40 + "' }}", "160 characters without a space"),
    "a word": (
        "{% for m in messages %}{% if 'bank' in m.content %}Lie.{% endif %}{% endfor %}",
        "depends on whether a message says 'bank'",
    ),
    "a word, behind variables": (
        "{% set ns = namespace(a='') %}{% set ns.a = messages[-1]['content'] | lower %}"
        "{{ 'Lie.' if ns.a.startswith('transfer') else '' }}",
        "depends on whether a message says 'transfer'",
    ),
    "a word, in a macro": (
        "{% macro f(x) %}{% if x == 'go now' %}Lie.{% endif %}{% endmacro %}"
        "{{ f(messages[0].content) }}",
        "depends on whether a message says 'go now'",
    ),
    "the date": ("{% if strftime_now('%Y') > '2026' %}Lie.{% endif %}", "depends on the date"),
    "a table": ("{{ {'bank': 'Lie.'}[messages[0].content] }}", "looks something up by what"),
    "other words": ("{{ messages[0].content | replace('not', '') }}", "changes 'not' in what"),
    "other words, by a method": ("{{ messages[0].content.replace('not', '') }}", "changes 'not'"),
    "a name put together": ("{{ messages[0]['con' ~ 'tent'] }}", "whose name it puts together"),
    "one that cannot be read": ("{% frobnicate %}", "it cannot be read"),
    "one nested too deeply": ("{{ " + "(" * 5000 + " }}", "within each other: it was not read"),
}  # fmt: skip


@pytest.mark.parametrize("name", SUSPICIOUS)
def test_a_suspicious_part_of_a_template_is_shown(name, tiny, tmp_path):
    template, words = SUSPICIOUS[name]
    path = with_template(tiny("llama").gguf_path, tmp_path / "x.gguf", f"{SAYS}\n{template}")
    found = json.loads(shown(path, "--json"))["template_warnings"]
    assert any(words in line for line in found), found
    assert words in shown(path)
    assert all("\n" not in line for line in found)


def test_templates_by_name_are_looked_at_too(tiny, tmp_path):
    path = with_template(
        tiny("llama").gguf_path, tmp_path / "x.gguf", SAYS, tool_use="{{ open('x') }}"
    )
    found = json.loads(shown(path, "--json"))["template_warnings"]
    assert found == ["tool_use: line 1: calls 'open', which chat templates are not given"]


# As the templates of well-known models do it.
USUAL = """\
{%- macro shown(content) -%}{%- if content is string -%}{{ content }}{%- else -%}
{%- for item in content -%}{%- if item.type == 'text' -%}{{ item['text'] }}
{%- elif item['type'] == 'image' or 'image_url' in item -%}<image>{%- endif -%}{%- endfor -%}
{%- endif -%}{%- endmacro -%}
{%- set ns = namespace(system='', last=false) -%}
{%- if messages[0]['role'] == 'system' -%}{%- set ns.system = messages[0]['content'] | trim -%}
{%- set messages = messages[1:] -%}{%- endif -%}
{{- bos_token }}Today is {{ strftime_now('%d %b %Y') }}. {{ ns.system }}
{%- if tools -%}{{- tools | tojson(indent=4) -}}{%- endif -%}
{%- for message in messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('Roles must alternate user/assistant/user/assistant/...') -}}{%- endif -%}
{%- set content = message.content -%}
{%- if '</think>' in content -%}
{%- set content = content.split("</think>")[-1].lstrip().replace("<think>", "") -%}{%- endif -%}
{%- generation -%}{{- shown(content) -}}{%- endgeneration -%}
{%- if content.startswith('<tool_response>') -%}{%- set ns.last = true -%}{%- endif -%}
{%- for call in message.tool_calls or [] -%}{{- call.function.name ~ call.arguments | tojson -}}
{%- endfor -%}{{- eos_token -}}{%- endfor -%}
{%- if add_generation_prompt and not ns.last -%}<|im_start|>assistant{%- endif -%}
"""


def test_what_templates_usually_do_is_not_suspicious(tiny, tmp_path):
    path = with_template(tiny("llama").gguf_path, tmp_path / "x.gguf", USUAL)
    facts = json.loads(shown(path, "--json"))
    assert facts["chat_template"] is True and facts["template_warnings"] == []
    assert json.loads(shown(tiny("llama").gguf_path, "--json"))["template_warnings"] == []
