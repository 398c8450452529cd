"""Settings of all tests: environment before any framework is imported, shape checks, no network."""

import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import yaml

from parity.workers import framework_environment

# One thread for each pytest worker: tests run side by side. Set before anybody imports JAX or PyTorch.
# Programs are compiled more often than run here: optimising them costs more time than it saves.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ |= framework_environment("float32", os.cpu_count() or 1, quick_compile=True)

# What one test, process or worker compiled, the next one loads.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Every function of the twins is checked against the shapes and types that it declares.
jaxtyping.install_import_hook(["jax_gpt", "torch_gpt"], "beartype.beartype")

# For `numpy_gpt`, which tests share. At the end: a folder such as tests/jax_gpt must never hide a package.
sys.path.append(str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--budgets", choices=["test", "test-all"], help="print what each folder took, and might take")


def pytest_configure(config: pytest.Config) -> None:
    chosen = config.getoption("--budgets")
    if chosen is not None and not hasattr(config, "workerinput"):  # workers of xdist report to one process
        from budgets import Budgets

        config.pluginmanager.register(Budgets(whole=chosen == "test-all"))


@pytest.fixture
def x64() -> Iterator[None]:
    """fp64 in JAX for the length of one test; the setting is global in a process and must not leak."""
    import jax

    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Connections to anything but this machine fail."""
    local = {"localhost", "127.0.0.1", "::1", socket.gethostname(), "", None}
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: object) -> None:
        if self.family in {socket.AF_INET, socket.AF_INET6} and address[0] not in local:
            raise AssertionError(f"a test connects to {address}")
        connect(self, address)

    def guarded_look_up(host: object, *arguments: object, **options: object) -> object:
        if host not in local:
            raise AssertionError(f"a test looks up {host}")
        return look_up(host, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket, "getaddrinfo", guarded_look_up)
        yield


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config file of a run of seconds: a narrow model of few tokens, twelve steps, a text with a pattern."""
    from chat_templates import write_tokenizer

    folder = tmp_path_factory.mktemp("run")
    text = "the a window of keys and one query sees its own past but never what comes after it in time"
    words = text.split()
    random = np.random.default_rng(0)
    for number in range(24):
        text = " ".join(words[int(place)] for place in random.integers(0, len(words), 400))
        (folder / f"{number}.txt").write_text(text)
    content = {
        "model": {
            "vocab_size": 400,
            "pad_vocab_size_multiple": 64,
            "context_length": 16,
            "n_layers": 2,
            "n_heads": 4,
            "n_kv_heads": 2,
            "embed_dim": 16,
            "position": "rope",
        },
        "data": {"source": str(folder / "*.txt"), "streams": 4, "validation_fraction": 0.2}
        | {"tokenizer": str(write_tokenizer(folder / "tokenizer", None))},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
        "train": {
            "steps": 12,
            "batch_size": 8,
            "log_every": 1,
            "evaluate_every": 6,
            "evaluation_batches": 2,
            "checkpoint_every": 4,
            "keep_last": 3,
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
