import ml_dtypes
import numpy as np
import pytest
import torch

from torch_gpt.arrays import from_numpy, to_numpy

PAIRS = [
    (torch.float64, np.float64),
    (torch.float32, np.float32),
    (torch.bfloat16, ml_dtypes.bfloat16),
    (torch.int64, np.int64),
]


@pytest.mark.parametrize(("torch_dtype", "numpy_dtype"), PAIRS)
def test_values_and_dtype_survive_both_ways(torch_dtype: torch.dtype, numpy_dtype: type) -> None:
    values = [[1.0, -2.5, 3.0], [0.0, 7.0, -128.0]]
    array, tensor = np.array(values).astype(numpy_dtype), torch.tensor(values).to(torch_dtype)
    for found, expected in ((to_numpy(tensor), array), (to_numpy(tensor.T), array.T)):
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)
    for found, expected in ((from_numpy(array), tensor), (from_numpy(array.T), tensor.T)):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_a_read_only_array_is_copied() -> None:
    array = np.zeros(3, np.float32)
    array.flags.writeable = False
    from_numpy(array)[0] = 1
    assert array[0] == 0


def test_a_parameter_loses_its_gradient() -> None:
    assert np.array_equal(to_numpy(torch.nn.Parameter(torch.ones(2))), np.ones(2, np.float32))
