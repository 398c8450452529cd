import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gpt_core.errors import InputError
from gpt_core.orbax_file import OrbaxReader, write_orbax
from gpt_core.tensor_info import TensorInfo

DTYPES = [np.float32, ml_dtypes.bfloat16, np.float64]


def arrays(dtype: type) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "token_embedding": random.normal(size=(13, 4)).astype(dtype),
        "blocks.mlp.up.kernel": random.normal(size=(3, 4, 6)).astype(dtype),
        "blocks.mlp.up.bias": np.zeros((3, 6), dtype),  # all zero, and yet its absence must be noticed
        "blocks.norm.scale": random.normal(size=(3, 4)).astype(dtype),
        "final.bias": np.array([np.inf, -0.0, np.nan, 1e-3]).astype(dtype),
    }


SPLIT = {"blocks.mlp.up.kernel", "blocks.mlp.up.bias"}


def write(folder: Path, content: dict[str, np.ndarray], split: set[str] = SPLIT) -> None:
    infos = {key: TensorInfo(array.shape, array.dtype) for key, array in content.items()}
    folder.mkdir(exist_ok=True)
    write_orbax(folder, infos, lambda key, row: content[key] if row is None else content[key][row], split)


def tree(content: dict[str, np.ndarray]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, array in content.items():
        *parents, last = key.split(".")
        level = nested
        for part in parents:
            level = level.setdefault(part, {})
        level[last] = array
    return nested


def at(nested: Any, key: str) -> np.ndarray:
    for part in key.split("."):
        nested = nested[part]
    return np.asarray(nested)


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.tobytes() == expected.tobytes()


def assert_reads(folder: Path, content: dict[str, np.ndarray]) -> None:
    reader = OrbaxReader(folder)
    assert set(reader.tensors) == set(content)
    for key, array in content.items():
        assert reader.tensors[key] == TensorInfo(array.shape, array.dtype)
        assert_same_bits(reader.read(key), array)
        for row in range(array.shape[0]):
            assert_same_bits(reader.read(key, row), array[row])


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_survive_a_round_trip_whole_and_by_row(dtype: type, tmp_path: Path) -> None:
    write(tmp_path / "params", arrays(dtype))
    assert_reads(tmp_path / "params", arrays(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_orbax_reads_what_is_written_here(dtype: type, tmp_path: Path, x64: None) -> None:
    import orbax.checkpoint as ocp

    content = arrays(dtype)
    write(tmp_path / "params", content)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "params")
    for key, array in content.items():
        assert_same_bits(at(restored, key), array)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("use_ocdbt", [True, False], ids=["ocdbt", "one-folder-each"])
def test_what_orbax_writes_is_read_here(dtype: type, use_ocdbt: bool, tmp_path: Path, x64: None) -> None:
    """Orbax compresses by zstd and packs everything into one OCDBT database, unless told otherwise."""
    import jax.numpy as jnp
    import orbax.checkpoint as ocp

    content = arrays(dtype)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "params", tree({key: jnp.asarray(array) for key, array in content.items()}))
    assert (tmp_path / "params" / "manifest.ocdbt").exists() == use_ocdbt
    assert_reads(tmp_path / "params", content)


def test_the_standard_checkpointer_of_orbax_is_read_here(tmp_path: Path) -> None:
    import jax.numpy as jnp
    import orbax.checkpoint as ocp

    content = arrays(np.float32)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", tree({key: jnp.asarray(array) for key, array in content.items()}))
    assert_reads(tmp_path / "params", content)


def chunk(folder: Path, key: str) -> Path:
    return min(path for path in (folder / key).iterdir() if not path.name.startswith("."))


Damage = Callable[[Path], None]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("key", ["token_embedding", "blocks.mlp.up.bias"])
@pytest.mark.parametrize("damage", [Path.unlink, truncate, lambda path: path.write_bytes(b"")])
def test_a_damaged_chunk_is_refused_with_path_and_array(key: str, damage: Damage, tmp_path: Path) -> None:
    """A chunk that is missing would read as zeros if nobody looked."""
    folder = tmp_path / "params"
    write(folder, arrays(np.float32))
    damage(chunk(folder, key))
    with pytest.raises(InputError, match=f"{folder}: the array {key} is damaged or missing"):
        OrbaxReader(folder).read(key)


def test_a_missing_chunk_in_orbaxs_own_files_is_refused(tmp_path: Path) -> None:
    import jax.numpy as jnp
    import orbax.checkpoint as ocp

    folder = tmp_path / "params"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(folder, {"w": jnp.ones((3, 4))})
    chunk(folder, "w").unlink()
    with pytest.raises(InputError, match=f"{folder}: the array w is damaged or missing"):
        OrbaxReader(folder).read("w")


def test_a_missing_array_is_refused_with_path_and_name(tmp_path: Path) -> None:
    folder = tmp_path / "params"
    write(folder, arrays(np.float32))
    shutil.rmtree(folder / "final.bias")
    with pytest.raises(InputError, match=rf"{folder}: the array final\.bias is damaged or missing"):
        OrbaxReader(folder)


@pytest.mark.parametrize("file", [".zarray", "_METADATA"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b"\xff\xff"])
def test_broken_json_is_refused_with_the_path(file: str, content: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "params"
    write(folder, arrays(np.float32))
    (folder / "final.bias" / file if file == ".zarray" else folder / file).write_bytes(content)
    with pytest.raises(InputError, match=str(folder)):
        OrbaxReader(folder)


@pytest.mark.parametrize("tree_metadata", [None, [], {"('a',)": None}, {"('a',)": {"key_metadata": 3}}])
def test_metadata_without_a_tree_is_refused_with_the_path(tree_metadata: object, tmp_path: Path) -> None:
    folder = tmp_path / "params"
    folder.mkdir()
    (folder / "_METADATA").write_text(json.dumps({"tree_metadata": tree_metadata}))
    with pytest.raises(InputError, match=f"{folder}: its _METADATA is damaged"):
        OrbaxReader(folder)


@pytest.mark.parametrize("made", [False, True])
def test_a_folder_that_is_no_checkpoint_is_refused_with_its_path(made: bool, tmp_path: Path) -> None:
    folder = tmp_path / "params"
    if made:
        folder.mkdir()
    with pytest.raises(InputError, match=f"{folder}: not an Orbax checkpoint"):
        OrbaxReader(folder)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "params").write_text("")
    with pytest.raises(InputError, match=str(tmp_path / "params")):
        OrbaxReader(tmp_path / "params")


@pytest.mark.parametrize("part", ["manifest.ocdbt", "d"])
def test_a_damaged_database_of_orbax_is_refused(part: str, tmp_path: Path) -> None:
    import jax.numpy as jnp
    import orbax.checkpoint as ocp

    folder = tmp_path / "params"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, {"w": jnp.ones((3, 4))})
    if not (folder / part).exists():
        pytest.fail(f"Orbax writes no {part} any more: {sorted(path.name for path in folder.iterdir())}")
    if (folder / part).is_dir():
        shutil.rmtree(folder / part)
    else:
        truncate(folder / part)
    with pytest.raises(InputError, match=str(folder)):
        OrbaxReader(folder).read("w")


def test_a_path_may_go_up_and_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorStore takes neither; people type both."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write(Path("../there"), arrays(np.float32))
    read = OrbaxReader(Path("../there")).read("token_embedding")
    np.testing.assert_array_equal(read, arrays(np.float32)["token_embedding"])


def test_a_place_that_cannot_be_written_is_an_operating_system_error(tmp_path: Path) -> None:
    """So that whoever writes atomically reports it like any other full or read-only disk."""
    (tmp_path / "file").write_text("in the way")
    content = arrays(np.float32)
    infos = {key: TensorInfo(array.shape, array.dtype) for key, array in content.items()}
    with pytest.raises(OSError, match="file"):
        write_orbax(tmp_path / "file" / "params", infos, lambda key, row: content[key])
