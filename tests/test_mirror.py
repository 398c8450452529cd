"""The twins stay twins: `jax_gpt/X.py` and `torch_gpt/X.py` define the same public names in the same order."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAIRS = sorted(
    path.relative_to(ROOT / "jax_gpt").as_posix()
    for path in (ROOT / "jax_gpt").rglob("*.py")
    if (ROOT / "torch_gpt" / path.relative_to(ROOT / "jax_gpt")).exists()
)
CALL = {"__call__": "forward"}  # what Flax calls the one, PyTorch calls the other


def public_names(source: str) -> list[str]:
    """Classes, their methods as "Class.method", and functions, in order; Flax's `__call__` as PyTorch's `forward`."""
    names: list[str] = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            methods = [child.name for child in node.body if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)]
            names += [node.name, *(f"{node.name}.{CALL.get(method, method)}" for method in methods)]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names.append(node.name)
    return [name for name in names if not any(part.startswith("_") and part != "__init__" for part in name.split("."))]


@pytest.mark.parametrize("file", PAIRS)
def test_twins_define_the_same_public_names_in_the_same_order(file: str) -> None:
    jax, torch = (public_names((ROOT / package / file).read_text("utf-8")) for package in ("jax_gpt", "torch_gpt"))
    assert jax == torch


def test_the_pairs_that_readers_count_on_are_there() -> None:
    assert {"__init__.py", "model.py", "layers.py", "rotary.py", "attention.py", "decode.py", "cli.py"} <= set(PAIRS)


@pytest.mark.parametrize(
    "source",
    ["def b(): ...\ndef a(): ...", "def a(): ...", "class A: ...\ndef b(): ...", "def a(): ...\nasync def c(): ..."],
)
def test_another_order_a_missing_name_and_another_kind_are_seen(source: str) -> None:
    twin = "def a(): ...\ndef _private(): ...\ndef b(): ...\nclass A:\n    def __call__(self): ..."
    assert public_names(twin) == ["a", "b", "A", "A.forward"]
    assert public_names(source) != public_names(twin)
