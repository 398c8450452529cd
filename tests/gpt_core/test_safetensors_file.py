import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from gpt_core.errors import InputError
from gpt_core.safetensors_file import SafetensorsReader, write_safetensors
from gpt_core.tensor_info import TensorInfo

DTYPES = [np.float32, ml_dtypes.bfloat16, np.float64, np.float16]


def arrays(dtype: type) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "z.first": random.normal(size=(5, 3)).astype(dtype),
        "a.second": np.array([np.inf, -0.0, np.nan, 1e-40]).astype(dtype),  # bits, not values, must survive
        "odd": random.normal(size=(7,)).astype(dtype),
        "empty": np.zeros((0, 4), dtype),
        "scalar": np.array(3, dtype),
        "transposed": random.normal(size=(4, 6)).astype(dtype).T,
    }


def write(path: Path, content: dict[str, np.ndarray], **options: object) -> None:
    infos = {key: TensorInfo(array.shape, array.dtype) for key, array in content.items()}
    write_safetensors(path, infos, content.__getitem__, **options)


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_survive_a_round_trip_bit_for_bit(dtype: type, tmp_path: Path) -> None:
    path, content = tmp_path / "w.safetensors", arrays(dtype)
    write(path, content, metadata={"by": "test"})
    reader = SafetensorsReader(path)
    assert list(reader.tensors) == list(content)
    assert reader.metadata == {"format": "pt", "by": "test"}
    for key, array in content.items():
        assert reader.tensors[key] == TensorInfo(array.shape, array.dtype)
        assert reader.tensors[key].nbytes == array.nbytes
        assert_same_bits(reader.read(key), array)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_library_reads_what_is_written_here(dtype: type, tmp_path: Path) -> None:
    path, content = tmp_path / "w.safetensors", arrays(dtype)
    write(path, content)
    with safe_open(str(path), framework="np") as file:
        assert set(file.keys()) == set(content)
        for key, array in content.items():
            assert_same_bits(file.get_tensor(key), array)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_library_writes_is_read_here(dtype: type, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    content = {key: np.ascontiguousarray(array) for key, array in arrays(dtype).items()}
    content["scalar"] = content["scalar"].reshape(())
    save_file(content, path)
    reader = SafetensorsReader(path)
    for key, array in content.items():
        assert_same_bits(reader.read(key), array)


def test_tensors_are_asked_for_one_by_one_in_order(tmp_path: Path) -> None:
    content, asked = arrays(np.float32), []
    infos = {key: TensorInfo(array.shape, array.dtype) for key, array in content.items()}
    write_safetensors(tmp_path / "w", infos, lambda key: (asked.append(key), content[key])[1])
    assert asked == list(content)


@pytest.mark.parametrize("kept", ["nothing", "half of the length", "half of the header", "all but one byte"])
def test_a_truncated_file_is_refused_with_its_path(kept: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write(path, arrays(np.float32))
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    length = {
        "nothing": 0,
        "half of the length": 4,
        "half of the header": header // 2,
        "all but one byte": len(whole) - 1,
    }
    path.write_bytes(whole[: length[kept]])
    with pytest.raises(InputError, match=r"w\.safetensors: not a whole safetensors file"):
        SafetensorsReader(path)


@pytest.mark.parametrize("content", [b"PK\x03\x04 a zip or a pickle" * 20, b"\x80\x04\x95 pickle" * 9, b"{}" * 50])
def test_a_foreign_file_is_refused_with_its_path(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"w\.safetensors: not a whole safetensors file"):
        SafetensorsReader(path)


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write(path, arrays(np.float32))
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        SafetensorsReader(path)


def test_offsets_beyond_the_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    header = json.dumps({"w": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)
    with pytest.raises(InputError, match="not a whole safetensors file"):
        SafetensorsReader(path)


def test_a_missing_file_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.safetensors: no such file"):
        SafetensorsReader(tmp_path / "absent.safetensors")


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").mkdir()
    with pytest.raises(InputError, match=r"w\.safetensors: not a whole safetensors file"):
        SafetensorsReader(tmp_path / "w.safetensors")


@pytest.mark.parametrize(("dtype", "name"), [(np.int64, "I64"), (np.uint8, "U8"), (np.bool_, "BOOL")])
def test_a_tensor_that_is_no_float_is_refused_by_name(dtype: type, name: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"good": np.ones(3, np.float32), "bad": np.ones(3, dtype)}, path)
    with pytest.raises(InputError, match=rf"w\.safetensors: bad is of dtype {name}"):
        SafetensorsReader(path)
