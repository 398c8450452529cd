"""What every format module offers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from gpt_core.config import ModelConfig
from gpt_core.parameters import Parameter
from gpt_core.storage.adaptation import Adaptation
from gpt_core.storage.tensor_info import Array, TensorInfo
from gpt_core.storage.weights import DType, Source
from gpt_core.text.tokenizer import Tokenizer


class Checkpoint(Protocol):
    """An opened checkpoint; reading happens parameter by parameter."""

    format: str
    path: Path
    config: ModelConfig
    tensors: Mapping[str, TensorInfo]
    """The format's own tensors by key, not yet read."""

    @property
    def dtypes(self) -> Mapping[str, DType]:
        """The stored dtype of every canonical parameter; an InputError says where blocks of one differ."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """GPT-2's tokenizer, where it lies beside the weights."""
        ...

    @property
    def notices(self) -> tuple[str, ...]:
        """What a person should know of reading it, one sentence each."""
        ...

    def read(self, parameter: Parameter) -> Array:
        """A parameter, or one block of it, in canonical axes and the stored dtype."""
        ...


class Format(Protocol):
    """A module of this package, or `HuggingFaceFormat` for one of its architectures."""

    def open_checkpoint(self, path: Path) -> Checkpoint:
        """Open it and hold its tensors against its config."""
        ...

    def adapt_config(self, config: ModelConfig) -> Adaptation:
        """The config under which this format holds a model; an InputError says why it cannot."""
        ...

    def write(
        self,
        path: Path,
        config: ModelConfig,
        source: Source,
        dtypes: Mapping[str, DType],
        tokenizer: Tokenizer | None,
    ) -> None:
        """Write weights (each parameter in its dtype), config and tokenizer into an empty folder.

        The config is one that `adapt_config` returned.
        """
        ...
