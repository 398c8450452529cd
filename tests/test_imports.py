"""Each package imports without the frameworks that it must not need, in an interpreter where these are blocked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
JAX = ("jax", "jaxlib", "flax", "optax", "orbax", "grain")
TORCH = ("torch", "accelerate", "transformers")

# Runs in an interpreter of its own. A blocked package looks as if it were not installed.
PROGRAM = """
import importlib, json, sys
from importlib.abc import MetaPathFinder

blocked, modules = json.loads(sys.argv[1])

class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by a test)", name=name)

sys.meta_path.insert(0, Blocker())
failed = {}
for module in modules:
    try:
        importlib.import_module(module)
    except Exception as error:
        failed[module] = repr(error)
print(json.dumps({"failed": failed, "roots": sorted({name.partition(".")[0] for name in sys.modules})}))
"""


def import_without(blocked: tuple[str, ...], modules: list[str]) -> tuple[dict[str, str], set[str]]:
    """Import modules with some packages blocked.

    Returns:
        What failed by module, and the top-level packages that were loaded in the end.
    """
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([blocked, modules])],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    result = json.loads(finished.stdout)
    return result["failed"], set(result["roots"])


def modules_of(folder: str) -> list[str]:
    """A package and all of its submodules, found on disk without importing any."""
    files = [path.relative_to(ROOT).with_suffix("").parts for path in (ROOT / folder).rglob("*.py")]
    return sorted(".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in files)


@pytest.mark.parametrize(
    ("package", "blocked"),
    [
        ("jax_gpt", (*TORCH, "torch_gpt", "parity")),
        ("torch_gpt", (*JAX, "jax_gpt", "parity")),
        ("gpt_core", (*JAX, *TORCH, "jax_gpt", "torch_gpt", "parity")),
    ],
)
def test_every_module_imports_without_the_other_framework(package: str, blocked: tuple[str, ...]) -> None:
    modules = modules_of(package)
    assert f"{package}.cli" in modules
    failed, roots = import_without(blocked, modules)
    assert failed == {}
    assert not roots & set(blocked)


PARITY = ["parity", "parity.cli", "parity.checkpoints.convert", "parity.comparison.measures"]


@pytest.mark.parametrize("blocked", [(), (*JAX, *TORCH)], ids=["both there", "neither there"])
def test_parity_imports_with_either_framework_or_neither(blocked: tuple[str, ...]) -> None:
    """It asks for a framework when it runs a model and not before, so that it starts fast and works with one.

    Where both are there and nothing of either is imported, either one may be missing.
    """
    failed, roots = import_without(blocked, PARITY)
    assert failed == {}
    assert not roots & {*JAX, *TORCH}


def test_a_console_command_starts_without_its_framework() -> None:
    """`--help` and wrong flags answer at once; the framework is imported by the command that needs it."""
    failed, roots = import_without((), ["jax_gpt.cli", "torch_gpt.cli", "parity.cli"])
    assert failed == {}
    assert not roots & {"jax", "torch"}


@pytest.mark.parametrize(("module", "blocked"), [("torch_gpt.model", "torch"), ("jax_gpt.model", "jax")])
def test_a_blocked_framework_cannot_be_imported(module: str, blocked: str) -> None:
    """The tests above could not fail if blocking did nothing."""
    failed, _ = import_without((blocked,), [module])
    assert blocked in failed[module]
