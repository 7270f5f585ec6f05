"""Templates of strangers: what they cannot end is ended, and what real ones do is not touched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from engines.errors import BundleError, OptionError
from runtime.language.chat_template import ChatTemplate
from tests.faults.trial import bounded

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?  "}]},
    {"role": "assistant", "content": "A cup."},
]
ENDLESS = {
    "nested loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "a wide number": "{{ '%1000000000d' % 1 }}",
    "a width from a value": "{{ '%*d' % (1000000000, 1) }}",
    "a wide format": "{{ '{:1000000000d}'.format(1) }}",
    "a width inside of a format": "{{ '{:{}d}'.format(1, 10**9) }}",
    "a format filter": "{{ '%1000000000d'|format(1) }}",
    "a long text": "{{ 'x' * 1000000000 }}",
    "a text padded": "{{ 'x'.center(1000000000) }}",
    "zeros before a number": "{{ '1'.zfill(1000000000) }}",
    "bytes of a number": "{{ (1).to_bytes(1000000000) }}",
    "a large power": "{{ 9 ** 9 ** 9 }}",
    "squares of squares": "{% set n = namespace(x=9) %}{% for i in range(99) %}"
    "{% set n.x = n.x * n.x %}{% endfor %}",
    "doubling by +": "{% set n = namespace(x='a') %}{% for i in range(99) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by ~": "{% set n = namespace(x='a') %}{% for i in range(99) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by blocks": "{% set n = namespace(x='a') %}{% for i in range(99) %}"
    "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "doubling by join": "{% set n = namespace(x='a') %}{% for i in range(99) %}"
    "{% set n.x = [n.x, n.x]|join %}{% endfor %}",
    "doubling by replace": "{% set n = namespace(x='a') %}{% for i in range(99) %}"
    "{% set n.x = n.x.replace('a', 'aa') %}{% endfor %}",
    "lists of lists, printed": "{% set n = namespace(x=['a']) %}{% for i in range(99) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "lists of lists, compared": "{% set n = namespace(x=['a'], y=['a']) %}{% for i in range(99) %}"
    "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "lists of lists, as JSON": "{% set n = namespace(x=['a']) %}{% for i in range(99) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x|tojson }}",
    "a raised list of lists": "{% set n = namespace(x=['a']) %}{% for i in range(99) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ raise_exception(n.x) }}",
    "macros that call each other": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}"
    "{% endif %}{% endmacro %}{{ f(60) }}",
    "a loop that calls itself": "{% for a in range(99) recursive %}{{ loop(range(99)) }}"
    "{% endfor %}",
    "text in loops": "{% for a in range(9999) %}" + "x" * 9000 + "{% endfor %}",
    "a text that replaces every letter": "{% set a = 'x' * 1000000 %}{{ a.replace('x', a) }}",
    "a filter that replaces": "{% set a = 'x' * 1000000 %}{{ a|replace('x', a) }}",
    "wide indents": "{{ messages|tojson(indent=1000000000) }}",
    "lines indented": "{{ ('\n' * 100000)|indent('x' * 100000, blank=true) }}",
    "a joined generator": "{% set n = namespace(big='x' * 1000000) %}"
    "{{ ([n] * 9999)|map(attribute='big')|join }}",
    "a search in a long list": "{% set xs = range(9999)|list %}{% for a in range(9999) %}"
    "{% if -1 in xs %}{% endif %}{% endfor %}",
    "sorting again and again": "{% set xs = range(9999)|list %}{% for a in range(9999) %}"
    "{% set y = xs|sort %}{% endfor %}",
    "slicing again and again": "{% set xs = 'x' * 1000000 %}{% for a in range(9999) %}"
    "{% set y = xs[1:] %}{% endfor %}",
    "splitting again and again": "{% set xs = 'x ' * 500000 %}{% for a in range(9999) %}"
    "{% set y = xs.split() %}{% endfor %}",
    "long bodies": "{% for a in range(9999) %}" + "{% if a %}{% endif %}" * 9000 + "{% endfor %}",
    "an endless word list": "{{ lipsum(n=1000000000) }}",
    "a wide date": "{{ strftime_now('%1000000000Y') }}",
}
FOREIGN = {
    "another file": "{% include '/etc/passwd' %}",
    "classes": "{{ ''.__class__.__mro__ }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "code of a macro": "{% macro f() %}{% endmacro %}{{ f._func.__code__.co_code.x.y }}",
}


@pytest.fixture(autouse=True)
def limited() -> Iterator[None]:
    with bounded(seconds=20, memory_bytes=1 << 30):
        yield


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_what_does_not_end_is_refused(source: str) -> None:
    with pytest.raises((OptionError, BundleError)):
        ChatTemplate(source, "bundle.json", BundleError).render(messages=MESSAGES)


@pytest.mark.parametrize("source", FOREIGN.values(), ids=FOREIGN)
def test_what_reaches_outside_finds_nothing(source: str) -> None:
    try:
        told = ChatTemplate(source, "bundle.json", BundleError).render(messages=MESSAGES)
    except (OptionError, BundleError):
        return
    assert told == ""


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ x|nosuch }}", "{{" * 9000, "(" * 9, "{{ " + "(" * 9000]
)
def test_what_does_not_compile_is_told(source: str) -> None:
    if source == "(" * 9:
        assert ChatTemplate(source, "t", BundleError).render() == source
        return
    with pytest.raises(BundleError, match="the chat template is not valid Jinja"):
        ChatTemplate(source, "bundle.json", BundleError)


REAL = {
    "loops": "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.first }}"
    "{{ loop.last }}{% if loop.previtem %}{{ loop.previtem.role }}{% endif %} {{ m.role }}\n"
    "{% else %}none{% endfor %}",
    "namespaces": "{% set ns = namespace(n=0) %}{% for m in messages if m.role != 'system' %}"
    "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "slices": "{% set rest = messages[1:] %}{{ rest|length }}{{ messages[0]['content'][:2] }}",
    "filters": "{{ messages|map(attribute='role')|join(', ') }}{{ messages|tojson(indent=2) }}"
    "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}{{ 'a b '|trim|upper }}"
    "{{ {'b': 1, 'a': 2}|dictsort }}{{ [3, 1]|sort|first }}{{ none|default('d') }}",
    "methods": "{{ 'a,b'.split(',') }}{{ ' x '.strip() }}"
    "{{ messages[0].content.replace('b', 'c') }}"
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }} {% endfor %}{{ '{:02d}'.format(7) }}",
    "macros": "{% macro told(m) %}<{{ m.role }}>{{ caller() if caller else '' }}{% endmacro %}"
    "{% for m in messages %}{{ told(m) }}{% endfor %}"
    "{% call told(messages[0]) %}inside{% endcall %}",
    "tests": "{{ x is defined }}{{ messages is iterable }}{{ 'a' is string }}"
    "{{ 4 is divisibleby 2 }}"
    "{{ messages[0].role in ['system', 'user'] }}{{ 3 > 2 >= 2 != 1 }}{{ 'a' not in 'bcd' }}",
    "concatenation": "{{ 'a' ~ 1 ~ none ~ [1] }}{{ '%s-%d' % ('a', 3) }}{{ 'ab' * 2 }}{{ 7 // 2 }}",
    "blocks": "{% set x %}hello {{ messages|length }}{% endset %}{{ x }}"
    "{% filter upper %}b{% endfilter %}"
    "{% generation %}words{% endgeneration %}{% for i in range(9) %}{% if i == 3 %}{% break %}"
    "{% endif %}{{ i }}{% endfor %}",
    "spaces": "{%- for m in messages -%}\n  {{- m.role -}}\n{%- endfor %}\n"
    "\n  {% if true %}\n  a\n  {% endif %}\n",
}


@pytest.mark.parametrize("source", REAL.values(), ids=REAL)
def test_what_templates_do_is_rendered_as_transformers_renders_it(source: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    plain = source.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    (theirs,), _ = render_jinja_template(conversations=[MESSAGES], chat_template=plain)
    ours = ChatTemplate(source, "bundle.json", BundleError)
    assert ours.render(messages=MESSAGES, add_generation_prompt=False) == theirs
    long = [{"role": "user", "content": "word " * 2000}] * 40
    (theirs,), _ = render_jinja_template(conversations=[long], chat_template=plain)
    assert ours.render(messages=long, add_generation_prompt=False) == theirs


def test_limits_do_not_add_up_over_renderings() -> None:
    template = ChatTemplate("{% for i in range(9999) %}x{% endfor %}", "t", BundleError)
    for _ in range(30):
        assert len(template.render()) == 9999
