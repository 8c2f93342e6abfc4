"""The renderer of chat templates, against Jinja itself where it is installed; hostile templates."""

import time

import pytest

from migician.runtime.render import TemplateError, compile_template

MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "image", "image": ""}, {"type": "text", "text": " where?\n"}]},
    {"role": "assistant", "content": "here"},
]
VARIABLES = {"messages": MESSAGES, "add_generation_prompt": True, "tools": None, "n": 3, "word": "it's"}

TEMPLATES = [
    "",
    "plain text\n",
    "two\n\n",
    "{{ word }} {{ n }} {{ missing }}|{{ none }}|{{ true }}",
    "{{ 'a' ~ n ~ \"b\" }}{{ 'a' + 'b' }}{{ n + 1 }}{{ n - 1 }}{{ -n }}{{ n * 2 }}{{ 7 // 2 }}{{ 7 % 2 }}",
    "{{ 'a\\n\\t\\'\\\\b' }}{{ \"}}\" }}{{ '%}' }}{{ 'x' 'y' }}",
    "{{ 'two\nlines' }}",
    "{{ messages[0].role }}{{ messages[0]['content'] }}{{ messages[-1].content }}{{ messages[9] }}",
    "{{ messages | length }}{{ messages[1:] | length }}{{ messages[::-1][0].role }}{{ word[1:3] }}",
    "{{ '  a ' | trim }}{{ 'a' | upper | lower }}{{ missing | default('d') }}{{ '' | default('e', true) }}",
    "{{ ['a', 'b'] | join(', ') }}{{ [1, 2] | first }}{{ [1, 2] | last }}{{ 'a-b'.split('-') | join }}",
    "{{ ' x '.strip() }}{{ 'ab'.startswith('a') }}{{ 'ab'.replace('a', 'c') }}{{ messages[0].get('role') }}",
    "{{ 'a' in 'abc' }}{{ 'role' in messages[0] }}{{ 4 not in [1, 2] }}{{ 1 < n <= 3 }}",
    "{{ n == 3 and n != 4 or n > 9 }}{{ '' or 'b' }}{{ 'a' and 'c' }}",
    "{{ word is string }}{{ word is not defined }}{{ missing is defined }}{{ tools is none }}{{ n is iterable }}",
    "{{ not missing }}{{ 'yes' if n > 2 else 'no' }}{{ 'yes' if n > 5 }}{{ (n, 2)[0] }}",
    "{{ messages[1].content is mapping }}{{ n is number }}{{ messages | tojson }}",
    "{% if n == 1 %}one{% elif n == 3 %}three{% else %}other{% endif %}",
    "{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ m.role }},{% endfor %}",
    "{% for m in messages if m.role != 'system' %}{{ loop.index }}{{ m['role'] }}{% endfor %}",
    "{% for m in messages %}{% for p in m.content if m.content is not string %}{{ p.type }}{% endfor %};{% endfor %}",
    "{% set x = 1 %}{% for m in messages %}{% set x = x + 1 %}{{ x }}{% endfor %}{{ x }}",
    "{% set ns = namespace(i=0) %}{% for m in messages %}{% set ns.i = ns.i + 1 %}{% endfor %}{{ ns.i }}",
    "{% set text %}a {{ word }} b{% endset %}[{{ text }}]",
    "{% if true %}{% set y = 5 %}{% endif %}{{ y }}",
    "{% for i in range(3) %}{{ i }}{% endfor %}",
    "a\n  {% if true %}\n  b\n  {% endif %}\nc\n",
    "a\n  {%- if true -%}\n  b\n  {%- endif -%}\nc\n",
    "a  {%+ if true %}\n b{% endif +%}\nc",
    "a {#- comment -#} b {# another #}\nc{# last #}\n",
    "  {{- word -}}  x  {{ word }}\n\ny",
    "{% if true %}\r\nwindows\r\n{% endif %}\r\n",
    "{% generation %}{{ word }}{% endgeneration %}",
    "{{ messages | map(attribute='role') | list }}",  # beyond this renderer
    "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(1) }}",
    "{{ missing.attribute }}",
    "{{ raise_exception('roles must alternate') }}",
    "{% for m in messages %}",
    "{{ word",
    "{{ 1 + }}",
    "{{ word + n }}",
]
REFUSED = TEMPLATES[-8:]


@pytest.mark.parametrize("source", TEMPLATES)
def test_the_same_text_as_jinja(source: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    pytest.importorskip("jinja2")
    compiled = getattr(utils, "_compile_jinja_template", None)
    if compiled is None:
        pytest.skip("this transformers compiles templates elsewhere")
    if source in REFUSED:
        with pytest.raises(TemplateError):
            compile_template(source)(VARIABLES)
    else:
        assert compile_template(source)(VARIABLES) == compiled(source).render(**VARIABLES)


def test_what_is_refused_says_why() -> None:
    with pytest.raises(TemplateError, match="roles must alternate"):
        compile_template("{{ raise_exception('roles must alternate') }}")({})
    with pytest.raises(TemplateError, match="'attribute'"):
        compile_template("{{ missing.attribute }}")({})
    with pytest.raises(TemplateError, match="eos_token"):
        compile_template("{{ eos_token }}")({})


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__ }}{{ ().__class__() }}",
        "{{ messages.append(1) }}",
        "{{ (lambda: 1)() }}",
        "{{ [x for x in messages] }}",
        "{{ f'{word}' }}",
        "{{ __import__('os') }}",
        "{{ word.format(1) }}",
        "{{ b'x' ~ 1j }}{{ ... }}",
        "{{ 'a' * 1000000000 }}",
        "{{ 9 ** 9 }}",
        "{{ word is divisibleby(2) }}",
        "{% include 'x' %}",
        "{% import os %}",
        "{% set a.b.c = 1 %}",
        "{% for a, b in messages %}{% endfor %}",
        "{% for m in 5 %}{% endfor %}",
        "{% endif %}",
        "{% %}",
        "{{ }}",
        "{{ 'open }}",
        "{# open",
        "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
        "{{" + "[" * 900 + "]" * 900 + "}}",
        "{{" + "not " * 3000 + "1}}",
        "{{" + "-" * 1900 + "1}}",
        "{% if 1 %}" * 5000,
        "{{ 1" + "+1" * 50_000 + " }}",
        "x" * (1 << 20),
        "{% for i in range(99999999) %}{% endfor %}",
        "{% for i in range(1000) %}{% for j in range(1000) %}{{ i }}{% endfor %}{% endfor %}",
        "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(s=[1, 2]) %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set n = namespace(s='aaaa') %}{% for i in range(99) %}{% set n.s = n.s.replace('a', n.s) %}{% endfor %}",
        "{% set s = 'a' %}{% for i in range(30000) %}{{ 'abcdefghijklmnopqrstuvwxyz' * 1 }}{% endfor %}",
    ],
)
def test_hostile_templates_are_refused_at_once(source: str) -> None:
    start = time.monotonic()
    try:
        text = compile_template(source)(VARIABLES)
    except TemplateError as error:
        assert "\n" not in str(error) and len(str(error)) < 200
    else:
        assert text.strip() in ("", "()", "[]") or "__" in source, text[:80]
    assert time.monotonic() - start < 5


def test_nothing_leads_out_of_the_values() -> None:
    for name in ("word.__class__", "messages[0].__init__", "word['__class__']", "namespace.apply", "messages.append"):
        source = f"{{{{ {name} }}}}"
        assert compile_template(source)(VARIABLES) == ""
