"""Checkpoints of either framework's runs: noticed when they are damaged, and only then moved aside."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from gpt_core.errors import InputError
from gpt_core.files.hashes import HASHES_FILE
from gpt_core.runs.config import RunConfig
from gpt_core.runs.saved import StepRecord, checkpoint_folder, saved_steps

CONFIG = RunConfig.from_dict(
    {
        "model": {"vocab_size": 512, "n_layers": 1, "n_heads": 2, "embed_dim": 16, "context_length": 8}
        | {"n_experts": 2, "gated_mlp": True, "bias": False},
        "train": {"batch_size": 8, "keep_last": 3},
    }
)
FILES = {
    "jax": ["params/**/d/*", "optimizer/**/d/*", "params/manifest.ocdbt", "record/record.json"],
    "torch": ["model.safetensors", "optimizer.safetensors", "record/record.json"],
}


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda data: None,
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "flipped": flip,
}


class Twin(NamedTuple):
    """A trainer's checkpoints, and the state that they hold."""

    name: str
    checkpoints: type[Any]
    state: Any
    saved: Any
    weights: Callable[[Any], dict[str, np.ndarray]]


def jax_twin() -> Twin:
    import jax
    from flax import nnx

    from jax_gpt.run_checkpoint import RunCheckpoints
    from jax_gpt.sharding import create_mesh
    from jax_gpt.step import create_program

    program = create_program(CONFIG, create_mesh(CONFIG.jax.mesh))

    def weights(state: Any) -> dict[str, np.ndarray]:
        leaves, _ = jax.tree.flatten_with_path(nnx.to_pure_dict(state.parameters))
        return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}

    return Twin("jax", RunCheckpoints, program.state, program.create(), weights)


def torch_twin() -> Twin:
    from torch_gpt.distributed import connect
    from torch_gpt.run_checkpoint import RunCheckpoints
    from torch_gpt.step import create_program

    def weights(state: Any) -> dict[str, np.ndarray]:
        return {key: parameter.detach().numpy().copy() for key, parameter in state.parameters.items()}

    state = create_program(CONFIG, connect()).state
    return Twin("torch", RunCheckpoints, state, state, weights)


@pytest.fixture(scope="module")
def twins() -> dict[str, Twin]:
    return {"jax": jax_twin(), "torch": torch_twin()}


def save(twin: Twin, run: Path, *steps: int) -> None:
    with twin.checkpoints(run, CONFIG.train, pytest.fail) as checkpoints:
        for step in steps:
            checkpoints.save(twin.saved, StepRecord(step, 64 * step, {}, 0, 0, None, twin.name, {}))
        checkpoints.wait()


@pytest.fixture(scope="module")
def saved(twins: dict[str, Twin], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each framework with checkpoints of steps 4 and 8."""
    runs = {}
    for name, twin in twins.items():
        runs[name] = tmp_path_factory.mktemp(name) / "run"
        (runs[name] / "checkpoints").mkdir(parents=True)
        save(twin, runs[name], 4, 8)
    return runs


@pytest.fixture
def copies(saved: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    def copy(framework: str, *, hashed: bool = True) -> Path:
        run = tmp_path / framework
        shutil.copytree(saved[framework], run)
        for step in () if hashed else (4, 8):
            (checkpoint_folder(run, step) / HASHES_FILE).unlink()
        return run

    return copy


def restore(twin: Twin, run: Path) -> tuple[int, list[str]]:
    """The step that was taken, and what was said; the weights are those that were saved."""
    said: list[str] = []
    expected = twin.weights(twin.saved)
    with twin.checkpoints(run, CONFIG.train, said.append) as checkpoints:
        state, record = checkpoints.restore(twin.state)
    found = twin.weights(state)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)
    return record.step, said


def damage(run: Path, step: int, pattern: str, kind: str) -> str:
    """Damage the largest file that fits; returns its name."""
    folder = checkpoint_folder(run, step)
    path = max((path for path in folder.glob(pattern) if path.is_file()), key=lambda path: path.stat().st_size)
    data = DAMAGE[kind](path.read_bytes())
    path.unlink() if data is None else path.write_bytes(data)
    return str(path.relative_to(folder))


@pytest.mark.parametrize("framework", FILES)
def test_every_file_of_a_checkpoint_has_its_hash(framework: str, saved: dict[str, Path]) -> None:
    for step in (4, 8):
        folder = checkpoint_folder(saved[framework], step)
        files = [path for path in folder.rglob("*") if path.is_file() and path != folder / HASHES_FILE]
        assert json.loads((folder / HASHES_FILE).read_text()) == {
            str(path.relative_to(folder)): {
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "bytes": len(path.read_bytes()),
            }
            for path in files
        }
        assert {"record", "params" if framework == "jax" else "model.safetensors"} <= {
            path.relative_to(folder).parts[0] for path in files
        }


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize(("framework", "pattern"), [(name, file) for name, files in FILES.items() for file in files])
def test_a_damaged_file_moves_the_checkpoint_aside_and_the_one_before_is_taken(
    framework: str, pattern: str, kind: str, twins: dict[str, Twin], copies: Callable[..., Path]
) -> None:
    run = copies(framework)
    name = damage(run, 8, pattern, kind)
    step, said = restore(twins[framework], run)
    assert step == 4
    assert len(said) == 1
    assert name in said[0]
    assert saved_steps(run) == [4]
    assert [path.name for path in (run / "damaged").iterdir()] == ["8"]


@pytest.mark.parametrize("hashed", [True, False])
def test_metadata_that_orbax_cannot_survive_names_its_checkpoint(
    hashed: bool, twins: dict[str, Twin], copies: Callable[..., Path]
) -> None:
    run = copies("jax", hashed=hashed)
    (checkpoint_folder(run, 4) / "_CHECKPOINT_METADATA").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"checkpoints/4: cannot be read, its brackets go too deep"):
        restore(twins["jax"], run)
    assert saved_steps(run) == [4, 8]


@pytest.mark.parametrize("kind", ["missing", "empty", "cut"])
@pytest.mark.parametrize(("framework", "pattern"), [(name, file) for name, files in FILES.items() for file in files])
def test_without_hashes_damage_is_what_cannot_be_read(
    framework: str, pattern: str, kind: str, twins: dict[str, Twin], copies: Callable[..., Path]
) -> None:
    run = copies(framework, hashed=False)
    # All of them: Orbax may leave files that nothing refers to any more, which nobody misses.
    files = [path for path in checkpoint_folder(run, 8).glob(pattern) if path.is_file()]
    for path in files:
        data = DAMAGE[kind](path.read_bytes())
        path.unlink() if data is None else path.write_bytes(data)
    step, said = restore(twins[framework], run)
    assert step == 4
    assert len(said) == 1
    assert len(said[0].splitlines()) == 1
    assert [path.name for path in (run / "damaged").iterdir()] == ["8"]


@pytest.mark.parametrize("framework", FILES)
def test_a_checkpoint_of_an_earlier_version_is_read_without_hashes(
    framework: str, twins: dict[str, Twin], copies: Callable[..., Path]
) -> None:
    assert restore(twins[framework], copies(framework, hashed=False)) == (8, [])


@pytest.mark.parametrize("framework", FILES)
def test_all_damaged_is_said_and_nothing_is_moved(
    framework: str, twins: dict[str, Twin], copies: Callable[..., Path]
) -> None:
    run = copies(framework)
    names = [damage(run, step, FILES[framework][0], "flipped") for step in (4, 8)]
    with pytest.raises(InputError, match=r"no checkpoint can be read: step 8 .*, step 4 ") as caught:
        restore(twins[framework], run)
    assert all(name in str(caught.value) for name in names)
    assert saved_steps(run) == [4, 8]
    assert not (run / "damaged").exists()


def a_host_is_gone() -> Exception:
    from jax.errors import JaxRuntimeError

    return JaxRuntimeError("UNAVAILABLE: a host is gone")


OF_THE_MACHINE: dict[str, Callable[[], BaseException]] = {
    "memory": MemoryError,
    "a host": a_host_is_gone,
    "threads": lambda: RuntimeError("can't start new thread"),
    "files": lambda: OSError(24, "Too many open files"),
    "files, in TensorStore": lambda: ValueError("RESOURCE_EXHAUSTED: Error opening: Too many open files"),
    "Ctrl-C": KeyboardInterrupt,
}


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("failure", OF_THE_MACHINE)
def test_what_is_not_the_files_fault_is_no_damage(
    failure: str,
    wrapped: bool,
    hashed: bool,
    twins: dict[str, Twin],
    copies: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raised = OF_THE_MACHINE[failure]()
    if wrapped and isinstance(raised, Exception):  # as Orbax wraps what TensorStore raises
        cause, raised = raised, Exception("Encountered error while reading array index: (slice(0, 2),).\n})>.")
        raised.__cause__ = cause

    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.restore", fail)
    run = copies("jax", hashed=hashed)
    with pytest.raises(type(raised)) as caught:
        restore(twins["jax"], run)
    assert caught.value is raised
    assert saved_steps(run) == [4, 8]
    assert not (run / "damaged").exists()


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize(
    ("framework", "ours"),
    [("jax", "jax_gpt.run_checkpoint._filled"), ("torch", "torch_gpt.run_checkpoint.from_numpy")],
)
def test_an_error_of_ours_is_no_damage(
    framework: str,
    ours: str,
    hashed: bool,
    twins: dict[str, Twin],
    copies: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("a mistake")

    monkeypatch.setattr(ours, fail)
    run = copies(framework, hashed=hashed)
    with pytest.raises(KeyError, match="a mistake"):
        restore(twins[framework], run)
    assert saved_steps(run) == [4, 8]


@pytest.mark.parametrize(
    ("framework", "reader"),
    [("jax", "orbax.checkpoint.CheckpointManager.restore"), ("torch", "torch_gpt.run_checkpoint._check_keys")],
)
def test_intact_files_that_cannot_be_read_are_not_moved_aside(
    framework: str,
    reader: str,
    twins: dict[str, Twin],
    copies: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise InputError("no room")

    monkeypatch.setattr(reader, fail)
    run = copies(framework)
    with pytest.raises(InputError, match=r"checkpoints/8: its files are as they were written, .*no room"):
        restore(twins[framework], run)
    assert saved_steps(run) == [4, 8]
    assert not (run / "damaged").exists()


@pytest.mark.parametrize("framework", FILES)
def test_a_record_of_hashes_that_cannot_be_written_is_a_checkpoint_that_cannot(
    framework: str, twins: dict[str, Twin], copies: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"{framework}_gpt.run_checkpoint.write_hashes", full)
    run, twin = copies(framework), twins[framework]
    with pytest.raises(InputError, match=r"a checkpoint cannot be written: .*No space left on device"):
        save(twin, run, 12)
    # Whatever is there is whole.
    assert restore(twin, run) == (max(saved_steps(run)), [])


@pytest.mark.parametrize("framework", FILES)
def test_an_older_checkpoint_without_its_record_does_not_stop_the_next_save(
    framework: str, twins: dict[str, Twin], copies: Callable[..., Path]
) -> None:
    run, twin = copies(framework), twins[framework]
    (checkpoint_folder(run, 4) / "record/record.json").unlink()
    save(twin, run, 12)
    assert saved_steps(run) == [4, 8, 12]
