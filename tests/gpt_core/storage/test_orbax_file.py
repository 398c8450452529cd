import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gpt_core.errors import InputError
from gpt_core.storage.orbax_file import OrbaxReader, write_orbax
from gpt_core.storage.tensor_info import TensorInfo

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


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "params": lambda nested: {"params": nested},
    "value": lambda nested: leaves_of(nested),
    "params and value": lambda nested: {"params": leaves_of(nested)},
}


def leaves_of(nested: Any) -> Any:
    """Every leaf in a mapping of its own, as a whole `nnx.State` is saved."""
    return {key: leaves_of(part) for key, part in nested.items()} if isinstance(nested, dict) else {"value": nested}


@pytest.mark.parametrize("wrapping", WRAPPED)
@pytest.mark.parametrize("use_ocdbt", [True, False], ids=["ocdbt", "one-folder-each"])
def test_what_a_tree_of_parameters_is_wrapped_in_is_left_out(wrapping: str, use_ocdbt: bool, tmp_path: Path) -> None:
    import jax.numpy as jnp
    import orbax.checkpoint as ocp

    content = arrays(np.float32)
    nested = WRAPPED[wrapping](tree({key: jnp.asarray(array) for key, array in content.items()}))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt)) as checkpointer:
        checkpointer.save(tmp_path / "params", nested)
    assert_reads(tmp_path / "params", content)


def test_the_state_of_a_flax_model_is_read_here(tmp_path: Path) -> None:
    import orbax.checkpoint as ocp
    from flax import nnx

    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", nnx.state(model, nnx.Param))
    reader = OrbaxReader(tmp_path / "params")
    assert set(reader.tensors) == {"kernel", "bias"}
    assert_same_bits(reader.read("kernel"), np.asarray(model.kernel[...]))


def test_a_wrapping_of_some_leaves_alone_is_part_of_their_names(tmp_path: Path) -> None:
    content = {"params.a.value": np.ones(2, np.float32), "b.value": np.ones(3, np.float32), "c": np.ones(4, np.float32)}
    write(tmp_path / "params", content, set())
    assert_reads(tmp_path / "params", content)


def test_an_error_names_the_array_as_the_checkpoint_does(tmp_path: Path) -> None:
    write(tmp_path / "params", {"params.a.value": np.ones(2, np.float32)}, set())
    chunk(tmp_path / "params", "params.a.value").unlink()
    with pytest.raises(InputError, match=r"the array params\.a\.value is damaged or missing"):
        OrbaxReader(tmp_path / "params").read("a")


def test_a_step_of_a_checkpoint_manager_is_pointed_at(tmp_path: Path) -> None:
    (tmp_path / "params" / "7").mkdir(parents=True)
    write(tmp_path / "params" / "7" / "default", arrays(np.float32))
    told = f"it has no _METADATA; {tmp_path}/params/7/default is one, a step of a CheckpointManager: put its content"
    with pytest.raises(InputError, match=told):
        OrbaxReader(tmp_path / "params")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"chunks": [10**18, 4]}, "chunks are larger than the array"),
        ({"chunks": [10**18, 10**18]}, "chunks are larger than the array"),
        ({"chunks": [0, 4]}, "must be lists of whole numbers"),
        ({"chunks": [13]}, "chunks are larger than the array"),
        ({"chunks": "13"}, "must be lists of whole numbers"),
        ({"shape": [10**18, 4], "chunks": [10**18, 4]}, "the array should have 16000000000000000000 bytes"),
        ({"shape": [2**40, 4]}, "the array should have 17592186044416 bytes, and all files have"),
        ({"shape": [-13, 4]}, "must be lists of whole numbers"),
        ({"shape": [13.0, 4]}, "must be lists of whole numbers"),
        ({"shape": None}, "must be lists of whole numbers"),
        ({"dtype": [["a", "<f4"]]}, "dtype .* is not known"),
        ({"dtype": "|V1000000000000"}, "dtype .* is not known"),
        ({"dtype": "("}, "dtype .* is not known"),
        ({"dtype": 4}, "dtype 4 is not known"),
    ],
)
def test_a_header_that_no_file_can_hold_is_refused_before_tensorstore_sees_it(
    changes: dict[str, object], told: str, tmp_path: Path
) -> None:
    """Over chunks of 10^18 numbers TensorStore ends the process."""
    write(tmp_path / "params", arrays(np.float32))
    edit(tmp_path / "params" / "token_embedding" / ".zarray", **changes)
    with pytest.raises(InputError, match=rf"the array token_embedding is damaged or missing: \.zarray: .*{told}"):
        OrbaxReader(tmp_path / "params")


@pytest.mark.parametrize("chunk_shape", [[10**18], [0], "x", [1, 1]])
def test_the_same_in_version_3_of_zarr(chunk_shape: object, tmp_path: Path) -> None:
    import jax.numpy as jnp
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)) as checkpointer:
        checkpointer.save(tmp_path / "params", {"w": jnp.ones(4)})
    assert_reads(tmp_path / "params", {"w": np.ones(4, np.float32)})
    grid = {"name": "regular", "configuration": {"chunk_shape": chunk_shape}}
    edit(tmp_path / "params" / "w" / "zarr.json", chunk_grid=grid)
    with pytest.raises(InputError, match=r"the array w is damaged or missing: zarr\.json: "):
        OrbaxReader(tmp_path / "params")


NAMES = ["..", ".", "", "../outside", "/etc/passwd", "a/b", "a\0b", "line\nbreak", "\x1b[31m", "\ud800"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_leads_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "params"
    write(folder, {"a.b": np.ones(2, np.float32)}, set())
    write(tmp_path / "outside", {"b": np.ones(2, np.float32)}, set())
    leaf = {"key_metadata": [{"key": name}, {"key": "b"}], "value_metadata": {"value_type": "np.ndarray"}}
    edit(folder / "_METADATA", tree_metadata={"x": leaf})
    with pytest.raises(InputError, match=f"{folder}: its _METADATA names .* which is no name of an array") as caught:
        OrbaxReader(folder)
    assert str(caught.value).isprintable()


def test_an_array_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "params"
    write(folder, {"a.b": np.ones(2, np.float32)}, set())
    values = {"value_metadata": {"value_type": "np.ndarray"}}
    leaves = {"1": {"key_metadata": [{"key": "a"}, {"key": "b"}]}, "2": {"key_metadata": [{"key": "a.b"}]}}
    edit(folder / "_METADATA", tree_metadata={name: leaf | values for name, leaf in leaves.items()})
    with pytest.raises(InputError, match="its _METADATA names an array twice"):
        OrbaxReader(folder)


@pytest.mark.parametrize("file", ["_METADATA", ".zarray", "0"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_what_is_no_regular_file_is_refused(file: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "params"
    write(folder, arrays(np.float32))
    place = folder / file if file == "_METADATA" else folder / "final.bias" / file
    place.unlink()
    make(place)
    with pytest.raises(InputError, match=f"{place}: is a device or a pipe, not a file"):
        OrbaxReader(folder)


@pytest.mark.parametrize("file", ["_METADATA", ".zarray", "0"])
def test_what_may_not_be_read_is_not_missing(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "params"
    write(folder, arrays(np.float32))
    place = folder / file if file == "_METADATA" else folder / "final.bias" / file
    opened = Path.open

    def denied(self: Path, *arguments: Any, **options: Any) -> Any:
        if self == place:
            raise PermissionError(13, "Permission denied")
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(InputError, match=f"{place}: no permission"):
        OrbaxReader(folder)


def test_nesting_without_end_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "params"
    write(folder, arrays(np.float32))
    (folder / "final.bias" / ".zarray").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"final\.bias is damaged or missing: \.zarray: more than 100 levels"):
        OrbaxReader(folder)
    (folder / "_METADATA").write_text('{"a":' * 100_000)
    with pytest.raises(InputError, match="_METADATA: cannot be read: more than 100 levels"):
        OrbaxReader(folder)


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


def test_a_backslash_in_a_name_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """TensorStore takes it for a slash, and would write into another folder."""
    folder = tmp_path / "a\\b"
    folder.mkdir()
    for call in (lambda: write_orbax(folder / "params", {}, lambda key, row: np.zeros(1)), lambda: OrbaxReader(folder)):
        with pytest.raises(InputError, match="has a backslash"):
            call()
    assert list(tmp_path.rglob("*")) == [folder]
