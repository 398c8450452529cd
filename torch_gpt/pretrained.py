"""A model out of a checkpoint of any format, and into one: the methods that `GPT` has from here."""

from pathlib import Path
from typing import Any, TypeVar

from gpt_core.checkpoints.pretrained import Saving, open_pretrained
from gpt_core.formats.safetensors_torch import SPOKE
from gpt_core.precision import Precision
from gpt_core.storage.tensor_info import Array
from gpt_core.storage.weights import DType, Source, slots, source_of
from torch_gpt import moe
from torch_gpt.arrays import from_numpy, to_numpy
from torch_gpt.attention import Implementation
from torch_gpt.dtypes import torch_dtype

Model = TypeVar("Model", bound="Pretrained")


class Pretrained(Saving):
    """Loading from and saving to every format, those of Hugging Face included."""

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path_or_name: str | Path,
        *,
        adapter: Path | None = None,
        precision: Precision = Precision(),
        implementation: Implementation = "reference",
        experts: moe.Implementation = "reference",
    ) -> Model:
        """Load a checkpoint of any format; weights are cast to `precision.param_dtype`.

        Args:
            path_or_name: A folder, a training run (`RUN@best`), or a name on the Hugging Face hub.
            adapter: Folder of an adapter in PEFT's format, which is merged into it.
            precision: Number formats of storage and computation.
            implementation: Of attention.
            experts: Implementation of a mixture's experts.

        Raises:
            InputError: there is no such checkpoint, the hub cannot be reached, or it is damaged or beyond this model.
        """
        checkpoint = open_pretrained(path_or_name, adapter)
        constructor: Any = cls
        model: Any = constructor(
            checkpoint.config,
            lambda parameter: from_numpy(checkpoint.read(parameter)).to(torch_dtype(precision.param_dtype)),
            precision=precision,
            implementation=implementation,
            experts=experts,
        )
        loaded: Model = model.eval()
        return loaded

    def stored(self) -> tuple[Source, dict[str, DType]]:
        """The parameters as they are stored, and their dtypes."""
        model: Any = self
        state = model.state_dict()
        expected = slots(self.config, SPOKE)

        def read(key: str) -> Array:
            return to_numpy(state[key])

        dtypes = {slot.parameter.name: to_numpy(state[key][:0].flatten()).dtype for key, slot in expected.items()}
        return source_of(expected, read), dtypes
