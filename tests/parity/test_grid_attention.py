"""`parity check --jax-attention --torch-attention`: the fast implementations in every check, against the definition."""

import functools
import importlib
import json

import pytest


@pytest.fixture
def alone(monkeypatch):
    """Jobs run in this process, without the section of faults, which is planted in the definition."""

    def run(jobs, on_event):
        for index, job in enumerate(jobs):
            module, function = job.target.split(":")
            getattr(importlib.import_module(module), function)(functools.partial(on_event, index), **job.arguments)

    monkeypatch.setattr("parity.check.run_side_by_side", run)
    monkeypatch.setattr("parity.fault_runs.FAULTS", ())


def check(parity, jax, torch, *more):
    return parity(
        *("check", "--jax-attention", jax, "--torch-attention", torch, "--variant", "rope-gqa-window", *more),
        *(() if "--dtype" in more else ("--dtype", "float64")),
    )


def wider(implementation):
    def mix(query, key, value, window, scale):
        return implementation(query, key, value, window + 1, scale)

    return mix


def test_fast_implementations_pass_every_check_at_the_bounds_of_fp64(alone, parity):
    called = check(parity, "banded", "sdpa", "--json")
    report = json.loads(called.out)
    assert called.code == 0, called.err
    assert {case["check"] for case in report["cases"]} >= {"logits", "gradients", "optimizer", "decode"}
    assert all(case["tolerance"] <= 1e-12 for case in report["cases"] if case["check"] in ("logits", "decode"))
    environment = report["environment"]
    assert (environment["jax_attention"], environment["torch_attention"]) == ("banded", "sdpa")


@pytest.mark.parametrize(("framework", "name"), [("jax", "banded"), ("torch", "banded")])
def test_the_implementation_that_is_named_is_the_one_that_runs(framework, name, alone, parity, monkeypatch):
    """Broken, it makes the check fail."""
    known = importlib.import_module(f"{framework}_gpt.attention")._IMPLEMENTATIONS
    monkeypatch.setitem(known, name, wider(known[name]))
    sides = {"jax": "reference", "torch": "reference"} | {framework: name}
    called = check(parity, sides["jax"], sides["torch"])
    assert called.code == 1
    title = f"JAX ({sides['jax']} attention) against PyTorch ({sides['torch']}): relative errors in float64"
    assert title in called.out
    assert "first differs at blocks.0.attention.mixed" in called.out


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
    monkeypatch.setattr("parity.grid.Subject", None)
    called = check(parity, jax, torch, "--dtype", *dtypes)
    assert called.code == 2
    assert message in called.err
    assert called.out == ""
