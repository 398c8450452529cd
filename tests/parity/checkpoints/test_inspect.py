"""`parity inspect` shows what is there, without reading the weights."""

import json
import re

import pytest

from gpt_core.config import ModelConfig
from gpt_core.files.hashes import write_hashes
from gpt_core.text.gpt2 import gpt2_tokenizer


@pytest.mark.parametrize("format", ["jax", "torch"])
def test_json_holds_format_config_counts_and_every_parameter(tiny, format, write_checkpoint, parity):
    folder = write_checkpoint(format, tiny)
    called = parity("inspect", folder, "--json")
    found = json.loads(called.out)
    assert (called.code, called.err) == (0, "")
    assert found["format"] == format
    assert found["variant"] == "learned-gqa-window"
    assert found["tokenizer"] is None
    assert found["dtypes"] == ["float32"]
    assert ModelConfig.from_dict(found["config"]) == tiny
    vocab, position, layers, embed, mlp, query, kv = 32, 40, 3, 20, 28, 4 * 6, 2 * 6
    attention = (embed + 1) * (query + 2 * kv) + query * embed + embed
    block = attention + (embed + 1) * mlp + (mlp + 1) * embed + 4 * embed
    assert found["parameter_count"] == (vocab + position) * embed + layers * block + 2 * embed
    assert found["bytes"] == 4 * found["parameter_count"]
    assert sum(row["parameters"] for row in found["parameters"]) == found["parameter_count"]
    row = next(row for row in found["parameters"] if row["name"] == "blocks.attention.key.kernel")
    assert row == {
        "name": "blocks.attention.key.kernel",
        "axes": ["layers", "embed", "kv_heads", "head_dim"],
        "shape": [3, 20, 2, 6],
        "dtype": "float32",
        "parameters": 720,
        "weight_decay": True,
    }


def test_stacked_blocks_are_one_tensor_and_unrolled_ones_are_many(tiny, write_checkpoint, parity):
    counts = {}
    for name, options in {"stacked": {}, "unrolled": {"unrolled": True}}.items():
        folder = write_checkpoint("jax", tiny, name=name, **options)
        counts[name] = json.loads(parity("inspect", folder, "--json").out)["tensors"]
    assert counts == {"stacked": 4 + 16, "unrolled": 4 + 3 * 16}


def test_a_tokenizer_is_noticed(tiny, write_checkpoint, parity):
    folder = write_checkpoint("torch", tiny, tokenizer=gpt2_tokenizer())
    assert json.loads(parity("inspect", folder, "--json").out)["tokenizer"] == "gpt2"


def test_weights_are_not_read(tiny, write_checkpoint, parity, monkeypatch):
    folder = write_checkpoint("torch", tiny)
    monkeypatch.setattr("gpt_core.storage.safetensors_file.SafetensorsReader.read", pytest.fail)
    assert parity("inspect", folder).code == 0


def test_people_see_names_axes_and_totals(tiny, write_checkpoint, parity, draw_weights):
    folder = write_checkpoint("torch", tiny, draw_weights(tiny, "bfloat16"))
    out = parity("inspect", folder).out
    for word in (
        "torch checkpoint",
        "learned-gqa-window",
        "bfloat16",
        "blocks.mlp.down.kernel",
        "mlp embed",
        "28 x 20",
    ):
        assert word in out


@pytest.fixture(params=["jax", "torch"])
def hashed(request, tiny, write_checkpoint):
    folder = write_checkpoint(request.param, tiny)
    (folder / "record").mkdir()
    write_hashes(folder)
    return folder


def test_intact_files_are_counted_and_the_inspection_follows(hashed, parity):
    files = sum(path.is_file() for path in hashed.rglob("*")) - 1  # all but the record
    called = parity("inspect", hashed, "--verify", "--json")
    found = json.loads(called.out)
    assert called.code == 0
    assert (found.pop("verified_files"), found.pop("damaged_files")) == (files, {})
    assert found == json.loads(parity("inspect", hashed, "--json").out)
    called = parity("inspect", hashed, "--verify")
    assert called.code == 0
    assert called.out.endswith(f"all {files} files are as they were written\n")
    assert "blocks.mlp.down.kernel" in called.out


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b""), r"has 0 bytes where [\d,]+ were written"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), "has other bytes than were written"),
    ],
    ids=["missing", "empty", "flipped"],
)
def test_damaged_files_are_named_one_a_line_also_where_nothing_could_be_opened(hashed, damage, reason, parity):
    names = [str(path.relative_to(hashed)) for path in hashed.rglob("*") if path.is_file() and path.parent != hashed]
    names = [name for name in names if "/d/" in name or "METADATA" in name] or ["model.safetensors"]
    for name in names:
        damage(hashed / name)
    called = parity("inspect", hashed, "--verify")
    assert (called.code, called.err) == (1, "")
    lines = dict(line.split(" ", 1) for line in called.out.splitlines())
    assert lines.keys() == set(names)
    assert all(re.fullmatch(reason, said) for said in lines.values())
    called = parity("inspect", hashed, "--verify", "--json")
    assert called.code == 1
    assert json.loads(called.out)["damaged_files"] == lines


def test_where_no_hashes_are_there_is_nothing_to_verify_and_all_to_see(tiny, write_checkpoint, parity):
    folder = write_checkpoint("torch", tiny)
    called = parity("inspect", folder, "--verify")
    assert (called.code, called.out) == (2, "")
    assert "holds no hashes of its files" in called.err
    assert called.err.count("\n") == 1
    assert parity("inspect", folder).code == 0


def test_a_damaged_checkpoint_ends_in_one_line(tiny, write_checkpoint, parity):
    folder = write_checkpoint("torch", tiny)
    (folder / "model.safetensors").write_bytes(b"")
    called = parity("inspect", folder)
    assert called.code == 2
    assert called.out == ""
    assert called.err.startswith("error: ")
    assert called.err.count("\n") == 1
