"""Saving and loading a model: an Orbax checkpoint `params` with `config.json` and the tokenizer beside it."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpt_core.checkpoints.adapted import open_checkpoint
from gpt_core.checkpoints.replaceable import kept_checkpoint
from gpt_core.files.writing import atomic_directory
from gpt_core.precision import Precision
from gpt_core.storage.checkpoint_config import PARAMS_FOLDER, refuse_twin, write_checkpoint_config
from gpt_core.storage.orbax_file import write_orbax
from gpt_core.storage.tensor_info import Array, TensorInfo
from gpt_core.text.tokenizer import Tokenizer
from jax_gpt import moe
from jax_gpt.attention import Implementation
from jax_gpt.model import GPT


def save(model: GPT, path: Path, tokenizer: Tokenizer | None = None, *, force: bool = False) -> None:
    """Write a checkpoint; it takes its name when it is complete.

    Args:
        model: What to save.
        path: Folder to write.
        tokenizer: Written beside the weights, so that text can be run on the checkpoint.
        force: Replace a checkpoint that exists.

    Raises:
        InputError: the destination exists, is read-only or full.
    """
    state = {".".join(map(str, key)): variable[...] for key, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    infos = {key: TensorInfo(array.shape, array.dtype) for key, array in state.items()}
    stacked = {key for key in state if key.startswith("blocks.")} if model.scan_layers else set()

    def read(key: str, layer: int | None) -> Array:
        return np.asarray(state[key] if layer is None else state[key][layer])

    with atomic_directory(path, replace=kept_checkpoint if force else None) as folder:
        write_orbax(folder / PARAMS_FOLDER, infos, read, split=stacked)
        write_checkpoint_config(folder, model.config)
        if tokenizer is not None:
            tokenizer.save(folder)


def load(
    path: Path,
    *,
    precision: Precision = Precision(),
    implementation: Implementation = "reference",
    experts: moe.Implementation = "reference",
    scan_layers: bool = True,
) -> GPT:
    """Load a checkpoint, stacked or unrolled, into either form; weights are cast to `precision.param_dtype`.

    That of a run with an adapter is its base with the adapter merged into it.

    Raises:
        InputError: the checkpoint is missing, damaged or of the other framework, or weights and config do not fit.
    """
    refuse_twin(path, "jax")
    checkpoint = open_checkpoint(path)
    return GPT(
        checkpoint.config,
        lambda parameter: jnp.array(checkpoint.read(parameter), dtype=precision.param_dtype, copy=True),
        precision=precision,
        implementation=implementation,
        experts=experts,
        scan_layers=scan_layers,
    )
