"""Tensors to NumPy and back, bf16 included (which NumPy knows through ml_dtypes alone)."""

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch


def from_numpy(array: npt.NDArray[Any]) -> torch.Tensor:
    """A tensor of a NumPy array; may share its memory."""
    array = np.require(array, requirements=("C", "W"))
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A NumPy array of a tensor; shares its memory where it lies on the CPU in one piece."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        bits: npt.NDArray[Any] = tensor.view(torch.uint16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    array: npt.NDArray[Any] = tensor.numpy()
    return array
