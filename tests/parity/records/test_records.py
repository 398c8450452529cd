"""Records: what `parity record` writes and `parity compare` makes of it."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gpt_core.config import ModelConfig
from gpt_core.formats import open_checkpoint
from gpt_core.parameters import parameter_table
from gpt_core.sites import model_sites
from parity.records.file import StoredRecord, hash_tokens, write_record
from parity.records.offline import compare_records, open_checkpoint_record
from parity.records.recording import hash_weights

Array = np.ndarray[Any, Any]


@pytest.fixture
def contents(tiny: ModelConfig) -> tuple[dict[str, Any], dict[str, Array]]:
    """Metadata and arrays as `parity record --trace --gradients` would write them, with drawn numbers."""
    random = np.random.default_rng(3)
    tokens = random.integers(0, tiny.vocab_size, (2, 9))
    sites = [site for site in model_sites(tiny) if site != "logits"]
    gradients = list(parameter_table(tiny))
    metadata = {
        "kind": "checkpoint",
        "framework": "jax",
        "dtype": "float64",
        "checkpoint": "tiny",
        "config": tiny.to_dict(),
        "environment": {"jax": "0", "jax_device": "cpu", "jax_matmul_precision": "highest"},
        "tokens_sha256": hash_tokens(tokens),
        "weights_sha256": "0" * 64,
        "sites": sites,
        "gradients": gradients,
    }
    arrays = {"tokens": tokens, "loss": np.asarray(3.4)}
    table = parameter_table(tiny)
    arrays |= {f"gradient:{name}": random.normal(size=table[name].shape) for name in gradients}
    arrays["gradient:blocks.attention.key.bias"][:] = 0  # softmax does not see it
    arrays |= {f"site:{site}": random.normal(size=(2, 9, 20)) for site in sites}
    arrays["logits"] = random.normal(size=(2, 9, tiny.vocab_size))
    return metadata, arrays


@pytest.fixture
def two_records(contents: tuple[dict[str, Any], dict[str, Array]], tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """`two_records(change)` writes two equal records, the first after `change(metadata, arrays)`."""

    def write(change: Callable[[dict[str, Any], dict[str, Array]], object] = lambda m, a: None) -> tuple[Path, Path]:
        metadata, arrays = contents
        write_record(tmp_path / "b.npz", metadata, arrays.items())
        metadata, arrays = json.loads(json.dumps(metadata)), {name: array.copy() for name, array in arrays.items()}
        change(metadata, arrays)
        write_record(tmp_path / "a.npz", metadata, arrays.items())
        return tmp_path / "a.npz", tmp_path / "b.npz"

    return write


# --------------------------------------------------------------------------------------------------------- the format


@pytest.mark.parametrize("name", ["record.npz", "record"])
def test_a_record_is_read_with_numpy_alone(name: str, tmp_path: Path) -> None:
    site = np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3) / 3
    write_record(tmp_path / name, {"sites": ["x"]}, {"site:x": site, "loss": np.asarray(2.5)}.items())
    read = (
        "{k: z[k] for k in z.files}" if name.endswith("npz") else "{p.stem: load(p) for p in Path(path).glob('*.npy')}"
    )
    program = f"""
import sys, json, numpy as np
from pathlib import Path
path = sys.argv[1]
load = lambda p: np.load(p, allow_pickle=False)
z = load(path) if path.endswith("npz") else None
arrays = {read}
assert not {{m.partition(".")[0] for m in sys.modules}} & {{"ml_dtypes", "jax", "torch", "parity"}}
print(json.dumps({{"metadata": json.loads(str(arrays["metadata"])), "dtype": arrays["site:x"].dtype.name,
                  "site": arrays["site:x"].tolist(), "loss": float(arrays["loss"])}}))
"""
    done = subprocess.run([sys.executable, "-I", "-c", program, str(tmp_path / name)], capture_output=True, check=True)
    assert json.loads(done.stdout) == {
        "metadata": {"format": "twingpt record", "version": 1, "sites": ["x"]},
        "dtype": "float32",
        "site": site.astype(np.float64).tolist(),
        "loss": 2.5,
    }


def test_equal_records_are_equal_files(contents: tuple[dict[str, Any], dict[str, Array]], tmp_path: Path) -> None:
    metadata, arrays = contents
    for name in ("one.npz", "two.npz"):
        write_record(tmp_path / name, metadata, arrays.items())
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


@pytest.mark.parametrize("name", ["record.npz", "record"])
def test_a_write_that_fails_half_way_leaves_what_was_there(name: str, tmp_path: Path) -> None:
    write_record(tmp_path / name, {}, [("x", np.ones(3))])

    def failing() -> Iterator[tuple[str, Array]]:
        yield "x", np.zeros(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_record(tmp_path / name, {}, failing(), force=True)
    assert StoredRecord(tmp_path / name).read("x").tolist() == [1, 1, 1]
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["{}.npz", "{}"])
def test_writing_and_comparing_hold_a_few_tensors_and_not_the_trace(
    name: str, contents: tuple[dict[str, Any], dict[str, Array]], tmp_path: Path
) -> None:
    metadata, small = contents
    megabytes = 8  # each of ten sites
    metadata |= {"gradients": [], "dtype": "float32", "sites": metadata["sites"][:10]}

    def arrays() -> Iterator[tuple[str, Array]]:
        yield "tokens", small["tokens"]
        yield "logits", small["logits"]
        for seed, site in enumerate(metadata["sites"]):
            yield f"site:{site}", np.random.default_rng(seed).random(megabytes << 18, dtype=np.float32)

    tracemalloc.start()
    try:
        for side in "ab":
            write_record(tmp_path / name.format(side), metadata, arrays())
        writing = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        a, b = (open_checkpoint_record(tmp_path / name.format(side)) for side in "ab")
        assert all(result.passed for result in compare_records(a, b))
        comparing = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert writing < 2.5 * megabytes * 2**20
    assert comparing < 4 * megabytes * 2**20  # one of each side, and the few megabytes that are widened at once


# --------------------------------------------------------------------------------------------------------- the hashes


@pytest.mark.parametrize("format", ["jax", "torch"])
def test_the_hash_of_weights_is_that_of_their_values_in_the_order_of_the_table(
    format: str, tiny: ModelConfig, draw_weights: Callable[..., Any], write_checkpoint: Callable[..., Path]
) -> None:
    weights = draw_weights(tiny)
    digest = hashlib.sha256()
    for name in parameter_table(tiny):
        value = weights[name][:29] if name == "token_embedding" else weights[name]  # 29 rows, padded to 32
        for label, row in (
            [(f"{name}[{i}]", row) for i, row in enumerate(value)] if "blocks" in name else [(name, value)]
        ):
            digest.update(f"{label} float32 {'x'.join(map(str, row.shape))}\n".encode() + row.tobytes())
    assert hash_weights(open_checkpoint(write_checkpoint(format, tiny, weights))) == digest.hexdigest()


def test_an_exact_cast_keeps_the_hash_and_a_lossy_one_changes_it(
    tiny: ModelConfig, draw_weights: Callable[..., Any], write_checkpoint: Callable[..., Path]
) -> None:
    def hashed(name: str, weights: dict[str, Array]) -> str:
        return hash_weights(open_checkpoint(write_checkpoint("torch", tiny, weights, name=name)))

    full = draw_weights(tiny)
    rough = {name: array.astype(ml_dtypes.bfloat16) for name, array in full.items()}
    widened = {name: array.astype(np.float64) for name, array in rough.items()}
    assert hashed("rough", rough) == hashed("widened", widened) != hashed("full", full)


# ----------------------------------------------------------------------------------------------------- parity record


def test_record_writes_what_was_asked_for_and_nothing_else(
    tiny: ModelConfig, write_checkpoint: Callable[..., Path], parity: Callable[..., Any], tmp_path: Path
) -> None:
    checkpoint, out = write_checkpoint("torch", tiny), tmp_path / "out.npz"
    ids = np.random.default_rng(0).integers(0, tiny.vocab_size, (2, 11))
    np.save(tmp_path / "tokens.npy", ids)
    command = ["record", checkpoint, out, "--framework", "torch", "--tokens", tmp_path / "tokens.npy", "--json"]
    assert parity(*command).code == 0
    with np.load(out) as arrays:
        assert set(arrays.files) == {"metadata", "tokens", "logits"}
        assert arrays["logits"].shape == (2, 11, 29)
        library = json.loads(str(arrays["metadata"]))["library"]
    assert library["products"].keys() == {"20", "24", "28"}  # embed, heads x head_dim, mlp
    assert all(1e-8 < error < 1e-6 for error in library["products"].values())
    refused = parity(*command, "--trace")
    assert refused.code == 2
    assert "--force" in refused.err
    done = parity(*command, "--trace", "--gradients", "--dtype", "float64", "--force")
    assert done.code == 0
    with np.load(out) as arrays:
        metadata = json.loads(str(arrays["metadata"]))
        assert metadata["sites"] == [site for site in model_sites(tiny) if site != "logits"]
        assert set(arrays.files) == {
            *("metadata", "tokens", "logits", "loss"),
            *(f"site:{site}" for site in metadata["sites"]),
            *(f"gradient:{name}" for name in parameter_table(tiny)),
        }
        assert arrays["gradient:token_embedding"].shape == (29, 20)  # without the rows that pad the vocabulary
        np.testing.assert_array_equal(arrays["tokens"], ids)
        wide = arrays["logits"].astype(np.float64)
        log_probabilities = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
        picked = np.take_along_axis(log_probabilities[:, :-1], ids[:, 1:, None], -1)
        assert float(arrays["loss"]) == pytest.approx(-picked.mean(), rel=1e-12)
    assert {"config", "environment", "tokens_sha256", "weights_sha256", "checkpoint"} <= metadata.keys()
    assert metadata["environment"]["torch_device"] == "cpu"
    assert json.loads(done.out)["out"] == str(out)


def test_record_refuses_gradients_that_nothing_could_be_held_against(
    tiny: ModelConfig, write_checkpoint: Callable[..., Path], parity: Callable[..., Any], tmp_path: Path
) -> None:
    checkpoint = write_checkpoint("torch", tiny)
    np.save(tmp_path / "one.npy", np.zeros((2, 1), np.int64))
    base = ["record", checkpoint, tmp_path / "out.npz", "--framework", "torch", "--tokens", tmp_path / "one.npy"]
    rough = parity(*base, "--gradients", "--dtype", "bfloat16")
    short = parity(*base, "--gradients")
    assert (rough.code, short.code) == (2, 2)
    assert "no bound for gradients in bfloat16" in rough.err
    assert "one token" in short.err
    assert not (tmp_path / "out.npz").exists()


FRAMEWORKS = {"jax": ["jax", "jaxlib", "flax", "optax", "orbax"], "torch": ["torch"]}


def without(frameworks: list[str], *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Call `parity` in a process of its own, where some frameworks are not installed as far as Python can tell."""
    blocked = [package for framework in frameworks for package in FRAMEWORKS[framework]]
    hook = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""
    (folder / "sitecustomize.py").write_text(hook)
    environment = os.environ | {"PYTHONPATH": str(folder)}
    program = "import sys; from parity.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_records_made_where_only_one_framework_is_installed_compare_where_none_is(
    tiny: ModelConfig, draw_weights: Callable[..., Any], write_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    weights = draw_weights(tiny)
    np.save(tmp_path / "tokens.npy", np.random.default_rng(1).integers(0, tiny.vocab_size, (2, 23)))
    for framework, other in (("jax", "torch"), ("torch", "jax")):
        checkpoint = write_checkpoint(other, tiny, weights, name=framework)
        base = ["record", checkpoint, tmp_path / f"{framework}.npz", "--tokens", tmp_path / "tokens.npy"]
        flags = ["--dtype", "float64", "--trace", "--gradients"]
        refused = without([framework], *base, *flags, "--framework", framework, folder=tmp_path)
        assert refused.returncode == 2, refused.stderr
        assert "is not installed: pip install 'twingpt[" in refused.stderr
        done = without([other], *base, *flags, "--framework", framework, folder=tmp_path)
        assert done.returncode == 0, done.stderr
    done = without(["jax", "torch"], "compare", tmp_path / "jax.npz", tmp_path / "torch.npz", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["passed"]
    assert {case["check"] for case in report["cases"]} == {"logits", "loss", "gradients", "activations"}
    assert 0 < max(case["relative_error"] for case in report["cases"]) < 1e-11  # two frameworks, not one file twice
    assert [record["framework"] for record in report["records"]] == ["jax", "torch"]


# ---------------------------------------------------------------------------------------------------- parity compare


def test_equal_records_are_equal(
    two_records: Callable[..., tuple[Path, Path]], parity: Callable[..., Any], tmp_path: Path
) -> None:
    a, b = two_records()
    done = parity("compare", a, b, "--out", tmp_path / "report")
    assert done.code == 0
    assert done.out.count("│ equal │") == 4
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["passed"]
    assert {case["relative_error"] for case in report["cases"]} == {0}


def test_the_first_site_that_differs_is_named_with_its_index(
    two_records: Callable[..., tuple[Path, Path]], parity: Callable[..., Any]
) -> None:
    def change(metadata: dict[str, Any], arrays: dict[str, Array]) -> None:
        sites = metadata["sites"]
        for site in sites[sites.index("blocks.1.mlp.hidden") :]:
            arrays[f"site:{site}"][1, 4, 7] += 3
        arrays["logits"] *= 1.5

    done = parity("compare", *two_records(change), "--json")
    assert done.code == 1
    cases = {case["check"]: case for case in json.loads(done.out)["cases"]}
    assert {check for check, case in cases.items() if not case["passed"]} == {"activations", "logits"}
    divergence = cases["activations"]["first_divergence"]
    assert (divergence["site"], divergence["worst_index"]) == ("blocks.1.mlp.hidden", [1, 4, 7])
    assert (divergence["before"], divergence["after"]) == ("blocks.1.mlp_norm", "blocks.1.mlp.output")
    assert divergence["error_before"] == 0
    assert "first differs at blocks.1.mlp.hidden" in cases["activations"]["reason"]


def test_a_wrong_gradient_is_named_with_its_block(
    two_records: Callable[..., tuple[Path, Path]], parity: Callable[..., Any]
) -> None:
    def change(metadata: dict[str, Any], arrays: dict[str, Array]) -> None:
        arrays["gradient:blocks.mlp.up.kernel"][1] *= 1.001

    done = parity("compare", *two_records(change))
    assert done.code == 1
    assert re.search(r"FAILED .* gradients: .*blocks\.1\.mlp\.up\.kernel", done.out)


@pytest.mark.parametrize("side", ["a", "b", "both"])
@pytest.mark.parametrize(
    ("array", "index", "place"),
    [
        ("logits", (1, 2, 3), "logits at (1, 2, 3)"),
        ("site:blocks.0.attention.key", (0, 5, 6), "blocks.0.attention.key at (0, 5, 6)"),
        ("gradient:blocks.mlp.down.kernel", (2, 1, 0), "blocks.mlp.down.kernel at (2, 1, 0)"),
    ],
)
def test_nan_fails_by_site_and_index(
    side: str,
    array: str,
    index: tuple[int, ...],
    place: str,
    contents: tuple[dict[str, Any], dict[str, Array]],
    parity: Callable[..., Any],
    tmp_path: Path,
) -> None:
    metadata, arrays = contents
    for name in "ab":
        changed = {key: value.copy() for key, value in arrays.items()}
        changed[array][index] = np.nan if side in (name, "both") else changed[array][index]
        write_record(tmp_path / f"{name}.npz", metadata, changed.items())
    done = parity("compare", tmp_path / "a.npz", tmp_path / "b.npz", "--json")
    assert done.code == 1
    report = json.loads(done.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    reasons = [case["reason"] for case in report["cases"] if not case["passed"]]
    assert any("NaN or inf in" in reason and place in reason for reason in reasons), reasons
    assert parity("compare", tmp_path / "a.npz", tmp_path / "b.npz").code == 1


def test_folders_of_records_are_matched_by_name(
    two_records: Callable[..., tuple[Path, Path]], parity: Callable[..., Any], tmp_path: Path
) -> None:
    a, b = two_records(lambda metadata, arrays: arrays["logits"].__imul__(1.01))
    for folder, files in {"one": {"x": b, "y": b}, "two": {"x": b, "y": a}}.items():
        (tmp_path / folder).mkdir()
        for name, file in files.items():
            shutil.copy(file, tmp_path / folder / f"{name}.npz")
    done = parity("compare", tmp_path / "one", tmp_path / "two", "--json")
    assert done.code == 1
    failed = [(case["variant"], case["check"]) for case in json.loads(done.out)["cases"] if not case["passed"]]
    assert failed == [("y", "logits"), ("y", "activations")]  # of which the logits are the last
    (tmp_path / "one" / "y.npz").unlink()
    refused = parity("compare", tmp_path / "one", tmp_path / "two")
    assert refused.code == 2
    assert f"{tmp_path / 'one'}: lacks 1 records of the other folder, such as y.npz" in refused.err


def test_a_folder_record_equals_the_same_npz(
    contents: tuple[dict[str, Any], dict[str, Array]],
    two_records: Callable[..., tuple[Path, Path]],
    parity: Callable[..., Any],
    tmp_path: Path,
) -> None:
    metadata, arrays = contents
    write_record(tmp_path / "folder", metadata, arrays.items())
    assert parity("compare", tmp_path / "folder", two_records()[1]).code == 0


def test_other_weights_are_compared_when_asked_for(
    two_records: Callable[..., tuple[Path, Path]], parity: Callable[..., Any]
) -> None:
    a, b = two_records(lambda metadata, arrays: metadata.update(weights_sha256="1" * 64))
    refused = parity("compare", a, b)
    assert refused.code == 2
    assert "different weights" in refused.err
    assert "--ignore-weights" in refused.err
    assert parity("compare", a, b, "--ignore-weights").code == 0


def replace_tokens(metadata: dict[str, Any], arrays: dict[str, Array]) -> None:
    arrays["tokens"][1, 3] ^= 1
    metadata["tokens_sha256"] = hash_tokens(arrays["tokens"])


def drop(kind: str, *names: str) -> Callable[[dict[str, Any], dict[str, Array]], None]:
    """Leave arrays out, and announce them no more."""

    def change(metadata: dict[str, Any], arrays: dict[str, Array]) -> None:
        for name in names or tuple(metadata[kind]):
            metadata[kind].remove(name)
            del arrays[f"{kind[:-1]}:{name}"]

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (replace_tokens, "were made from different tokens"),
        (lambda m, a: a["tokens"].__iadd__(1), "its tokens are not those that were hashed"),
        (lambda m, a: m.update(dtype="float32"), "were computed in float32 and float64"),
        (lambda m, a: m.update(dtype="int8"), "was computed in 'int8'"),
        (lambda m, a: m.pop("config"), "has no config"),
        (lambda m, a: m["config"].update(n_experts=8), "n_experts"),
        (lambda m, a: m.update(kind="model"), "parity.api.compare"),
        (lambda m, a: m.update(version=2), "is a record of version 2, and this program reads version 1"),
        (drop("sites", "blocks.2.attention.mixed"), "lacks 1 intermediates of"),
        (drop("sites", "blocks.2.attention.mixed"), "such as blocks.2.attention.mixed"),
        (drop("sites"), "record both with --trace"),
        (drop("gradients"), "record both with --gradients"),
        (drop("gradients", "final_norm.bias"), "such as final_norm.bias"),
        (lambda m, a: a.pop("site:embedding"), "are missing, such as site:embedding"),
        (lambda m, a: a.update(logits=a["logits"][..., :-1]), "[2, 9, 28]"),
    ],
)
def test_records_that_do_not_belong_together_are_refused(
    change: Callable[..., Any],
    words: str,
    two_records: Callable[..., tuple[Path, Path]],
    parity: Callable[..., Any],
) -> None:
    a, b = two_records(change)
    for first, second in ((a, b), (b, a)):
        assert_refused(parity("compare", first, second), words.replace("float32 and float64", "float"), a)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("logits.npy").header_offset
    content[offset + 1000] ^= 4
    path.write_bytes(content)


def pickle_inside(path: Path) -> None:
    with np.load(path) as archive:
        arrays = dict(archive)
    with path.open("wb") as file:
        np.savez(file, allow_pickle=True, **(arrays | {"logits": np.array([{}])}))


def without_metadata(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, logits=np.ones((1, 2, 3)))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "not a whole record"),
        (lambda path: path.write_bytes(b""), "not a whole record"),
        (lambda path: path.write_text("not a record"), "not a whole record"),
        (flip_a_bit, "not a whole record (logits: Bad CRC-32"),
        (pickle_inside, "Object arrays cannot be loaded"),
        (without_metadata, "holds no metadata"),
        (Path.unlink, "no such file or folder"),
    ],
)
def test_damaged_records_are_refused(
    damage: Callable[[Path], object],
    words: str,
    two_records: Callable[..., tuple[Path, Path]],
    parity: Callable[..., Any],
) -> None:
    a, b = two_records()
    damage(a)
    assert_refused(parity("compare", a, b), words, a)


def header_of_terabytes(path: Path) -> None:
    content = path.read_bytes()
    said, promised = b"(2, 9, 29), }          ", b"(2, 9, 299999999999), }"
    assert content.count(said) == 1
    path.write_bytes(content.replace(said, promised))


def deflated(path: Path) -> None:
    with np.load(path) as archive:
        arrays = dict(archive)
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def stored_twice(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("logits.npy", b"")


def with_member(name: str) -> Callable[[Path], None]:
    def add(path: Path) -> None:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, b"")

    return add


def with_metadata(array: Array) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with np.load(path) as archive:
            arrays = dict(archive)
        with path.open("wb") as file:
            np.savez(file, **(arrays | {"metadata": array}))

    return write


def is_link_to(place: str) -> Callable[[Path], None]:
    def link(path: Path) -> None:
        path.unlink()
        path.symlink_to(place)

    return link


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (header_of_terabytes, "is 43199999999856 bytes of data, and 4,176 are there"),
        (deflated, "is compressed, and records are not"),
        (stored_twice, "holds a name twice"),
        (with_member("../outside.npy"), "holds '../outside.npy', which is the name of no array"),
        (with_member("script.py"), "holds 'script.py', which is the name of no array"),
        (with_metadata(np.zeros(3)), "metadata: is float64 (3,), no text"),
        (with_metadata(np.array("[" * 10_000)), "metadata: more than 100 levels of brackets"),
        (with_metadata(np.array('{"version": 1, "version": 2}')), "'version' stands there twice"),
        (with_metadata(np.array('{"version": true}')), "is a record of version True, and"),
        (is_link_to("/dev/zero"), "is a device or a pipe"),
        (is_link_to("a.npz"), "is a link to itself"),
    ],
)
def test_records_that_nobody_wrote_by_mistake_are_refused(
    damage: Callable[[Path], object],
    words: str,
    two_records: Callable[..., tuple[Path, Path]],
    parity: Callable[..., Any],
) -> None:
    a, b = two_records()
    damage(a)
    assert_refused(parity("compare", a, b), words, a)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m, a: a.update(logits=a["logits"].astype(np.int8)), "logits are int8, not floats"),
        (lambda m, a: a.update(logits=a["logits"] * 1j), "logits are complex128, not floats"),
        (lambda m, a: a.update(logits=a["logits"].astype("S8")), "logits are |S8, not floats"),
        (lambda m, a: a.update({"site:embedding": np.ones((2, 9, 20), bool)}), "site:embedding are bool, not floats"),
        (lambda m, a: a.update(tokens=a["tokens"].astype(float)), "tokens are float64, not whole numbers"),
        (lambda m, a: a.update(tokens=a["tokens"][0]), "tokens of shape [9], expected [batch, time]"),
        (lambda m, a: a.update(tokens=a["tokens"][:0]), "tokens of shape [0, 9], expected [batch, time]"),
        (lambda m, a: a.update(loss=np.ones(3)), "loss of shape [3], expected []"),
        (lambda m, a: m.update(sites=[3]), "sites = [3] must be a list of texts"),
        (lambda m, a: m["sites"].append(m["sites"][0]), "sites has a name twice"),
        (lambda m, a: m["sites"].append("../../outside"), "announces the site '../../outside', which"),
        (lambda m, a: m["gradients"].append("nothing"), "announces the gradient 'nothing', which"),
    ],
)
def test_arrays_that_no_model_computes_are_refused_by_name(
    change: Callable[..., Any],
    words: str,
    two_records: Callable[..., tuple[Path, Path]],
    parity: Callable[..., Any],
) -> None:
    a, b = two_records(change)
    assert_refused(parity("compare", a, b), words, a)


def test_a_report_is_written_into_no_folder_of_something_else(
    two_records: Callable[..., tuple[Path, Path]],
    write_checkpoint: Callable[..., Path],
    tiny: ModelConfig,
    parity: Callable[..., Any],
    tmp_path: Path,
) -> None:
    a, b = two_records()
    checkpoint = write_checkpoint("torch", tiny)
    for folder in (checkpoint, tmp_path):
        before = sorted(folder.iterdir())
        for command in (("compare", a, b), ("check", checkpoint, checkpoint), ("verify", checkpoint)):
            assert_refused(parity(*command, "--out", folder), "where no report belongs", folder)
        assert sorted(folder.iterdir()) == before
    assert_refused(parity("compare", a, b, "--out", a), "is a file; give the name of a folder", a)
    (tmp_path / "mine").mkdir()
    assert parity("compare", a, b, "--out", tmp_path / "mine").code == 0
    assert parity("compare", a, b, "--out", tmp_path / "mine").code == 0


def test_a_folder_record_that_lost_a_file_or_half_of_one_is_refused(
    contents: tuple[dict[str, Any], dict[str, Array]], parity: Callable[..., Any], tmp_path: Path
) -> None:
    metadata, arrays = contents
    a = tmp_path / "a"
    write_record(a, metadata, arrays.items())
    cut(a / "site:embedding.npy")
    assert_refused(parity("compare", a, a), "not a whole record (site:embedding", a)
    (a / "logits.npy").unlink()
    assert_refused(parity("compare", a, a), "are missing, such as logits", a)


def test_folders_without_records_and_pairs_of_unlike_kinds_are_refused(
    two_records: Callable[..., tuple[Path, Path]], parity: Callable[..., Any], tmp_path: Path
) -> None:
    a, _ = two_records()
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_refused(parity("compare", empty, empty), "holds no records", empty)
    assert_refused(parity("compare", a, empty), "give two of a kind", empty)
    assert_refused(parity("compare", empty, tmp_path / "none.npz"), "no such file or folder", tmp_path / "none.npz")


def assert_refused(done: Any, words: str, path: Path) -> None:
    """One line that names the file and the reason, and exit code 2."""
    assert done.code == 2, done
    assert done.out == ""
    assert len(done.err.splitlines()) == 1, done.err
    assert done.err.startswith("error: ")
    assert words in done.err
    assert str(path) in done.err
