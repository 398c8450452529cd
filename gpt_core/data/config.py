"""What to train on and in which order: the section `data` of a YAML file."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args

from gpt_core.errors import InputError
from gpt_core.sections import from_mapping

OnError = Literal["stop", "skip"]


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from, and in which order it is read.

    Args:
        source: Text to read: a file, folder, glob or URL; `hf:NAME[:CONFIG]` for a Hugging Face dataset; `stdlib` for
            the interpreter's own library.
        prepared: Folder of tokens, written by `gpt-data prepare`. Null: `source` is tokenized while training.
        text_field: Field or column of JSON Lines, CSV, Parquet and datasets that holds the text.
        on_error: What a broken record does: "stop" with its file and line, or "skip" it and count.
        validation_fraction: Share of the documents kept for validation, chosen by their content and the seed.
        seed: Of the order and of the split.
        streams: Streams that `source` is dealt to while training; row r of a batch reads stream r mod streams.
        shuffle_window: Documents of a stream that are shuffled among each other.
        verify: Whether the checksums of prepared tokens are checked when they are opened.
        prefetch: Batches that are made ahead.

    Raises:
        InputError: a value is of the wrong type or outside its range; the message names field and range.
    """

    source: str = "stdlib"
    prepared: str | None = None
    text_field: str = "text"
    on_error: OnError = "stop"
    validation_fraction: float = 0.05
    seed: int = 0
    streams: int = 8
    shuffle_window: int = 1024
    verify: bool = True
    prefetch: int = 2

    def __post_init__(self) -> None:
        for name in ("source", "text_field", *(["prepared"] if self.prepared is not None else [])):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise InputError(f"{name} = {getattr(self, name)!r} must be a text that is not empty")
        if self.on_error not in get_args(OnError):
            raise InputError(f"on_error = {self.on_error!r} must be one of: {', '.join(get_args(OnError))}")
        fraction: Any = self.validation_fraction
        if not isinstance(fraction, int | float) or isinstance(fraction, bool) or not 0 <= fraction < 1:
            raise InputError(f"validation_fraction = {fraction!r} must be a number in [0, 1)")
        object.__setattr__(self, "validation_fraction", float(fraction))
        for name, least in (("seed", 0), ("streams", 1), ("shuffle_window", 1), ("prefetch", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
                raise InputError(f"{name} = {value!r} must be a whole number of at least {least}")
        if not isinstance(self.verify, bool):
            raise InputError(f"verify = {self.verify!r} must be true or false")

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
