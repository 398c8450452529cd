"""Text on a terminal as it is written, and conversations: what is said, and the model's answers."""

from collections.abc import Callable, Iterator

from gpt_core.cli import SUCCESS, say
from gpt_core.errors import InputError
from gpt_core.text.chat import Chat, Message
from gpt_core.text.generation import SamplingConfig, Written
from gpt_core.text.tokenizer import Tokenizer

Chunks = Iterator[Written]
Writer = Callable[[list[list[int]], SamplingConfig], Chunks]
"""New tokens of every prompt, chunk by chunk; an InputError where a prompt is longer than the context."""


def begun(chat: Chat, system: str | None, prompt: str) -> list[int]:
    """Token ids of a conversation of one question, up to where the answer begins.

    Raises:
        InputError: the template refuses it.
    """
    return chat.encode([*_told(system), {"role": "user", "content": prompt}], add_generation_prompt=True)


def converse(chat: Chat, tokenizer: Tokenizer, system: str | None, sampling: SamplingConfig, write: Writer) -> int:
    """Ask and answer until the input ends; a conversation that outgrows the context begins anew.

    Args:
        chat: The template.
        tokenizer: Of the model.
        system: What the model is told before, or None.
        sampling: How tokens are chosen.
        write: The model.
    """
    say("Type what you want to say; Ctrl-D ends.")
    beginning = _told(system)
    messages = beginning
    while True:
        try:
            asked = input("> ").strip()
        except EOFError:
            print()
            return SUCCESS
        question = {"role": "user", "content": asked}
        for history in (messages, beginning) if asked else ():
            try:
                answer = _answer(chat, tokenizer, [*history, question], sampling, write)
            except InputError as error:
                again = len(history) > len(beginning)
                say(f"{error}" + ("; the conversation begins anew" if again else ""))
                messages = beginning
                if again:
                    continue
            else:
                messages = [*history, question, {"role": "assistant", "content": answer}]
            break


def _told(system: str | None) -> list[Message]:
    return [] if system is None else [{"role": "system", "content": system}]


def _answer(chat: Chat, tokenizer: Tokenizer, messages: list[Message], sampling: SamplingConfig, write: Writer) -> str:
    prompt = chat.encode(messages, add_generation_prompt=True)
    chunks = without_end(write([prompt], sampling), sampling)
    [row] = Written.together(printed_as_it_comes([], chunks, tokenizer), 1).rows
    return tokenizer.decode(row)


def without_end(chunks: Chunks, sampling: SamplingConfig) -> Chunks:
    """The same chunks without the tokens that end a row."""
    for chunk in chunks:
        rows = [row[:-1] if row and row[-1] in sampling.stop_tokens else row for row in chunk.rows]
        yield chunk._replace(rows=rows)


def continuation(tokenizer: Tokenizer, prompt: list[int], new: list[int]) -> str:
    """The text of new tokens as it follows a prompt: on its own, some tokenizers would leave its first blank out."""
    whole, head = tokenizer.decode(prompt + new), tokenizer.decode(prompt)
    return whole[len(head) :] if whole.startswith(head) else tokenizer.decode(new)


def printed_as_it_comes(prompt: list[int], chunks: Chunks, tokenizer: Tokenizer) -> Chunks:
    """The same chunks; meanwhile the text of prompt and new tokens is printed.

    Args:
        prompt: Its tokens.
        chunks: Of one row.
        tokenizer: Of the text.
    """
    tokens, shown = list(prompt), 0
    for chunk in chunks:
        yield chunk
        tokens += chunk.rows[0]
        text = tokenizer.decode(tokens).rstrip("\ufffd")  # half a character is shown when its other half comes
        print(text[shown:], end="", flush=True)
        shown = max(shown, len(text))
    print(tokenizer.decode(tokens)[shown:])
