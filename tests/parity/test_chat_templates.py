"""Chat templates against transformers: the same text, ids and turns."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import CONSTRUCTS, FORGETTING, TEMPLATES, conversations, write_tokenizer

from gpt_core.text.chat import Chat
from gpt_core.text.finding import open_tokenizer

KINDS: dict[str, dict[str, bool]] = {
    "chatml": {},
    "llama3": {"tools": True},
    "gemma": {"alternate": True, "system": False},
    "mistral": {"alternate": True},
    "marked": {},
    "forgetting": {},
    "constructs": {},
}
OTHERS = {"forgetting": FORGETTING, "constructs": CONSTRUCTS}
TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "Schlägt nach <&>", "parameters": {}}}]


def peer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer", OTHERS.get(kind) or TEMPLATES[kind])
    chat, theirs = Chat(open_tokenizer(str(folder))), peer(folder)
    seen = set()
    for number, messages in enumerate(conversations(100, **KINDS[kind])):
        tools, prompt = TOOLS if kind == "llama3" and number % 2 else None, number % 3 == 0
        expected = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt)["input_ids"]
        assert chat.encode(messages, add_generation_prompt=prompt, tools=tools) == expected
        seen.add(tuple(expected))
    assert len(seen) > 80


def test_marked_turns_are_those_of_transformers(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer", TEMPLATES["marked"])
    chat, theirs = Chat(open_tokenizer(str(folder))), peer(folder)
    for messages in conversations(100):
        expected = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True)
        tokens, written = chat.encode_turns(messages)
        assert tokens.tolist() == expected["input_ids"]
        assert written.astype(int).tolist() == expected["assistant_masks"]
        assert written.any() == any(message["role"] == "assistant" for message in messages)


def test_turns_without_marks_are_those_of_the_same_template_with_marks(tmp_path: Path) -> None:
    plain = TEMPLATES["marked"].replace("generation %}", "if %}").replace("{% if %}", "{% if true %}")
    chat = Chat(open_tokenizer(str(write_tokenizer(tmp_path / "plain", plain))))
    theirs = peer(write_tokenizer(tmp_path / "marked", TEMPLATES["marked"]))
    for messages in conversations(60):
        expected = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True)
        tokens, written = chat.encode_turns(messages)
        assert tokens.tolist() == expected["input_ids"]
        np.testing.assert_array_equal(written, np.array(expected["assistant_masks"], bool))


NAMED = [{"name": "tool_use", "template": "a tool"}, {"name": "default", "template": "of a list"}]
PLACES: dict[str, dict[str, Any]] = {
    "a file": {"chat_template.jinja": "of a file"},
    "the config": {"tokenizer_config.json": "of the config"},
    "a list in the config": {"tokenizer_config.json": NAMED},
    "a file goes before the config": {"tokenizer_config.json": NAMED, "chat_template.jinja": "of a file"},
    "the file is the default": {
        "chat_template.jinja": "of a file",
        "additional_chat_templates/tool_use.jinja": "a tool",
        "additional_chat_templates/rag.jinja": "documents",
    },
}


@pytest.mark.parametrize("place", PLACES)
def test_a_template_is_found_where_transformers_finds_it(place: str, tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, None)
    for name, content in PLACES[place].items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".json":
            path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": content}))
        else:
            path.write_text(content)
    text = Chat(open_tokenizer(str(folder))).template.render([{"role": "user", "content": "x"}])
    assert text == peer(folder).apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert text.startswith("of ")
