"""Chat templates of known shape, conversations, and a small tokenizer that knows their tokens: shared by tests."""

import json
import random
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- set date_string = '26 Jul 2024' %}\n{%- endif %}\n"
    "{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = messages[0]['content']|trim %}\n"
    "    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system_message = '' %}\n{%- endif %}\n"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' }}\n"
    "{%- if tools is not none %}\n{%- for t in tools %}\n{{- t | tojson(indent=4) }}\n{%- endfor %}\n{%- endif %}\n"
    "{{- system_message }}\n{{- '<|eot_id|>' }}\n"
    "{%- for message in messages %}\n    {%- if 'tool_calls' in message %}\n"
    "        {%- if not message.tool_calls|length == 1 %}\n"
    "            {{- raise_exception('This model only supports single tool-calls at once!') }}\n        {%- endif %}\n"
    "        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' + message.tool_calls[0] | tojson }}"
    "{{- '<|eot_id|>' }}\n"
    "    {%- elif message.role in ['tool', 'ipython'] %}\n"
    "        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + message.content | tojson + '<|eot_id|>' }}\n"
    "    {%- else %}\n        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' }}\n    {%- endif %}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\n{%- endif %}\n"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}{{- bos_token }}"
    "{%- for message in loop_messages %}{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('After the optional system message, roles must alternate user/assistant') }}{%- endif %}"
    "{%- if message['role'] == 'user' %}{%- if loop.first and system_message is defined %}"
    "{{- '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' }}{%- else %}"
    "{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}{%- elif message['role'] == 'assistant' %}"
    "{{- ' ' + message['content'] + eos_token}}{%- else %}"
    "{{- raise_exception('Only user and assistant roles are supported') }}{%- endif %}{%- endfor %}"
)
MARKED = (
    "{{ bos_token }}{% for message in messages %}\n    {% if message.role == 'assistant' %}\n"
    "{{ '<|im_start|>assistant\n' }}{% generation %}{{ message['content'] }}{{ '<|im_end|>' }}{% endgeneration %}\n"
    "    {% else %}\n{{ '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>' }}\n    {% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETTING = (  # what was thought in earlier turns is left out of the later ones, as Qwen 3 does
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' and not loop.last %}{{ message.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ message.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONSTRUCTS = (  # of Jinja, as many as there are
    "{%- macro typed(spec, null=false) -%}{%- if spec is mapping -%}{%- for name, part in spec.items() %}{{ name }}: "
    "{{ typed(part) }}{{ ', ' if not loop.last }}{% endfor %}{%- elif spec is iterable and spec is not string -%}"
    "{{ spec | join(' | ') }}{%- else %}{{ spec }}{% endif %}{%- endmacro -%}{{ typed({'a': [1, 2], 'b': {}}) }}"
    "{% for m in messages[::-1] if m.role != 'system' %}{{ loop.index }}{{ loop.length }}{{ loop.last }}{% else %}none"
    "{% endfor %}{% for m in messages -%}\n    {%- set later = namespace(n=0) %}{% for n in messages[loop.index:] %}"
    "{% set later.n = later.n + n.content|length %}{% endfor %}{{ '<|im_start|>' ~ m.role ~ later.n }}\n"
    "{{ m['content'].split('</s>')[-1] | trim | replace('a', 'b') }}{{ m.content is string and 'x' in m.content }}\n"
    "{%- endfor %}{{ messages | groupby('role') | map(attribute='grouper') | join(',') }}"
    "{{ messages | map(attribute='role') | unique | sort | list }}{{ (messages | last).role | title | center(12) }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | map('length') | sum }}"
    "{{ '%s-%03d' | format('a', 7) }}{{ '{:>5}|{}'.format(1, 'x') }}{{ messages | batch(2) | list | length }}"
    "{{ range(3) | list }}{{ 7 // 2 }}{{ 2 ** 3 }}{{ -3 | abs }}{{ 'abc'[1:] }}{{ {'a': [1, (2, 3)]} }}{{ 1 < 2 <= 2 }}"
    "{% filter upper %}x{{ messages[0].role }}{% endfilter %}{% set t %}[{{ absent }}]{% endset %}{{ t }}"
    "{% with a = 1 %}{{ a }}{% endwith %}{% for k, v in messages[0] | dictsort %}{{ k }}{% endfor %}"
    "{% for a in [1, 2, 3, 4, 5] %}{% if a == 2 %}{% continue %}{% elif a == 5 %}{% break %}{% endif %}"
    "{{ loop.cycle('o', 'e') }}{{ loop.changed(a > 2) }}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.revindex }}"
    "{% endfor %}{% macro c() %}{{ caller() }}{% endmacro %}{% call c() %}hi{% endcall %}"
    "{{ messages | tojson(indent=2) | indent(4) }}{% for x in [1, [2, [3]]] recursive %}"
    "{{ loop(x) if x is iterable else x }}{% endfor %}{% set j = joiner(', ') %}{{ j() }}{{ j() }}"
    "{% set y = cycler('a', 'b') %}{{ y.next() }}{{ y.next() }}{{ messages[0].get('content', 'z') }}"
    "{{ absent | default('d') }}{{ 3.7 | round | int }}{{ none }}{{ '<a>' | e }}{{ dict(a=1).items() | list }}"
    "{{ messages | first | items | list }}{{ 'X'.lower() }}{% if messages | selectattr('x') %}lazy{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL, "marked": MARKED}

SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"),
]

_CONTENTS = [
    "What is the capital of France?",
    "The capital of France is Paris.",
    "",
    "  spaces in front,\nlines, and spaces behind \n\n",
    "日本語 and Ελληνικά, naïve café",
    "🎉👩‍👩‍👧 emojis 🏳️‍🌈",
    "```python\ndef f(x: int) -> int:\n\treturn x**2  # {{ not }} {% jinja %}\n```",
    "a token of the template: <|im_end|> and </s> and [INST]",
    "<b>HTML</b> & 'quotes' \"double\" \\ backslash",
    '{"json": [1, 2.5, null, true]}',
]


def conversations(count: int, *, alternate: bool = False, system: bool = True, tools: bool = False) -> list[Any]:
    """Different conversations of 1 to 6 turns, in a fixed order; no answer is empty.

    Args:
        count: How many.
        alternate: Whether a person and the assistant take turns, the person first.
        system: Whether some begin with a system's message.
        tools: Whether some call tools, and hear from them.
    """
    draw = random.Random(0)
    made = []
    for number in range(count):
        messages: list[dict[str, Any]] = []
        if system and number % 3 == 0:
            messages.append({"role": "system", "content": draw.choice(["", "Be brief.", draw.choice(_CONTENTS)])})
        for turn in range(draw.randint(1, 6)):
            role = ("user", "assistant")[turn % 2] if alternate else draw.choice(["user", "assistant"])
            content = draw.choice(_CONTENTS)
            messages.append({"role": role, "content": content if content or role == "user" else "Yes."})
        if tools and number % 4 == 0:
            call = {"type": "function", "function": {"name": "look_up", "arguments": {"where": "Zürich", "n": number}}}
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
            messages.append({"role": "tool", "content": draw.choice(_CONTENTS)})
        made.append(messages)
    return made


def write_tokenizer(folder: Path, template: str | None) -> Path:
    """A byte-level tokenizer of some hundred tokens with a chat template, as transformers writes one."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_CONTENTS * 3, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder
