import json
import os
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from gpt_core.errors import InputError
from gpt_core.storage.safetensors_file import SafetensorsReader, write_safetensors
from gpt_core.storage.tensor_info import TensorInfo

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


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (Path.mkdir, "is a folder; give a file"),
        (os.mkfifo, "is a device or a pipe, not a file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device or a pipe, not a file"),
    ],
    ids=["folder", "pipe", "device"],
)
def test_what_is_no_regular_file_is_refused(make: Callable[[Path], None], told: str, tmp_path: Path) -> None:
    make(tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=rf"w\.safetensors: {told}"):
        SafetensorsReader(tmp_path / "w.safetensors")


def test_a_file_that_may_not_be_read_is_no_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    write(tmp_path / "w.safetensors", arrays(np.float32))
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(InputError, match=r"w\.safetensors: no permission"):
        SafetensorsReader(tmp_path / "w.safetensors")


ENTRY = b'{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'
HEADERS = {
    "nested lists": b"[" * 100_000 + b"]" * 100_000,
    "nested mappings": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a key twice": b'{"w":' + ENTRY + b',"w":' + ENTRY + b"}",
    "a field twice": b'{"w":{"dtype":"F64","dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    "digits": b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,16]}}',
    "2^40 numbers": b'{"w":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}',
    "2^40 twice": b'{"w":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,16]}}',
    "a negative size": b'{"w":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}',
    "a list": b"[1, 2]",
    "a number for a tensor": b'{"w":3}',
    "no offsets": b'{"w":{"dtype":"F32","shape":[4]}}',
    "another dtype": b'{"w":{"dtype":"Q9","shape":[4],"data_offsets":[0,16]}}',
    "no UTF-8": b'{"\xff":' + ENTRY + b"}",
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_is_none_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    path, header = tmp_path / "w.safetensors", HEADERS[name]
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)
    with pytest.raises(InputError, match=r"w\.safetensors: not a whole safetensors file") as caught:
        SafetensorsReader(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("length", [10**3, 10**9, 2**62, 2**64 - 1])
def test_a_header_longer_than_its_file_is_not_looked_for(length: int, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b'{"w":' + ENTRY + b"}" + b"\0" * 16)
    with pytest.raises(InputError, match=f"its header should have {length:,} bytes and the file has"):
        SafetensorsReader(path)


def test_a_header_too_long_to_be_one_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with path.open("wb") as file:
        file.write((1 << 30).to_bytes(8, "little"))
        file.truncate(1 << 31)  # no block of it is on the disk
    with pytest.raises(InputError, match=r"its header has 1,073,741,824 bytes; at most 33,554,432 are read"):
        SafetensorsReader(path)


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_of_the_header_is_refused_or_is_another_header(seed: int, tmp_path: Path) -> None:
    """Never an exception but ours, and never data from beyond the file."""
    path = tmp_path / "w.safetensors"
    write(path, arrays(np.float32))
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    used = content[: 8 + header].rstrip(b" ")
    random = np.random.default_rng(seed)
    content[random.integers(len(used))] ^= 1 << random.integers(8)
    path.write_bytes(content)
    try:
        reader = SafetensorsReader(path)
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    for key in reader.tensors:
        assert reader.read(key).shape == reader.tensors[key].shape


@pytest.mark.parametrize(("dtype", "name"), [(np.int64, "I64"), (np.uint8, "U8"), (np.bool_, "BOOL")])
def test_a_tensor_that_is_no_float_is_refused_by_name(dtype: type, name: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"good": np.ones(3, np.float32), "bad": np.ones(3, dtype)}, path)
    with pytest.raises(InputError, match=rf"w\.safetensors: bad is of dtype {name}"):
        SafetensorsReader(path)
