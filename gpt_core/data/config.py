"""What to train on and in which order: the section `data` of a YAML file."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args

from gpt_core.errors import InputError, shown
from gpt_core.sections import (
    from_mapping,
    require_count,
    require_flag,
    require_number,
    require_one_of,
    require_text,
)

OnError = Literal["stop", "skip"]
Kind = Literal["text", "chat"]
TooLong = Literal["truncate", "drop"]

_MOST = {
    "streams": 2**24,  # rows of a batch
    "shuffle_window": 2**20,  # documents, which every stream holds
    "prefetch": 1024,  # batches, which wait in memory
}


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from, and in which order it is read.

    Args:
        source: Text to read: a file, folder, glob or URL; `hf:NAME[:CONFIG]` for a Hugging Face dataset; `stdlib` for
            the interpreter's own library.
        prepared: Folder of tokens, written by `gpt-data prepare`. Null: `source` is tokenized while training.
        kind: "text": documents, every token of which is learned; "chat": records with `messages`, or with `prompt` and
            `completion`, of which what the assistant says is learned. Chats are not prepared.
        text_field: Field or column of JSON Lines, CSV, Parquet and datasets that holds the text.
        tokenizer: That cuts `source` into tokens: a folder with `tokenizer.json`, a name on the Hugging Face hub, or
            "gpt2". Null: the one of the weights that the run starts from, or GPT-2's.
        on_error: What a broken record does: "stop" with its file and line, or "skip" it and count.
        validation_fraction: Share of the documents kept for validation, chosen by their content and the seed.
        seed: Of the order and of the split.
        streams: Streams that `source` is dealt to while training; row r of a batch reads stream r mod streams.
        shuffle_window: Documents of a stream that are shuffled among each other.
        separate_documents: Whether documents in one row do not see each other. Null: false for text, true for chats.
        too_long: What becomes of a conversation that is longer than the context: "truncate" it at its end, or "drop".
        verify: Whether the checksums of prepared tokens are checked when they are opened.
        prefetch: Batches that are made ahead.

    Raises:
        InputError: a value is of the wrong type or outside its range; the message names field and range.
    """

    source: str = "stdlib"
    prepared: str | None = None
    kind: Kind = "text"
    text_field: str = "text"
    tokenizer: str | None = None
    on_error: OnError = "stop"
    validation_fraction: float = 0.05
    seed: int = 0
    streams: int = 8
    shuffle_window: int = 1024
    separate_documents: bool | None = None
    too_long: TooLong = "truncate"
    verify: bool = True
    prefetch: int = 2

    def __post_init__(self) -> None:
        optional = [name for name in ("prepared", "tokenizer") if getattr(self, name) is not None]
        for name in ("source", "text_field", *optional):
            require_text(self, name)
        require_one_of(self, "kind", get_args(Kind))
        require_one_of(self, "on_error", get_args(OnError))
        require_one_of(self, "too_long", get_args(TooLong))
        if self.separate_documents is not None:
            require_flag(self, "separate_documents")
        require_number(self, "validation_fraction", "a number in [0, 1)", lambda x: 0 <= x < 1)
        object.__setattr__(self, "validation_fraction", float(self.validation_fraction))
        require_count(self, "seed", least=0, most=2**63 - 1)
        for name, most in _MOST.items():
            require_count(self, name, most=most)
        require_flag(self, "verify")
        if self.kind == "chat" and self.prepared is not None:
            raise InputError(
                f"prepared = {shown(self.prepared)} does not go with kind = 'chat': conversations are read from source "
                f"while training; leave prepared out"
            )

    @property
    def separates(self) -> bool:
        """Whether documents in one row do not see each other."""
        return self.kind == "chat" if self.separate_documents is None else self.separate_documents

    def to_dict(self) -> dict[str, Any]:
        """Every field with its value; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any, source: str = "data config") -> Self:
        """Make a config from a mapping, refusing fields that it does not know.

        Raises:
            InputError: `values` is no mapping, or has an unknown field or a bad value; names `source`.
        """
        return from_mapping(cls, values, "data", source)
