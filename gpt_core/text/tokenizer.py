"""What a tokenizer can do; `gpt_core.text.finding` opens one."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class Tokenizer(ABC):
    """Text to token ids and back: GPT-2's, which is built in, or one out of a `tokenizer.json`."""

    name: str
    """GPT-2's is "gpt2"; others are called as what they were opened by."""
    vocab_size: int
    """Every id it knows is below."""

    @property
    @abstractmethod
    def sha256(self) -> str:
        """Of all that its ids depend on, however its files are written."""

    @property
    @abstractmethod
    def chat_template(self) -> str | None:
        """Jinja, of a tokenizer for conversations; an InputError where the file that holds it is damaged."""

    @property
    @abstractmethod
    def end_of_text(self) -> int:
        """The id that ends a document; an InputError where its files name none."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of plain text: a special token in it is text like any other, and nothing is added."""

    @abstractmethod
    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """The same as an array; other threads run meanwhile."""

    @abstractmethod
    def encode_marked(self, text: str) -> list[int]:
        """Token ids of text in which special tokens are what they say; nothing is added."""

    @abstractmethod
    def encode_prompt(self, text: str) -> list[int]:
        """The same with what the tokenizer puts in front of a text, such as the token of its beginning."""

    @abstractmethod
    def encode_documents(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Plain texts as documents to train on: what the tokenizer puts in front, the text, and the end of text."""

    @abstractmethod
    def decode(self, tokens: list[int]) -> str:
        """The text of token ids; unknown ids and bytes that are no UTF-8 become replacement characters."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write its files into a folder, byte for byte."""
