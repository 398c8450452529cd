"""`parity check A B`: two checkpoints, each run in the framework of its format."""

import json
from dataclasses import replace

import numpy as np
import numpy_gpt
import pytest

from gpt_core.text.gpt2 import gpt2_tokenizer


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "tokens.npy"
    np.save(path, np.random.default_rng(3).integers(0, 29, (2, 23)))
    return path


def test_one_model_in_two_formats_is_equal(tiny, write_checkpoint, tokens, in_this_process, parity, tmp_path):
    weights = {name: array.astype(np.float32) for name, array in numpy_gpt.random_weights(tiny).items()}
    a = write_checkpoint("jax", tiny, weights, name="in-jax")
    b = write_checkpoint("torch", tiny, weights, name="in-torch")
    called = parity("check", a, b, "--tokens", tokens, "--out", tmp_path / "out", "--json")
    report = json.loads(called.out)
    assert called.code == 0
    assert report["passed"]
    assert {(case["check"], case["dtype"]) for case in report["cases"]} >= {
        ("weights", "float32"),
        ("logits", "float64"),
        ("logits", "float32"),
        ("logits", "bfloat16"),
    }
    assert all(case["variant"] == "in-jax against in-torch" for case in report["cases"])
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8")) == report


def test_one_changed_weight_is_exit_code_1_and_named(tiny, write_checkpoint, tokens, parity):
    """In real workers, one a framework."""
    weights = {name: array.astype(np.float32) for name, array in numpy_gpt.random_weights(tiny).items()}
    changed = {name: array.copy() for name, array in weights.items()}
    changed["blocks.mlp.up.kernel"][1, 4, 5] += 1e-3
    a = write_checkpoint("jax", tiny, weights, name="a")
    b = write_checkpoint("torch", tiny, changed, name="b")
    called = parity("check", a, b, "--tokens", tokens, "--dtype", "float64", "--json")
    cases = {case["check"]: case for case in json.loads(called.out)["cases"]}
    assert called.code == 1
    assert not cases["weights"]["passed"]
    assert "blocks.mlp.up.kernel differs at (1, 4, 5)" in cases["weights"]["reason"]
    ids = np.load(tokens)
    expected = numpy_gpt.forward(tiny, {name: array.astype(np.float64) for name, array in weights.items()}, ids)
    reference = numpy_gpt.forward(tiny, {name: array.astype(np.float64) for name, array in changed.items()}, ids)
    error = numpy_gpt.relative_error(expected["logits"], reference["logits"])
    assert not cases["logits"]["passed"]
    assert cases["logits"]["relative_error"] == pytest.approx(error, rel=1e-6)


def test_text_runs_through_the_checkpoints_own_tokenizer(tiny, write_checkpoint, in_this_process, parity, tmp_path):
    config = replace(tiny, vocab_size=50257, n_layers=1)
    a = write_checkpoint("torch", config, name="a", tokenizer=gpt2_tokenizer())
    b = write_checkpoint("torch", config, name="b")
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog " * 4, encoding="utf-8")
    called = parity("check", a, b, "--text", tmp_path / "text", "--dtype", "float64")
    assert called.code == 0
    assert "equal" in called.out
    called = parity("check", b, a, "--text", tmp_path / "text")
    assert called.code == 2
    assert "give --tokens FILE.npy" in called.err


def test_two_vocabularies_cannot_be_compared(tiny, write_checkpoint, tokens, parity):
    a = write_checkpoint("torch", tiny, name="a")
    b = write_checkpoint("torch", replace(tiny, vocab_size=30), name="b")
    called = parity("check", a, b, "--tokens", tokens)
    assert called.code == 2
    assert "vocabularies of 29 and 30 tokens; their logits cannot be compared" in called.err


def test_tokens_must_fit_both(tiny, write_checkpoint, tokens, parity):
    a = write_checkpoint("torch", tiny, name="a")
    b = write_checkpoint("torch", replace(tiny, context_length=22), name="b")
    called = parity("check", a, b, "--tokens", tokens)
    assert called.code == 2
    assert "rows of 23 tokens are longer than context_length = 22" in called.err
