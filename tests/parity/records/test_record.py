"""`parity record`: what a checkpoint computes, in a file that NumPy alone can read."""

import json
from dataclasses import replace

import numpy as np
import numpy_gpt
import pytest

FRAMEWORKS = pytest.mark.parametrize("framework", ["jax", "torch"])


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "tokens.npy"
    np.save(path, np.random.default_rng(3).integers(0, 29, (2, 17)))
    return path


@pytest.fixture
def recorded(tiny, write_checkpoint, tokens, tmp_path, parity):
    """`recorded(framework, *flags)` runs the command on a checkpoint and returns its arrays by name."""
    weights = numpy_gpt.random_weights(tiny)
    folder = write_checkpoint("torch", tiny, weights)

    def run(framework, *flags):
        out = tmp_path / f"{framework}.npz"
        called = parity("record", folder, out, "--framework", framework, "--tokens", tokens, *flags)
        assert (called.code, called.err) == (0, "")
        with np.load(out, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}

    return run


@FRAMEWORKS
def test_it_holds_tokens_and_logits_of_the_unpadded_vocabulary(tiny, framework, recorded, tokens):
    record = recorded(framework, "--dtype", "float64")
    ids = np.load(tokens)
    np.testing.assert_array_equal(record["tokens"], ids)
    expected = numpy_gpt.forward(tiny, numpy_gpt.random_weights(tiny), ids)["logits"]
    assert record["logits"].shape == expected.shape == (2, 17, 29)
    assert record["logits"].dtype == np.float64
    assert numpy_gpt.relative_error(record["logits"], expected) < 1e-12


@FRAMEWORKS
def test_a_trace_adds_every_named_intermediate(tiny, framework, recorded, tokens):
    record = recorded(framework, "--dtype", "float64", "--trace")
    expected = numpy_gpt.forward(tiny, numpy_gpt.random_weights(tiny), np.load(tokens))
    sites = {name.partition(":")[2]: array for name, array in record.items() if name.startswith("site:")}
    assert sites.keys() >= expected.keys() - {"logits"}
    for site, array in sites.items():
        assert numpy_gpt.relative_error(array, expected[site]) < 1e-12, site


@FRAMEWORKS
def test_without_trace_there_are_none(framework, recorded):
    assert not [name for name in recorded(framework) if name.startswith("site:")]


@FRAMEWORKS
def test_bfloat16_is_kept_as_float32_which_numpy_knows(framework, recorded):
    record = recorded(framework, "--dtype", "bfloat16", "--trace")
    assert {array.dtype.name for name, array in record.items() if name.startswith("site:")} == {"float32"}
    hidden = record["site:blocks.0.mlp.hidden"]
    assert not (hidden.view(np.uint32) & 0xFFFF).any()  # only bf16's bits are used


@pytest.mark.parametrize("format", ["jax", "torch"])
def test_any_format_runs_in_any_framework(tiny, format, write_checkpoint, draw_weights, tokens, tmp_path, parity):
    folder = write_checkpoint(format, replace(tiny, position="rope"), draw_weights(replace(tiny, position="rope")))
    logits = {}
    for framework in ("jax", "torch"):
        out = tmp_path / f"{framework}.npz"
        assert parity("record", folder, out, "--framework", framework, "--tokens", tokens).code == 0
        logits[framework] = np.load(out)["logits"]
    assert numpy_gpt.relative_error(logits["jax"], logits["torch"]) < 2e-5


def test_a_record_that_exists_is_kept_without_force(tiny, write_checkpoint, tokens, tmp_path, parity):
    folder, out = write_checkpoint("torch", tiny), tmp_path / "out.npz"
    arguments = ("record", folder, out, "--framework", "torch", "--tokens", tokens)
    assert parity(*arguments).code == 0
    before = out.read_bytes()
    called = parity(*arguments)
    assert called.code == 2
    assert "exists already" in called.err
    assert out.read_bytes() == before
    assert parity(*arguments, "--dtype", "bfloat16", "--force").code == 0
    assert out.read_bytes() != before
    assert np.load(out)["logits"].shape == (2, 17, 29)


def test_force_replaces_records_alone(tiny, write_checkpoint, tokens, tmp_path, parity):
    folder = write_checkpoint("torch", tiny)
    np.savez(tmp_path / "mine.npz", data=np.arange(3))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine", encoding="utf-8")
    for out in ("mine.npz", "notes"):
        called = parity("record", folder, tmp_path / out, "--framework", "torch", "--tokens", tokens, "--force")
        assert called.code == 2
        assert f"{out}: is no whole record, so --force does not replace it" in called.err
    assert np.load(tmp_path / "mine.npz")["data"].tolist() == [0, 1, 2]
    assert (tmp_path / "notes" / "thesis.txt").read_text(encoding="utf-8") == "mine"


def test_no_tokenizer_asks_for_tokens_and_writes_nothing(tiny, write_checkpoint, tmp_path, parity):
    folder = write_checkpoint("torch", tiny)
    called = parity("record", folder, tmp_path / "out.npz", "--framework", "torch")
    assert called.code == 2
    assert "give --tokens FILE.npy" in called.err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_an_interrupted_record_leaves_nothing(tiny, write_checkpoint, tokens, tmp_path, parity, monkeypatch):
    from numpy.lib import format as npy

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(npy, "write_array", interrupt)
    folder = write_checkpoint("torch", tiny)
    called = parity("record", folder, tmp_path / "out.npz", "--framework", "torch", "--tokens", tokens)
    assert called.code == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "tokens.npy"]


def test_json_says_what_was_written(tiny, write_checkpoint, tokens, tmp_path, parity):
    folder, out = write_checkpoint("torch", tiny), tmp_path / "out.npz"
    called = parity("record", folder, out, "--framework", "torch", "--tokens", tokens, "--json")
    found = json.loads(called.out)
    assert found["out"] == str(out)
    assert found["tokens"] == [2, 17]
    assert found["logits"] == [2, 17, 29]
