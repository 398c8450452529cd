"""`parity inspect` shows what is there, without reading the weights."""

import json

import pytest

from gpt_core.config import ModelConfig
from gpt_core.tokenizer import gpt2_tokenizer


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
    monkeypatch.setattr("gpt_core.safetensors_file.SafetensorsReader.read", pytest.fail)
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


def test_a_damaged_checkpoint_ends_in_one_line(tiny, write_checkpoint, parity):
    folder = write_checkpoint("torch", tiny)
    (folder / "model.safetensors").write_bytes(b"")
    called = parity("inspect", folder)
    assert called.code == 2
    assert called.out == ""
    assert called.err.startswith("error: ")
    assert called.err.count("\n") == 1
