"""`parity check --jax-attention --torch-attention`: the fast implementations in every check, against the definition."""

import importlib
import json

import pytest

from parity.grid.cases import checks
from parity.grid.subject import Attention, Subject
from parity.grid.variants import select
from parity.sides import FRAMEWORKS, side_of


@pytest.fixture
def alone(in_this_process, monkeypatch):
    """Without the section of faults, which is planted in the definition."""
    monkeypatch.setattr("parity.grid.planting.FAULTS", ())


def check(parity, jax, torch, *more):
    return parity(
        *("check", "--jax-attention", jax, "--torch-attention", torch, "--variant", "rope-gqa-window", *more),
        *(() if "--dtype" in more else ("--dtype", "float64")),
    )


def wider(implementation):
    def mix(query, key, value, window, *more):
        return implementation(query, key, value, window + 1, *more)

    return mix


def test_fast_implementations_pass_every_check_at_the_bounds_of_fp64(alone, parity, tmp_path):
    called = check(parity, "banded", "sdpa", "--out", tmp_path / "out")
    assert called.code == 0, called.err
    assert "JAX (banded attention) against PyTorch (sdpa): relative errors in float64" in called.out
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert {case["check"] for case in report["cases"]} >= {"logits", "gradients", "optimizer", "decode"}
    assert all(case["tolerance"] <= 1e-12 for case in report["cases"] if case["check"] in ("logits", "decode"))
    environment = report["environment"]
    assert (environment["jax_attention"], environment["torch_attention"]) == ("banded", "sdpa")


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_implementation_that_is_named_is_the_one_that_runs(framework, global_settings_restored, monkeypatch):
    """Broken, it makes the check fail at its site."""
    for name in FRAMEWORKS:
        side_of(name).prepare("float64")
    known = importlib.import_module(f"{framework}_gpt.attention")._IMPLEMENTATIONS
    monkeypatch.setitem(known, "banded", wider(known["banded"]))
    subject = Subject(select(["rope-gqa-window"])[0], "float64", Attention(**{framework: "banded"}))
    result = next(result for result in checks(subject) if result.check == "activations")
    assert not result.passed
    assert "first differs at blocks.0.attention.mixed" in result.reason


@pytest.mark.parametrize(
    ("jax", "torch", "dtypes", "message"),
    [
        (
            *("xla", "reference", ["float64", "float32"]),
            "--jax-attention xla, float64: attention implementation 'xla' has an fp32 softmax and cannot run in "
            "float64: use 'reference' or 'banded'",
        ),
        ("splash", "reference", ["float64"], "'splash' has an fp32 softmax and cannot run in float64"),
        ("cudnn", "reference", ["bfloat16"], "attention implementation 'cudnn' runs in bfloat16 on a GPU"),
        ("reference", "flex", ["float32"], "--torch-attention flex, float32: attention implementation 'flex' runs in"),
    ],
)
def test_what_cannot_run_here_is_refused_before_anything_runs(jax, torch, dtypes, message, alone, parity, monkeypatch):
    monkeypatch.setattr("jax_gpt.attention.current_platform", lambda: "cpu")
    monkeypatch.setattr("parity.grid.worker.Subject", None)
    called = check(parity, jax, torch, "--dtype", *dtypes)
    assert called.code == 2
    assert message in called.err
    assert called.out == ""
