"""A model out of a checkpoint of any format, and into one: the methods that `GPT` has from here."""

from pathlib import Path
from typing import Any, TypeVar

from gpt_core.config import ModelConfig
from gpt_core.formats.safetensors_torch import SPOKE
from gpt_core.precision import Precision
from gpt_core.pretrained import Origin, Written, open_pretrained, write_pretrained
from gpt_core.tensor_info import Array
from gpt_core.tokenizer import Tokenizer
from gpt_core.weights import slots, source_of
from torch_gpt.arrays import from_numpy, to_numpy
from torch_gpt.attention import Implementation
from torch_gpt.dtypes import torch_dtype

Model = TypeVar("Model", bound="Pretrained")


class Pretrained:
    """Loading from and saving to every format, those of Hugging Face included."""

    config: ModelConfig

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path_or_name: str | Path,
        *,
        precision: Precision = Precision(),
        implementation: Implementation = "reference",
    ) -> Model:
        """Load a checkpoint of any format; weights are cast to `precision.param_dtype`.

        Args:
            path_or_name: A folder, a training run (`RUN@best`), or a name on the Hugging Face hub.
            precision: Number formats of storage and computation.
            implementation: Of attention.

        Raises:
            InputError: there is no such checkpoint, the hub cannot be reached, or it is damaged or beyond this model.
        """
        checkpoint = open_pretrained(path_or_name)
        constructor: Any = cls
        model: Any = constructor(
            checkpoint.config,
            lambda parameter: from_numpy(checkpoint.read(parameter)).to(torch_dtype(precision.param_dtype)),
            precision=precision,
            implementation=implementation,
        )
        loaded: Model = model.eval()
        return loaded

    def save_pretrained(
        self,
        path: str | Path,
        to: str = "hf",
        *,
        tokenizer: Tokenizer | None = None,
        allow_remote_code: bool = False,
        force: bool = False,
    ) -> Written:
        """Write a checkpoint and read it back; it takes its name when it is complete.

        Args:
            path: Folder to write.
            to: A format as for `parity convert`; "hf" picks the architecture of transformers that fits.
            tokenizer: Written along, so that text can be run on the folder.
            allow_remote_code: Whether "hf" may bring its own modelling code where no native architecture fits.
            force: Replace a folder that exists.

        Raises:
            InputError: the format cannot express the model, or the destination exists, is read-only or full.
        """
        model: Any = self
        state = model.state_dict()
        expected = slots(self.config, SPOKE)

        def read(key: str) -> Array:
            return to_numpy(state[key])

        return write_pretrained(
            Path(path),
            self.config,
            source_of(expected, read),
            {slot.parameter.name: to_numpy(state[key][:0].flatten()).dtype for key, slot in expected.items()},
            Origin(Path(path).resolve().name),
            to,
            tokenizer=tokenizer,
            allow_remote_code=allow_remote_code,
            force=force,
        )
