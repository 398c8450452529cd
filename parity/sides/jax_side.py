"""Running a model in JAX, on NumPy arrays in and out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.precision import DType, Precision
from jax_gpt.attention import Implementation
from jax_gpt.model import GPT, Taps, initialiser
from parity.formats.orbax_jax import spoke
from parity.weights import Array, Source, Weights, decode


def build(
    config: ModelConfig,
    source: Source,
    dtype: DType,
    *,
    implementation: Implementation = "reference",
    scan_layers: bool = True,
) -> GPT:
    """A model with its weights from `source`, computing in `dtype`."""
    precision = Precision.of(dtype)
    _require_x64(precision)

    def create(parameter: Any) -> jax.Array:
        # A copy, always: jnp.asarray may share memory with NumPy, and an in-place PyTorch update would reach it.
        return jnp.array(np.asarray(source(parameter)), dtype=precision.param_dtype, copy=True)

    return GPT(config, create, precision=precision, implementation=implementation, scan_layers=scan_layers)


def fresh(config: ModelConfig, seed: int, dtype: DType, *, scan_layers: bool = True) -> GPT:
    """A model with this framework's own initialisation."""
    precision = Precision.of(dtype)
    _require_x64(precision)
    return GPT(config, initialiser(seed, precision), precision=precision, scan_layers=scan_layers)


def _require_x64(precision: Precision) -> None:
    if precision.wide_dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise InputError("float64 in JAX needs jax_enable_x64 from the start: run it in a worker of its own")


def weights_of(model: GPT) -> Weights:
    """Canonical weights of a model, as copies."""
    state = {
        ".".join(map(str, path)): np.array(variable[...])
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    return decode(state, model.config, spoke(model.config, scan_layers=model.scan_layers), "the JAX model")


class Program:
    """One compiled program for a model's structure; weights may change between calls.

    Raises:
        AssertionError: fp64 stands in the program of an fp32 or bf16 model.
    """

    def __init__(self, model: GPT, tokens: Array) -> None:
        graph, state = nnx.split(model)
        ids = jnp.asarray(tokens, jnp.int32)

        def run(state: nnx.State, ids: jax.Array) -> tuple[jax.Array, Taps]:
            taps: Taps = {}
            return nnx.merge(graph, state)(ids, taps=taps), taps

        traced = jax.jit(run).trace(state, ids)
        if model.precision.wide_dtype != "float64":
            assert "f64[" not in str(traced.jaxpr), "float64 leaked into a float32 program"
        self._compiled = traced.lower().compile()
        self._ids = ids

    def __call__(self, model: GPT) -> tuple[Array, dict[str, Array]]:
        """Logits `[batch, time, vocab]` and every named site, as NumPy arrays."""
        logits, taps = self._compiled(nnx.state(model), self._ids)
        return np.asarray(logits), {site: np.asarray(value) for site, value in taps.items()}


def forward(model: GPT, tokens: Array) -> tuple[Array, dict[str, Array]]:
    """Logits `[batch, time, vocab]` and every named site, as NumPy arrays."""
    return Program(model, tokens)(model)


def prepare(dtype: DType) -> None:
    """Set what is global in JAX for a process that runs in this dtype."""
    jax.config.update("jax_enable_x64", dtype == "float64")
    jax.config.update("jax_default_matmul_precision", "highest")


def describe() -> dict[str, str]:
    """Versions, device and precision settings, for reports."""
    import flax

    device = jax.devices()[0]
    return {
        "jax": jax.__version__,
        "flax": flax.__version__,
        "jax_device": f"{device.platform}: {device.device_kind}",
        "jax_matmul_precision": str(jax.config.values["jax_default_matmul_precision"]),
    }
