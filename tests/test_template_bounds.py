"""Templates that would run for ever or fill the memory end soon, and others render as before."""

from __future__ import annotations

import time

import pytest
import tiny as tiny_models
from adapters import with_template
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from safegene_edge import SafeLlama
from safegene_edge.errors import SettingError
from safegene_edge.runtime.template_bounds import BoundedFormatter, TemplateTooLargeError

HELLO = [{"role": "user", "content": "Hello"}]
SECONDS = 10.0  # each takes less than two here
LOOPS = "{{% for a in {0} %}}{{% for b in {0} %}}{{% for c in {0} %}}{1}{2}{2}{2}"
END = "{% endfor %}"
ENDLESS = {
    "loops": LOOPS.format("range(99999)", "", END),
    "loops over a text": LOOPS.format("'x' * 1000", "", END),
    "long text in loops": LOOPS.format("range(999)", "x" * 5000, END),
    "macros that call themselves": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}"
    "{% endif %}{% endmacro %}{{ m(60) }}",
    "a loop that calls itself": "{% for x in range(99) recursive %}{{ loop(range(99)) }}"
    + END,
    "doubling by ~": "{% set ns = namespace(x='xx') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling by +": "{% set ns = namespace(x='xx') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "a list that doubles": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "a text times": "{{ 'x' * 100000000 }}",
    "times a text": "{{ 100000000 * 'x' }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a wide format": "{{ '%999999999d' | format(1) }}",
    "a wide format by %": "{{ '%999999999d' % 1 }}",
    "a wide format by format": "{{ '{:>9999999999}'.format('a') }}",
    "a wide field of a name": "{{ '%(a(b%))99999d' % {'a(b%)': 1} }}",
    "a wide field behind a sign": "{{ '%l%%99999d' % 1 }}",
    "a wide field of an item": "{{ '{0[}]:99999}'.format({'}': 1}) }}",
    "a precision": "{{ '{:.99999f}'.format(1.5) }}",
    "a width that is given": "{{ '{0:{1}}'.format('a', 999999999) }}",
    "a filter's width": "{{ 'a' | center(9999999999) }}",
    "a method's width": "{{ 'a'.ljust(9999999999) }}",
    "an indent": "{{ 'a\\n' * 100000 | indent(10000000) }}",
    "JSON's indent": "{{ [1, 2] | tojson(indent=1000000000) }}",
    "replacing": "{{ ('a' * 1000000).replace('', 'b' * 1000000) }}",
    "joining": "{{ range(99999) | list | join('x' * 1000000) }}",
    "wrapping": "{{ ('a ' * 100000) | wordwrap(1, wrapstring='y' * 1000000) }}",
    "batches": "{{ [1] | batch(999999999, 0) | list }}",
    "lists written": "{% for k in range(3000) %}{{ range(99999) | list }}{% endfor %}",
}  # fmt: skip


def formatter(template, kind=BoundedFormatter):
    return kind(template=template, eos_token="</s>", bos_token="<s>")


@pytest.mark.parametrize("name", ENDLESS)
def test_what_would_not_end_ends_soon(name):
    start = time.perf_counter()
    with pytest.raises((TemplateTooLargeError, RecursionError)):
        formatter(ENDLESS[name])(messages=HELLO)
    assert time.perf_counter() - start < SECONDS


def test_a_model_with_such_a_template_says_so(tiny, tmp_path):
    model = with_template(tiny("llama").gguf_path, tmp_path / "m.gguf", ENDLESS["loops"])
    with SafeLlama(model) as llama:
        for _ in range(2):  # what was counted is not kept
            with pytest.raises(SettingError, match=r"chat template failed \(it loops more than"):
                llama.render(HELLO)


def test_half_a_character_is_the_templates_fault(tiny, tmp_path):
    template = "{{ messages[0].content }}{{ '\\ud800' }}"
    model = with_template(tiny("llama").gguf_path, tmp_path / "m.gguf", template)
    with SafeLlama(model) as llama, pytest.raises(SettingError, match="chat template failed"):
        llama.render(HELLO)


PLAIN = {
    "a loop's own names": "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}"
    "{{ loop.previtem.content if not loop.first }}{{ loop.revindex0 }}{{ m.content }}{% endfor %}",
    "conditions and else": "{% for m in messages if m.role == 'tool' %}x{% else %}none{% endfor %}",
    "break and continue": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}"
    "{{ m.content }}{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}",
    "macros": "{% macro say(m, x='!') %}{{ m.content }}{{ x }}{% endmacro %}"
    "{% for m in messages %}{{ say(m) }}{{ say(m, x='?') }}{% endfor %}",
    "call blocks": "{% macro box() %}[{{ caller() }}]{% endmacro %}{% call box() %}in{% endcall %}",
    "filters": "{{ messages | map(attribute='content') | join(', ') | upper | trim }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ messages[0] | tojson }}{{ messages | tojson(indent=2) }}{{ none | default('x', true) }}",
    "texts": "{{ 'a' ~ 1 ~ none ~ 'b' }}{{ '%s-%03d' | format('x', 7) }}{{ '-' * 5 }}{{ 7 % 3 }}"
    "{{ '**%s** 12345%%' % 'x' }}{{ '{{\"a\": {}}} 12345'.format(1) }}"
    "{{ '{}: {:>8}'.format('a', 'b') }}{{ 'x'.center(9) }}{{ 2 ** 10 }}{{ 1.5 * 2 }}",
    "values": "{{ none }}{{ true }}{{ [1, 'a'] }}{{ {'a': 1} }}{{ missing }}{{ 1 + 2 }}",
    "slices and sets": "{% set ns = namespace(n=0) %}{% for m in messages[1:] %}"
    "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ messages[::-1][0].content }}",
    "blocks": "{% filter upper %}a{{ messages[0].content }}{% endfilter %}"
    "{% set x %}b{{ messages[0].role }}{% endset %}{{ x }}{% generation %}g{% endgeneration %}",
    "nested loops": "{% for m in messages %}{% for c in m.content %}{{ c }}{{ loop.index0 }}"
    "{% endfor %}{% endfor %}",
    "a loop that calls itself": "{% for m in [[1, [2, 3]], 4] recursive %}"
    "{% if m is iterable %}({{ loop(m) }}){% else %}{{ m }}{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_does_end_is_as_without_bounds(name):
    chat = [{"role": role, "content": f"{role} {n}"} for n, role in
            enumerate(("system", "user", "assistant", "user"))]  # fmt: skip
    ours, theirs = (formatter(PLAIN[name], kind)(messages=chat).prompt
                    for kind in (BoundedFormatter, Jinja2ChatFormatter))  # fmt: skip
    assert ours == theirs and ours


@pytest.mark.parametrize("architecture", tiny_models.ARCHITECTURES)
def test_long_chats_are_far_from_every_bound(architecture, tiny):
    model = tiny(architecture).gguf_path
    chat = [{"role": role, "content": "word " * 50} for _ in range(1000)
            for role in ("user", "assistant")]  # fmt: skip
    with SafeLlama(model) as llama:
        assert len(llama.render([*chat, *HELLO])) > 1000
