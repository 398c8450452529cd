from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATML, FORGETTING, GEMMA, LLAMA3, MISTRAL, SPECIAL, TEMPLATES, write_tokenizer

from gpt_core.errors import InputError
from gpt_core.text.chat import Chat, ChatTemplate
from gpt_core.text.finding import open_tokenizer

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}


def turns(template: str, messages: list[dict[str, Any]], first: int = 0) -> list[str]:
    """What the assistant says, by the spans."""
    text, spans = ChatTemplate(template, NAMED, SPECIAL).turns(messages, first=first)
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize(
    ("template", "turn"),
    [
        (CHATML, "{}<|im_end|>"),  # and not the newline behind
        (LLAMA3, "{}<|eot_id|>"),
        (GEMMA, "{}<end_of_turn>"),
        (MISTRAL, " {}</s>"),
        (TEMPLATES["marked"], "{}<|im_end|>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "assistant: {}\n"),  # ends with no token
    ],
)
def test_a_turn_is_what_follows_its_prompt_up_to_its_end(template: str, turn: str) -> None:
    said = ["Hello.", "end", "s", "|", "it ends with </s> and <|im_end|>", "<|eot_id|>"]
    messages = [message for text in said for message in (USER, {"role": "assistant", "content": text})]
    assert turns(template, messages) == [turn.format(text) for text in said]
    assert turns(template, messages, first=5) == [turn.format(text) for text in said[2:]]


def test_a_turn_may_be_a_call_of_a_tool_alone() -> None:
    call = {"role": "assistant", "tool_calls": [{"name": "look_up"}], "content": None}
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or m.tool_calls | tojson }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert turns(template, [USER, call, USER, ANSWER]) == ['[{"name": "look_up"}]<|im_end|>', "Hello.<|im_end|>"]


def test_tokens_of_the_assistant_are_those_of_its_turns(tmp_path: Path) -> None:
    chat = Chat(open_tokenizer(str(write_tokenizer(tmp_path, CHATML))))
    tokenizer = open_tokenizer(str(tmp_path))
    tokens, written = chat.encode_turns([USER, ANSWER, USER, {"role": "assistant", "content": "🎉 Yes."}])
    said = tokenizer.decode(tokens[written].tolist())
    assert said == "Hello.<|im_end|>🎉 Yes.<|im_end|>"
    assert len(tokens) == len(written)
    assert not written[0]


def test_a_turn_that_the_template_rewrites_later_is_refused() -> None:
    messages = [USER, {"role": "assistant", "content": "<think>Hm.</think>\nYes."}, USER, ANSWER]
    with pytest.raises(
        InputError, match=r"message 2: .*does not write this turn as a continuation.*put \{% generation"
    ):
        turns(FORGETTING, messages)
    assert turns(FORGETTING, messages[:2]) == ["<think>Hm.</think>\nYes.<|im_end|>"]


def test_what_was_thought_is_known_by_each_of_its_names_and_null_is_absent() -> None:
    template = ChatTemplate(
        "{{ messages[0].thinking }} {{ messages[0].reasoning_content }} {{ messages[0].x is defined }}"
    )
    for name in ("reasoning_content", "thinking", "reasoning"):
        assert template.render([{"role": "assistant", name: "Hm", "x": None}]) == "Hm Hm False"


def test_the_date_is_the_one_that_is_given() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime(2020, 2, 29))
    assert template.render([USER]) == "29 Feb 2020"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in %}", r"no Jinja template: line 1: Expected an expression"),
        ("{% for m in messages %}\n{{ m.content }}", r"no Jinja template: line 2: .*endfor"),
        ("{% generation %}", "no Jinja template"),
        ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "no Jinja template: too many statically nested blocks"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "no Jinja template"),
        ("x" * (1 << 18) + "x", "has 262,145 characters"),
    ],
)
def test_what_is_no_template_is_said(template: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ChatTemplate(template)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (GEMMA, "refuses the conversation: System role not supported"),
        (MISTRAL, "refuses the conversation: Only user and assistant roles are supported"),
        ("{{ raise_exception('two\nlines') }}", r"refuses the conversation: two\\nlines$"),
        ("{{ messages[0].x.y }}", "fails at the conversation: 'dict object' has no attribute 'x'"),
        ("{{ 1 / 0 }}", "fails at the conversation: division by zero"),
        ("{% include 'other' %}", "fails at the conversation: no loader"),
        ("{{ messages.append(1) }}", "fails at the conversation: .*append.*unsafe"),
        ("{{ ''.__class__.__mro__ }}", "fails at the conversation: access to attribute '__class__'"),
        ("{{ namespace(_x=1) }}", "takes no name with an underscore"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
    ],
)
def test_what_a_template_says_is_passed_on_in_one_line(template: str, message: str) -> None:
    messages = [{"role": "system", "content": "x"}, USER] if template is GEMMA else [{"role": "user", "content": "x"}]
    messages += [{"role": "narrator", "content": "x"}] if template is MISTRAL else []
    with pytest.raises(InputError, match=message) as error:
        ChatTemplate(template, NAMED).render(messages)
    assert "\n" not in str(error.value)


DOUBLED = "{% set ns = namespace(s=START) %}{% for a in range(60) %}{% set ns.s = STEP %}{% endfor %}{{ ns.s }}"
BOMBS = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops whose test leaves out all": (
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}"
    ),
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a macro that calls itself twice": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
    ),
    "a block that calls itself": "{% block a %}{{ self.a() }}{% endblock %}",
    "a loop that calls itself": "{% for a in [1] recursive %}{{ loop([a]) }}{% endfor %}",
    "lists of long ranges": "{% for a in range(99999) %}{% set x = range(99999)|list %}{% endfor %}",
    "generators": "{% for a in range(99999) %}{% set x = range(99999)|select('none')|list %}{% endfor %}",
    "a doubled text": DOUBLED.replace("START", "'x'").replace("STEP", "ns.s ~ ns.s"),
    "a sum of texts": DOUBLED.replace("START", "'x'").replace("STEP", "ns.s + ns.s"),
    "a doubled block": DOUBLED.replace("START", "'x'").replace(
        "{% set ns.s = STEP %}", "{% set t %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = t %}"
    ),
    "a square of a square": DOUBLED.replace("START", "10").replace("STEP", "ns.s * ns.s"),
    "a list of itself": DOUBLED.replace("START", "[1]").replace("STEP", "[ns.s, ns.s]"),
    "a pair of itself": DOUBLED.replace("START", "(1,)").replace("STEP", "(ns.s, ns.s)"),
    "an object of itself": DOUBLED.replace("START", "{}").replace("STEP", "{'a': ns.s, 'b': ns.s}"),
    "a dict() of itself": DOUBLED.replace("START", "{}").replace("STEP", "dict(a=ns.s, b=ns.s)"),
    "much output": "{% set s = 'x' * 99999 %}{% for a in range(99999) %}{{ s }}{% endfor %}",
    "much output in a macro": (
        "{% macro m() %}{% for a in range(99999) %}" + "x" * 999 + "{% endfor %}{% endmacro %}{{ m() }}"
    ),
    "long comparisons": "{% set s = 'x' * 99999 %}{% for a in range(99999) %}{% if 'y' in s %}{% endif %}{% endfor %}",
    "slices": "{% set s = 'x' * 99999 %}{% for a in range(99999) %}{% set t = s[1:] %}{% endfor %}",
    "pairs of keys and values": (
        "{% set d = dict.fromkeys(range(9999)) %}{% for a in range(99999) %}{% set x = d.items() %}{% endfor %}"
    ),
    "keys that are pairs of pairs": DOUBLED.replace("range(60)", "range(17)")
    .replace("START", "(1,)")
    .replace("STEP", "(ns.s, ns.s)")
    .replace("{{ ns.s }}", "{% for a in range(99999) %}{% set x = {}[ns.s] %}{% endfor %}"),
    "printing in a filter": DOUBLED.replace("range(60)", "range(17)")
    .replace("START", "[1]")
    .replace("STEP", "[ns.s, ns.s]")
    .replace("{{ ns.s }}", "{% for a in range(99999) %}{% set x = ns.s|upper|length %}{% endfor %}"),
    "comments without end": "{% set s = '<!--' * 99999 %}{% set x = s|striptags %}",
    "keys": "{% for a in range(99999) %}{% set d = dict.fromkeys(range(99999)) %}{% endfor %}",
} | {
    expression: "{{ " + expression + " }}"
    for expression in [
        *("'x' * 10**9", "10**9 * 'x'", "[1] * 10**9", "2 ** (10**9)", "'x'|center(10**9)", "'x'.ljust(10**9)"),
        *("'%999999999d'|format(1)", "'%999999999d' % 1", "'%*d' % (10**9, 1)", "'{:999999999}'.format(1)"),
        *("'{:{}}'.format(1, 10**9)", "[1]|batch(10**9, 'x')|list|length", "[1]|slice(10**9)|list|length"),
        *("'a\nb'|indent(10**9)", "[1]|tojson(indent=10**9)", "strftime_now('%999999999d')", "'\t'.expandtabs(10**9)"),
        *("'%999999999d'.encode() % 1", "1.5|round(10**9, 'ceil')", "'%.999999999f' % 1"),
        *("(5).to_bytes(10**9, 'little')|length", "range(10**9)|list", "('x' * 99999).replace('x', 'x' * 99999)"),
        *("('x' * 99999)|replace('x', 'x' * 99999)", "range(99999)|map('string')|join('x' * 99999)"),
        *("('x' * 99999).join('x' * 99999)", "'x'.zfill(10**9)", "'x'|wordwrap(1, wrapstring='x' * 10**9)"),
    ]
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_template_without_end_or_measure_is_refused(bomb: str) -> None:
    with pytest.raises(InputError, match=r"steps; it loops|without measure|levels deep|Range too big"):
        ChatTemplate(BOMBS[bomb]).render([USER])


def test_how_much_is_too_much_does_not_depend_on_the_time() -> None:
    said = set()
    for _ in range(3):
        with pytest.raises(InputError) as error:
            ChatTemplate("{% for a in range(99999) %}{% for b in messages %}{{ a }}{% endfor %}{% endfor %}").render(
                [{"role": "user", "content": "x"}] * 5
            )
        said.add(str(error.value))
    assert len(said) == 1


def test_a_long_conversation_is_no_bomb() -> None:
    messages = [message for number in range(500) for message in ({**USER, "content": f"{number} " * 200}, ANSWER)]
    text = ChatTemplate(LLAMA3, NAMED, SPECIAL).render(messages)
    assert text.count("<|eot_id|>") == 1001


def test_a_tokenizer_without_a_template_writes_no_conversation(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, None)
    with pytest.raises(
        InputError, match=r"has no chat template, so it writes no conversations; put a chat_template.jinja"
    ):
        Chat(open_tokenizer(str(tmp_path)))
    with pytest.raises(InputError, match="gpt2: this tokenizer has no chat template"):
        Chat(open_tokenizer("gpt2"))


@pytest.mark.parametrize(("template", "turn"), [(CHATML, "Hello.<|im_end|>"), (LLAMA3, "Hello.<|eot_id|>")])
def test_a_conversation_may_begin_with_the_assistant(template: str, turn: str) -> None:
    assert turns(template, [ANSWER]) == [turn]
    assert turns(template, [ANSWER, USER, ANSWER]) == [turn, turn]
