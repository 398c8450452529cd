"""Small checkpoints and a way to call the command line, shared by the tests of `parity`."""

import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

from gpt_core.config import ModelConfig
from gpt_core.formats import format_of
from gpt_core.parameters import parameter_table
from gpt_core.storage.weights import weights_source
from gpt_core.text.tokenizer import Tokenizer
from parity.cli import main
from parity.workers import Job

Weights = dict[str, np.ndarray[Any, Any]]

DTYPES = {"float64": np.float64, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def random_weights(config: ModelConfig, dtype: str = "float32") -> Weights:
    """Canonical weights in which every number is drawn, so that no two axes can be swapped unseen."""
    random = np.random.default_rng(7)
    table = parameter_table(config)
    return {name: random.normal(size=row.shape).astype(DTYPES[dtype]) for name, row in table.items()}


@pytest.fixture
def tiny() -> ModelConfig:
    """Every axis has a size of its own, blocks and heads come in groups, and the vocabulary is padded."""
    return ModelConfig(
        vocab_size=29,
        pad_vocab_size_multiple=16,
        context_length=40,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        embed_dim=20,
        head_dim=6,
        mlp_dim=28,
        sliding_window=7,
    )


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """`write_checkpoint("torch", config, weights)` writes a checkpoint and returns its folder."""

    def write(
        format: str,
        config: ModelConfig,
        weights: Mapping[str, np.ndarray[Any, Any]] | None = None,
        *,
        name: str = "checkpoint",
        tokenizer: Tokenizer | None = None,
        **options: Any,
    ) -> Path:
        weights = random_weights(config) if weights is None else weights
        dtypes = {key: array.dtype for key, array in weights.items()}
        folder = tmp_path / name
        folder.mkdir()
        format_of(format).write(folder, config, weights_source(weights), dtypes, tokenizer, **options)
        return folder

    return write


@pytest.fixture
def draw_weights() -> Callable[..., Weights]:
    return random_weights


@dataclass(frozen=True)
class Called:
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def parity(capsys: pytest.CaptureFixture[str]) -> Callable[..., Called]:
    """`parity("inspect", folder)` calls the command in this process."""

    def call(*arguments: object) -> Called:
        capsys.readouterr()
        with untouched_process():
            try:
                code = main([str(argument) for argument in arguments])
            except SystemExit as stopped:  # how argparse leaves
                code = int(stopped.code or 0)
        captured = capsys.readouterr()
        return Called(code, captured.out, captured.err)

    return call


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of a command run one after the other in this process, which has both frameworks already."""

    def run(jobs: Sequence[Job], on_event: Callable[[int, Any], None], *, at_once: int | None = None) -> None:
        for index, job in enumerate(jobs):
            module, function = job.target.split(":")
            getattr(importlib.import_module(module), function)(functools.partial(on_event, index), **job.arguments)

    for module in ("check", "verify"):
        monkeypatch.setattr(f"parity.{module}.run_side_by_side", run)


@pytest.fixture
def parity_without() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`parity_without(["jax"], "inspect", folder)` calls the command in a process that cannot import JAX."""

    def call(blocked: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
        program = (
            "import sys\n"
            "class Blocker:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            f"        if name.partition('.')[0] in {blocked!r}:\n"
            "            raise ModuleNotFoundError(f'{name} is blocked', name=name)\n"
            "sys.meta_path.insert(0, Blocker())\n"
            "from parity.cli import main\n"
            "sys.exit(main(sys.argv[1:]))"
        )
        command = [sys.executable, "-c", program, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return call


@contextmanager
def untouched_process() -> Iterator[None]:
    """Commands may set what is global in a process; the next test shall not see it."""
    import jax
    import torch

    names = ("jax_enable_x64", "jax_default_matmul_precision")
    before = {name: jax.config.values[name] for name in names}
    precision = torch.get_float32_matmul_precision()
    try:
        with mock.patch.dict(os.environ):
            yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        torch.set_float32_matmul_precision(precision)


@pytest.fixture
def global_settings_restored() -> Iterator[None]:
    with untouched_process():
        yield
