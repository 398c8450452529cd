"""Saving and loading a model: `model.safetensors` with `config.json` and the tokenizer beside it."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from gpt_core.checkpoints.adapted import has_adapter
from gpt_core.checkpoints.replaceable import kept_checkpoint
from gpt_core.files.writing import atomic_directory
from gpt_core.formats.safetensors_torch import SPOKE
from gpt_core.precision import Precision
from gpt_core.storage.checkpoint_config import (
    WEIGHTS_FILE,
    read_checkpoint_config,
    refuse_twin,
    write_checkpoint_config,
)
from gpt_core.storage.safetensors_file import SafetensorsReader, write_safetensors
from gpt_core.storage.tensor_info import TensorInfo
from gpt_core.storage.weights import require_keys, slots
from gpt_core.text.tokenizer import Tokenizer
from torch_gpt import moe
from torch_gpt.arrays import to_numpy
from torch_gpt.attention import Implementation
from torch_gpt.dtypes import torch_dtype
from torch_gpt.model import GPT


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
    state = model.state_dict()
    infos = {
        key: TensorInfo(tuple(tensor.shape), to_numpy(tensor[:0].flatten()).dtype) for key, tensor in state.items()
    }
    with atomic_directory(path, replace=kept_checkpoint if force else None) as folder:
        write_safetensors(folder / WEIGHTS_FILE, infos, lambda key: to_numpy(state[key]))
        write_checkpoint_config(folder, model.config)
        if tokenizer is not None:
            tokenizer.save(folder)


def load(
    path: Path,
    *,
    precision: Precision = Precision(),
    implementation: Implementation = "reference",
    experts: moe.Implementation = "reference",
) -> GPT:
    """Load a checkpoint; weights are cast to `precision.param_dtype`.

    That of a run with an adapter is its base with the adapter merged into it.

    Raises:
        InputError: the checkpoint is missing, damaged or of the other framework, or weights and config do not fit.
    """
    config = read_checkpoint_config(path)
    refuse_twin(path, "torch")
    if has_adapter(path):
        return GPT.from_pretrained(path, precision=precision, implementation=implementation, experts=experts)
    stored = SafetensorsReader(path / WEIGHTS_FILE).tensors  # a damaged file is named here
    require_keys(str(path), slots(config, SPOKE), {key: info.shape for key, info in stored.items()})
    dtype = torch_dtype(precision.param_dtype)
    model = GPT(
        config,
        lambda parameter: torch.empty(parameter.shape, dtype=dtype, device="meta"),
        precision=precision,
        implementation=implementation,
        experts=experts,
    )
    state = {key: tensor.to(dtype) for key, tensor in load_file(path / WEIGHTS_FILE).items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(True).eval()
