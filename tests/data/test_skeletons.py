"""A template that repeats what is said as it stands is told by its text, and then rendered as jinja renders it."""

import itertools
import random

import pytest

from weitiao.data.skeletons import Skeletons, repeats_what_is_said
from weitiao.data.templates import Template, load_template, named_templates

CONTENTS = ["", " ", "\n", " a \n", "{{ eos_token }}", "{% if x %}", "<|im_end|>", "{}", "0", "是的。", "\u2028", "\r\n", "</think>x", "&lt;", "\ud83d", "\ufdd2"]
LOOP = "{% for m in messages %}BODY{% endfor %}"
REPEATS = [
    "{{ m.content }}", "{{ '<' ~ m['role'] ~ '>' ~ m['content'] ~ eos_token }}", "{{ m.role|upper + m.content }}",
    "{{ (m.content if m.role == 'user' else '?') + '\\n' }}", "{% if not loop.last or add_generation_prompt %}{{ m.content }}{% endif %}",
    "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{{ m.content }}", "{{ messages[0].content }}{{ messages|length }}",
    "{% set here = m.role %}{{ here + m.content }}",
]
LOOKS = [
    "{{ m.content|trim }}", "{{ m.content.strip() }}", "{{ m['content'][0] }}", "{% if m.content %}a{% endif %}", "{% if 'x' in m.content %}a{% endif %}",
    "{% set c = m.content %}{{ c }}", "{{ m }}", "{{ m|tojson }}", "{{ messages }}", "{{ m['con' ~ 'tent'] }}", "{{ m.get('content') }}",
    "{% if m.content is string %}a{% endif %}", "{% if m.content == 'a' %}a{% endif %}", "{{ (m.content + 'x')|upper }}", "{{ m.content * 2 }}",
    "{{ '%s' % m.content }}", "{{ m.content or 'none' }}", "{{ loop.previtem.content }}", "{{ loop['nextitem']|length }}", "{% set all = messages %}{{ all }}",
    "{{ raise_exception(m.content) }}", "{% filter upper %}{{ m.content }}{% endfilter %}", "{{ messages[loop.index0].content }}", "{{ m.content|length }}",
    "{% for c in m.content %}{{ c }}{% endfor %}", "{% set ns = namespace(x=m) %}{{ ns.x.content }}", "{{ 1 if m.content else 2 }}", "{{ strftime_now('%d') }}",
    "{{ messages|map(attribute='content')|join }}", "{% set m = {'content': 1} %}{{ m.content }}", "{{ '\ufdd0' }}", "{% set c %}{{ m.content }}{% endset %}{{ c|trim }}",
]


def chats():
    random_ = random.Random(5)
    for count in (1, 2, 3, 5):
        for roles in itertools.product(("system", "user", "assistant", "tool"), repeat=min(count, 3)):
            yield [{"role": role, "content": random_.choice(CONTENTS)} for role in (*roles, *roles[:count - 3])]
    yield from ([{"role": "user", "content": first}, {"role": "assistant", "content": second}] for first in CONTENTS for second in CONTENTS)


def assert_alike(template):
    by_jinja = template._write.write
    for chat, answer_next in itertools.product(chats(), (True, False)):
        try:
            expected = by_jinja(chat, answer_next, None)
        except Exception as refusal:
            with pytest.raises(type(refusal)) as met:
                template._write(chat, answer_next, None)
            assert str(met.value) == str(refusal)
        else:
            assert template._write(chat, answer_next, None) == expected


@pytest.mark.parametrize("name", ["auto", *named_templates()])
def test_named_templates_are_rendered_as_jinja_renders_them(name, tokenizer):
    template = load_template(name, tokenizer)
    assert isinstance(template._write, Skeletons)
    assert_alike(template)


@pytest.mark.parametrize("body", REPEATS)
def test_a_template_that_repeats_is_rendered_by_its_skeletons(body, tokenizer):
    template = Template(tokenizer, "own", LOOP.replace("BODY", body), 0, False)
    assert isinstance(template._write, Skeletons)
    assert_alike(template)


@pytest.mark.parametrize("body", LOOKS)
def test_a_template_that_looks_into_what_is_said_is_rendered_by_jinja(body, tokenizer):
    assert not isinstance(Template(tokenizer, "own", LOOP.replace("BODY", body), 0, False)._write, Skeletons)


def test_messages_of_other_kinds_and_tools_are_left_to_jinja():
    asked = []
    skeletons = Skeletons(lambda messages, answer_next, tools: asked.append(messages) or "by jinja")
    others = [{"role": "user", "content": ["a"]}], [{"role": "user", "content": "a", "name": "b"}], [{"role": "user"}]
    for messages in others:
        assert skeletons(messages, True, None) == "by jinja"
    assert skeletons([{"role": "user", "content": "a"}], True, [{"name": "add"}]) == "by jinja"
    assert len(asked) == 4 and not skeletons.known


def test_a_row_of_roles_is_rendered_once(tokenizer):
    template = load_template("chatml", tokenizer)
    rendered = []
    write = template._write.write
    template._write.write = lambda *these: rendered.append(these) or write(*these)
    for text in "abc":
        assert template.render([{"role": "user", "content": text}], True) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    assert len(rendered) == 1


def test_loops_over_other_things_are_not_taken_for_messages(tokenizer):
    from jinja2 import Environment

    for source in ("{% for m in tools %}{{ m.content }}{% endfor %}", "{% for a, b in messages %}{{ a }}{% endfor %}", "{% macro x(m) %}{{ m }}{% endmacro %}"):
        assert not repeats_what_is_said(Environment().parse(source))
