"""A model out of a checkpoint of any format, and into one: the methods that `GPT` has from here."""

from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpt_core.checkpoints.pretrained import Saving, open_pretrained
from gpt_core.formats.orbax_jax import spoke
from gpt_core.precision import Precision
from gpt_core.storage.tensor_info import Array
from gpt_core.storage.weights import DType, Source, slots, source_of
from jax_gpt import moe
from jax_gpt.attention import Implementation

Model = TypeVar("Model", bound="Pretrained")


class Pretrained(Saving):
    """Loading from and saving to every format, those of Hugging Face included."""

    scan_layers: bool

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path_or_name: str | Path,
        *,
        adapter: Path | None = None,
        precision: Precision = Precision(),
        implementation: Implementation = "reference",
        experts: moe.Implementation = "reference",
        scan_layers: bool = True,
    ) -> Model:
        """Load a checkpoint of any format; weights are cast to `precision.param_dtype`.

        Args:
            path_or_name: A folder, a training run (`RUN@best`), or a name on the Hugging Face hub.
            adapter: Folder of an adapter in PEFT's format, which is merged into it.
            precision: Number formats of storage and computation.
            implementation: Of attention.
            experts: Implementation of a mixture's experts.
            scan_layers: Whether blocks are stacked.

        Raises:
            InputError: there is no such checkpoint, the hub cannot be reached, or it is damaged or beyond this model.
        """
        checkpoint = open_pretrained(path_or_name, adapter)
        constructor: Any = cls
        model: Model = constructor(
            checkpoint.config,
            lambda parameter: jnp.array(checkpoint.read(parameter), dtype=precision.param_dtype, copy=True),
            precision=precision,
            implementation=implementation,
            experts=experts,
            scan_layers=scan_layers,
        )
        return model

    def stored(self) -> tuple[Source, dict[str, DType]]:
        """The parameters as they are stored, and their dtypes."""
        state = {".".join(map(str, key)): v[...] for key, v in nnx.to_flat_state(nnx.state(self, nnx.Param))}
        expected = slots(self.config, spoke(self.config, scan_layers=self.scan_layers))

        def read(key: str, layer: int | None = None) -> Array:
            return np.asarray(state[key] if layer is None else state[key][layer])

        dtypes = {slot.parameter.name: np.dtype(state[key].dtype) for key, slot in expected.items()}
        return source_of(expected, read, read), dtypes
