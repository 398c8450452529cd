import mmap

import numpy as np
import pytest

from gpt_core.storage.tensor_info import Scratch, TensorInfo, contiguous, mapped, pieces


@pytest.mark.parametrize("shape", [(3, 5), (130, 67), (64, 64), (1, 9), (9, 1), (200, 129)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_a_transposed_matrix_keeps_its_values_and_gets_c_order(shape, dtype):
    matrix = np.random.default_rng(0).normal(size=shape).astype(dtype)
    found = contiguous(matrix.T)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, matrix.T)


@pytest.mark.parametrize("axes", [(1, 2, 0), (2, 0, 1), (2, 1, 0), (1, 0, 2), (0, 2, 1)])
def test_any_order_of_axes(axes):
    array = np.random.default_rng(0).normal(size=(70, 3, 81)).transpose(axes)
    found = contiguous(array)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, array)


def test_an_array_in_order_is_not_copied():
    array = np.zeros((4, 5))
    assert contiguous(array) is array


def test_scratch_is_used_again_by_its_thread_and_by_no_other():
    import threading

    scratch, pointers = Scratch(), []

    def ask():
        pointers.append(scratch.empty((3, 4), np.dtype(np.float32)).ctypes.data)

    ask()
    ask()
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert pointers[0] == pointers[1] != pointers[2]


def test_a_file_is_mapped_and_its_pieces_are_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt_core.storage.tensor_info._PIECE", 1000)
    array = np.random.default_rng(0).normal(size=(51, 77)).astype(np.float32)
    (tmp_path / "file").write_bytes(b"header!!" + array.tobytes())
    found = mapped(tmp_path / "file", 8, TensorInfo(array.shape, array.dtype))
    base = found
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base, mmap.mmap)
    assert not found.flags.writeable
    assert [len(piece) for piece in pieces(found)] == [1000, 1000, 1000, 927]
    np.testing.assert_array_equal(np.concatenate(list(pieces(found))), array.reshape(-1))
    np.testing.assert_array_equal(found, array)  # what was given back is read again


def test_an_empty_tensor_needs_no_bytes(tmp_path):
    assert mapped(tmp_path / "nowhere", 0, TensorInfo((0, 3), np.dtype(np.float32))).shape == (0, 3)
