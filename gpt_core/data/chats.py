"""Conversations as training data: what the assistant says is learned, and rows are packed out of whole conversations.

A record has `messages`, which the tokenizer's chat template renders; or a `prompt` and its `completion`, both lists of
messages, which are rendered together, or both plain texts. Streams and blocks are those of `streaming`; a block is
tokenized as a whole and packed, and the place of a stream is the block and the next of its rows.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import chain, islice
from typing import Any, ClassVar

import numpy as np

from gpt_core.data.batches import Batch
from gpt_core.data.config import DataConfig
from gpt_core.data.order import Split
from gpt_core.data.packing import Document, Row, batch_of_rows, first_fit, length_in, packed_row
from gpt_core.data.records import place
from gpt_core.data.sources import File
from gpt_core.data.streaming import BatchesOfStreams, BlockPlace, StreamedDocuments
from gpt_core.errors import InputError, shown
from gpt_core.text.chat import Chat
from gpt_core.text.tokenizer import Tokenizer

DAY = datetime(2025, 1, 1)
"""What a chat template takes for today: a run must be the same on any day."""


class BrokenChatError(InputError):
    """A record is no conversation that can be learned from; says why."""


class ChatEncoder:
    """Records to tokens, with what is learned.

    Args:
        tokenizer: With a chat template, but for records of plain texts.

    Raises:
        InputError: its chat template is none.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._chat = None if tokenizer.chat_template is None else Chat(tokenizer, lambda: DAY)

    @property
    def template(self) -> str | None:
        """A short name of exactly its chat template."""
        return None if self._chat is None else self._chat.identity

    def encode(self, record: dict[str, Any]) -> Document:
        """Tokens of a record.

        Args:
            record: Its fields, of `CHAT_FIELDS`.

        Raises:
            BrokenChatError: it is no conversation, or the chat template refuses it.
            InputError: it needs a chat template, and there is none.
        """
        if "messages" in record:
            return self._messages(_messages(record["messages"], "messages"), record.get("tools"), 0)
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return self._texts(prompt, completion)
        if not (isinstance(prompt, list) and isinstance(completion, list)):
            raise BrokenChatError("prompt and completion must both be texts, or both lists of messages")
        before = _messages(prompt, "prompt")
        return self._messages(before + _messages(completion, "completion"), record.get("tools"), len(before))

    def _messages(self, messages: list[dict[str, Any]], tools: Any, first: int) -> Document:
        if self._chat is None:
            self._chat = Chat(self._tokenizer)  # which says what is missing
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise BrokenChatError("tools must be a list of descriptions in braces")
        try:
            return Document(*self._chat.encode_turns(messages, tools, first))
        except InputError as error:
            raise BrokenChatError(str(error)) from None

    def _texts(self, prompt: str, completion: str) -> Document:
        if not completion.strip():
            raise BrokenChatError("the completion is empty")
        front = self._tokenizer.encode_documents([prompt])[0][:-1]  # without the end of text
        said = np.append(self._tokenizer.encode_array(completion), np.uint32(self._tokenizer.end_of_text))
        tokens = np.concatenate([front, said])
        return Document(tokens, np.arange(len(tokens)) >= len(front))


def _messages(values: Any, field: str) -> list[dict[str, Any]]:
    """Messages of a record that a chat template can be given.

    Raises:
        BrokenChatError: they are none; says which and why.
    """
    if not isinstance(values, list) or not values:
        raise BrokenChatError(f"{field} must be a list of at least one message")
    for number, message in enumerate(values, start=1):
        why = _wrong(message)
        if why:
            raise BrokenChatError(f"{field}: message {number} {why}")
    return values


def _wrong(message: Any) -> str:
    """Why something is no message; "" where it is one."""
    if not isinstance(message, dict):
        return f"is no object with role and content, but {type(message).__name__}"
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        return "has no role" if role is None else f"has a role that is no text: {shown(role)}"
    if message.get("tool_calls"):
        return ""
    if content is None:
        return f"({shown(role)}) has no content"
    if not isinstance(content, str | list):
        return f"({shown(role)}) has content that is neither text nor a list of parts, but {type(content).__name__}"
    said = content.strip() if isinstance(content, str) else content
    return "is an empty turn of the assistant" if role == "assistant" and not said else ""


class StreamedChats(StreamedDocuments[Document]):
    """The conversations of a source, dealt to streams.

    Args:
        config: All fields are read but `prepared` and `text_field`.
        split: Which split.
        tokenizer: GPT-2's unless given.
        context_length: Tokens of a row.

    Raises:
        InputError: the source is wrong, or the tokenizer's chat template.
    """

    def __init__(self, config: DataConfig, split: Split, tokenizer: Tokenizer | None, context_length: int) -> None:
        super().__init__(config, split, tokenizer)
        self.context_length, self._too_long = context_length, config.too_long
        self._encoder = ChatEncoder(self.tokenizer)
        self._counts: Counter[str] = Counter()

    @property
    def identity(self) -> dict[str, Any]:
        """What the content of the streams depends on."""
        return super().identity | {"chat_template": self._encoder.template, "too_long": self._too_long}

    def content(self, file: File, record: int, text: bytes) -> Document | None:
        """The tokens of a conversation; None where nothing of it is learned.

        Raises:
            InputError: it is broken, and `on_error` is "stop"; or it needs a chat template, and there is none.
        """
        try:
            document = self._encoder.encode(json.loads(text))
        except BrokenChatError as error:
            self.reader.broken(place(file, record), str(error))
            return None
        self._counts["read"] += 1
        seen = document.learned[1 : self.context_length + 1]
        if not document.learned[1:].any():
            self._counts["silent"] += 1
        elif len(document.tokens) <= self.context_length + 1:
            return document
        elif self._too_long == "drop" or not seen.any():
            self._counts["dropped"] += 1
        else:
            self._counts["cut"] += 1
            return Document(document.tokens[: self.context_length + 1], document.learned[: self.context_length + 1])
        return None

    def notices(self) -> dict[str, str]:
        """What was left out or cut so far, counted each time that it was met."""
        said = {
            "silent": "were left out: the assistant says nothing in them",
            "dropped": f"were left out: longer than the context of {self.context_length} tokens"
            + " before the assistant says anything" * (self._too_long == "truncate"),
            "cut": f"were cut at their end: longer than the context of {self.context_length} tokens",
        }
        read = self._counts["read"]
        return super().notices() | {
            name: f"{self._counts[name]:,} of {read:,} conversations read so far {text}"
            for name, text in said.items()
            if self._counts[name]
        }


@dataclass(frozen=True)
class RowPlace(BlockPlace):
    """Where a stream of rows stands.

    Args:
        row: The next row of the packed block.
    """

    row: int = 0


class ChatBatches(BatchesOfStreams):
    """Batches of packed conversations.

    Args:
        config: Where they come from, and their order.
        split: Which split.
        batch_size: Rows of the global batch.
        context_length: Tokens of a row.
        rows: Rows of the global batch that this host reads; all by default.
        tokenizer: With a chat template; GPT-2's unless given.

    Raises:
        InputError: the source or the template is wrong, or there are more streams than rows.
    """

    kind: ClassVar[str] = "chat"
    place: ClassVar[type[BlockPlace]] = RowPlace

    def __init__(
        self,
        config: DataConfig,
        split: Split,
        batch_size: int,
        context_length: int,
        rows: Sequence[int] | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        documents = StreamedChats(config, split, tokenizer, context_length)
        self._separate = config.separates
        super().__init__(documents, batch_size, context_length, rows, {"separate_documents": self._separate})

    def _read(self, stream: int, place: Any) -> Iterator[tuple[Row, BlockPlace]]:
        first = place.row
        for begin, block in self._documents.blocks(stream, place):
            rows = packed(block, self._context_length)
            for number in range(first, len(rows)):
                row = packed_row([block[document] for document in rows[number]], self._context_length)
                yield row, RowPlace(**asdict(begin), row=number + 1)
            first = 0

    def _batch(self, rows: list[Any]) -> Batch:
        return batch_of_rows(rows, separate=self._separate)


def packed(documents: Sequence[Document], context_length: int) -> list[list[int]]:
    """The numbers of the documents of each row, packed by `first_fit`."""
    return first_fit([length_in(document, context_length) for document in documents], context_length)


def chat_evaluation_batches(
    config: DataConfig,
    batch_size: int,
    context_length: int,
    rows: Sequence[int] | None = None,
    tokenizer: Tokenizer | None = None,
) -> Iterator[Batch]:
    """Every conversation of the validation split once, packed within windows of the source's order.

    All hosts get the same number of batches; rows that are left over at the end are empty. Arguments as `ChatBatches`.

    Raises:
        InputError: as `ChatBatches`; or all conversations were left out.
    """
    chats = StreamedChats(config, "validation", tokenizer, context_length)
    chosen = range(batch_size) if rows is None else rows
    coming = _packed_rows(chats.all_documents(), config.shuffle_window, context_length)
    first = next(coming, None)
    if first is None and chats.notices():
        left_out = "; ".join(chats.notices().values())
        raise InputError(f"{config.source}: the validation split has nothing to learn: {left_out}")
    coming = coming if first is None else chain([first], coming)
    while some := list(islice(coming, batch_size)):
        some += [packed_row([], context_length)] * (batch_size - len(some))
        yield batch_of_rows([some[row] for row in chosen], separate=config.separates)


def _packed_rows(documents: Iterator[Document], window: int, context_length: int) -> Iterator[Row]:
    while block := list(islice(documents, window)):
        for row in packed(block, context_length):
            yield packed_row([block[document] for document in row], context_length)
