"""PyTorch's dtype objects by the names that `gpt_core.precision` uses."""

import torch

from gpt_core.precision import DType

_DTYPES: dict[DType, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def torch_dtype(name: DType) -> torch.dtype:
    """PyTorch's dtype of that name."""
    return _DTYPES[name]
