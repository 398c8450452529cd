"""A model out of a checkpoint of any format, and into one: the methods that `GPT` has from here."""

from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpt_core.config import ModelConfig
from gpt_core.formats.orbax_jax import spoke
from gpt_core.precision import Precision
from gpt_core.pretrained import Origin, Written, open_pretrained, write_pretrained
from gpt_core.tensor_info import Array
from gpt_core.tokenizer import Tokenizer
from gpt_core.weights import slots, source_of
from jax_gpt.attention import Implementation

Model = TypeVar("Model", bound="Pretrained")


class Pretrained:
    """Loading from and saving to every format, those of Hugging Face included."""

    config: ModelConfig
    scan_layers: bool

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path_or_name: str | Path,
        *,
        precision: Precision = Precision(),
        implementation: Implementation = "reference",
        scan_layers: bool = True,
    ) -> Model:
        """Load a checkpoint of any format; weights are cast to `precision.param_dtype`.

        Args:
            path_or_name: A folder, a training run (`RUN@best`), or a name on the Hugging Face hub.
            precision: Number formats of storage and computation.
            implementation: Of attention.
            scan_layers: Whether blocks are stacked.

        Raises:
            InputError: there is no such checkpoint, the hub cannot be reached, or it is damaged or beyond this model.
        """
        checkpoint = open_pretrained(path_or_name)
        constructor: Any = cls
        model: Model = constructor(
            checkpoint.config,
            lambda parameter: jnp.array(checkpoint.read(parameter), dtype=precision.param_dtype, copy=True),
            precision=precision,
            implementation=implementation,
            scan_layers=scan_layers,
        )
        return model

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
        state = {".".join(map(str, key)): v[...] for key, v in nnx.to_flat_state(nnx.state(self, nnx.Param))}
        expected = slots(self.config, spoke(self.config, scan_layers=self.scan_layers))

        def read(key: str, layer: int | None = None) -> Array:
            return np.asarray(state[key] if layer is None else state[key][layer])

        return write_pretrained(
            Path(path),
            self.config,
            source_of(expected, read, read),
            {slot.parameter.name: np.dtype(state[key].dtype) for key, slot in expected.items()},
            Origin(Path(path).resolve().name),
            to,
            tokenizer=tokenizer,
            allow_remote_code=allow_remote_code,
            force=force,
        )
