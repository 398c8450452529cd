"""Conversations as a checkpoint's own chat template writes them: the same text, ids and turns as in transformers."""

import hashlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Bool, UInt32

from gpt_core.errors import InputError, one_line
from gpt_core.text.sandbox import RaisedError, Sandbox, TooMuchError
from gpt_core.text.tokenizer import Tokenizer
from gpt_core.text.tokenizer_file import FileTokenizer

Message = dict[str, Any]
"""At least `role` and, but for calls of tools, `content`."""

Span = tuple[int, int]
"""Of a text: its first character, and the one behind its last."""

_LONGEST = 1 << 18  # characters of a template; those that people have are of 200 to 30,000
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REASONING = ("reasoning_content", "thinking", "reasoning")  # what a message calls what it thought


class ChatTemplate:
    """A Jinja template that makes one text out of a conversation.

    Args:
        source: Its text.
        special_tokens: What it sees of the tokenizer, such as `eos_token`, by name.
        ends: Tokens that may end a turn: all special ones.
        name: What messages call it.
        now: Date and time, as the template sees them.

    Raises:
        InputError: it is no template.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, Any] | None = None,
        ends: Collection[str] = (),
        name: str = "the chat template",
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._special_tokens, self._ends, self.name = dict(special_tokens or {}), tuple(ends), name
        self.marks = _MARKS.search(source) is not None
        """Whether it says itself, with `{% generation %}`, what the assistant writes."""
        if len(source) > _LONGEST:
            raise InputError(f"{name}: has {len(source):,} characters, more than {_LONGEST:,}")
        try:
            self._sandbox = Sandbox(source, now)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"{name}: no Jinja template: line {error.lineno}: {error.message}") from None
        except Exception as error:  # Python's own compiler has limits too, such as twenty blocks in each other
            raise InputError(f"{name}: no Jinja template: {_reason(error)}") from None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: Any = None) -> str:
        """The text of a conversation.

        Args:
            messages: JSON's types alone; at least one.
            add_generation_prompt: Whether the assistant's next turn is begun.
            tools: Descriptions of tools, for templates that know them.

        Raises:
            InputError: the template refuses it (its own message), fails, or does more than it may.
        """
        return self._render(messages, add_generation_prompt, tools)[0]

    def turns(self, messages: Sequence[Message], tools: Any = None, first: int = 0) -> tuple[str, list[Span]]:
        """The text of a conversation, and where in it the assistant speaks.

        These are the places that the template marks. Where it marks none a turn is what follows the prompt of that
        turn, up to and with the token that ends it.

        Args:
            messages: As in `render`.
            tools: As in `render`.
            first: Turns before this message are left out.

        Raises:
            InputError: as in `render`; or a turn does not go on where the conversation before it ends.
        """
        text, marked = self._render(messages, False, tools)
        if self.marks:
            before = len(self._render(messages[:first], False, tools)[1]) if first else 0
            return text, marked[before:]
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        return text, [self._turn(text, messages, number, tools) for number in answers if number >= first]

    def _turn(self, text: str, messages: Sequence[Message], number: int, tools: Any) -> Span:
        prompt = self._prompt(messages, number, tools)
        until = text if number + 1 == len(messages) else self.render(messages[: number + 1], tools=tools)
        if not (until.startswith(prompt) and text.startswith(until)):
            raise InputError(
                f"message {number + 1}: {self.name} does not write this turn as a continuation of what came before, "
                f"so it cannot be told what the assistant says; put {{% generation %}} and {{% endgeneration %}} "
                f"around it in the template"
            )
        content = messages[number].get("content")
        said = content.strip() if isinstance(content, str) else ""
        place = until.find(said, len(prompt))
        behind = len(prompt) if place < 0 else place + len(said)  # a special token may be written in what is said
        ends = [until.rfind(end, behind) + len(end) for end in self._ends if until.rfind(end, behind) >= 0]
        return len(prompt), max(ends, default=len(until))

    def _prompt(self, messages: Sequence[Message], number: int, tools: Any) -> str:
        """What stands before the assistant's words in a message."""
        if number:
            return self.render(messages[:number], add_generation_prompt=True, tools=tools)
        # Few templates render no messages at all. What begins the next turn begins this one too.
        alone = self.render(messages[:1], tools=tools)
        begun = self.render(messages[:1], add_generation_prompt=True, tools=tools).removeprefix(alone)
        before, _, _ = alone.partition(begun) if begun else ("", "", "")
        return before + begun

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool, tools: Any) -> tuple[str, list[Span]]:
        values = {
            **self._special_tokens,
            "messages": [_told(message) for message in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._sandbox.render(values)
        except TooMuchError as error:
            raise InputError(f"{self.name} {error}") from None
        except RaisedError as error:
            raise InputError(f"{self.name} refuses the conversation: {_reason(error)}") from None
        except Exception as error:  # whatever a template may do wrong
            raise InputError(f"{self.name} fails at the conversation: {_reason(error)}") from None


class Chat:
    """Conversations to token ids, by a tokenizer with a chat template.

    Args:
        tokenizer: Out of a file.
        now: Date and time, as its template sees them.

    Raises:
        InputError: it has no chat template, or none that is one.
    """

    def __init__(self, tokenizer: Tokenizer, now: Callable[[], datetime] = datetime.now) -> None:
        source = tokenizer.chat_template
        if not isinstance(tokenizer, FileTokenizer) or source is None:
            raise InputError(
                f"{tokenizer.name}: this tokenizer has no chat template, so it writes no conversations; put a "
                f"chat_template.jinja beside its files, or start from a checkpoint that has one"
            )
        added = tokenizer.backend.get_added_tokens_decoder().values()
        ends = [token.content for token in added if token.special]
        name = f"the chat template of {tokenizer.name}"
        self.template = ChatTemplate(source, tokenizer.special_tokens, ends, name, now)
        self._backend = tokenizer.backend
        self.identity = hashlib.sha256(source.encode()).hexdigest()[:16]
        """A short name of exactly this template."""

    def encode(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: Any = None
    ) -> list[int]:
        """Token ids of a conversation; arguments and errors as `ChatTemplate.render`."""
        text = self.template.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_turns(
        self, messages: Sequence[Message], tools: Any = None, first: int = 0
    ) -> tuple[UInt32[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Token ids of a conversation, and which of them the assistant wrote.

        A token of which the assistant wrote a part counts as the assistant's. Arguments and errors as
        `ChatTemplate.turns`.
        """
        text, turns = self.template.turns(messages, tools, first)
        encoding = self._backend.encode(text, add_special_tokens=False)
        written = np.zeros(len(encoding.ids), bool)
        for start, end in turns:
            begin, last = encoding.char_to_token(start), encoding.char_to_token(end - 1) if end else None
            if begin is None:
                break
            written[begin : last + 1 if last else len(written)] = True
        return np.array(encoding.ids, np.uint32), written


def _told(message: Message) -> Message:
    """A message as a template sees it: nothing that is null, and what was thought under each of its names."""
    told = {name: value for name, value in message.items() if value is not None}
    thought = next((told[name] for name in _REASONING if name in told), None)
    return told if thought is None else {"thinking": thought, **told, "reasoning_content": thought}


def _reason(error: Exception) -> str:
    """What an exception says, in one line that is not too long."""
    return one_line(f"{error}")[:300] or type(error).__name__
