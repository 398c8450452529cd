"""Running a model in JAX, on NumPy arrays in and out."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.formats.orbax_jax import spoke
from gpt_core.optimization import AdamWConfig
from gpt_core.precision import DType, Precision
from jax_gpt.attention import Implementation
from jax_gpt.loss import token_loss
from jax_gpt.model import GPT, Taps, initialiser
from jax_gpt.optimizer import create_optimizer, update
from parity.sides.runs import Batch, Batches, Run, Training
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
    return canonical(nnx.state(model, nnx.Param), model, np.array)


class Program:
    """One compiled program for a model's structure, loss, gradients and trace in one; weights may change between calls.

    Args:
        model: The structure to compile.
        tokens: `[batch, time]`.
        batch: Targets and mask; None compiles the forward pass without a loss.
        gradients: Whether to differentiate the loss.
        trace: Whether to keep every named intermediate.

    Raises:
        AssertionError: fp64 stands in the program of an fp32 or bf16 model.
    """

    def __init__(
        self, model: GPT, tokens: Array, batch: Batch | None = None, *, gradients: bool = True, trace: bool = True
    ) -> None:
        graph, state = nnx.split(model)
        self._inputs = _inputs(tokens, batch)

        def forward(state: nnx.State, ids: jax.Array) -> tuple[jax.Array, Taps]:
            taps: Taps | None = {} if trace else None
            return nnx.merge(graph, state)(ids, taps=taps), taps or {}

        def loss(state: nnx.State, ids: jax.Array, targets: jax.Array, mask: jax.Array) -> Any:
            logits, taps = forward(state, ids)
            return token_loss(logits, targets, mask), (logits, taps)

        function: Any = forward
        if batch is not None:
            function = jax.value_and_grad(loss, has_aux=True) if gradients else loss
        traced = jax.jit(function).trace(state, *self._inputs)
        if model.precision.wide_dtype != "float64":
            assert "f64[" not in str(traced.jaxpr), "float64 leaked into a float32 program"
        self._compiled = traced.lower().compile()
        self._has_loss, self._has_gradients = batch is not None, batch is not None and gradients

    def __call__(self, model: GPT) -> Run:
        """Everything the program computes, as NumPy arrays."""
        outputs = self._compiled(nnx.state(model), *self._inputs)
        if not self._has_loss:
            logits, taps = outputs
            return Run(np.asarray(logits), _arrays(taps))
        if not self._has_gradients:
            loss, (logits, taps) = outputs
            return Run(np.asarray(logits), _arrays(taps), float(loss))
        (loss, (logits, taps)), gradients = outputs
        return Run(np.asarray(logits), _arrays(taps), float(loss), canonical(gradients, model, np.asarray))

    def train(self, model: GPT, batches: Batches, config: AdamWConfig, rates: Sequence[float]) -> Training:
        """AdamW steps, one for each batch and its rate; batches have the shape that was compiled for."""
        optimizer = create_optimizer(config, model.config)
        parameters = nnx.state(model, nnx.Param)
        state = optimizer.init(parameters)
        step = jax.jit(lambda p, g, s, rate: update(optimizer, config, p, g, s, rate))
        losses, norms = [], []
        for (tokens, batch), rate in zip(batches, rates, strict=True):
            (loss, _), gradients = self._compiled(parameters, *_inputs(tokens, batch))
            parameters, state, norm = step(parameters, gradients, state, rate)
            losses.append(loss)
            norms.append(norm)
        adam = state[0]
        return Training(
            losses=[float(loss) for loss in losses],
            norms=[float(norm) for norm in norms],
            weights=canonical(parameters, model, np.array),
            mu=canonical(adam.mu, model, np.asarray),
            nu=canonical(adam.nu, model, np.asarray),
        )


def _inputs(tokens: Array, batch: Batch | None) -> list[jax.Array]:
    ids = [jnp.asarray(tokens, jnp.int32)]
    return ids if batch is None else [*ids, jnp.asarray(batch.targets, jnp.int32), jnp.asarray(batch.mask)]


def _arrays(taps: Taps) -> dict[str, Array]:
    return {site: np.asarray(value) for site, value in taps.items()}


def canonical(state: nnx.State, model: GPT, convert: Callable[[jax.Array], Array]) -> Weights:
    """Canonical arrays of anything that has the shape of a model's parameters."""
    arrays = {".".join(map(str, path)): convert(variable[...]) for path, variable in nnx.to_flat_state(state)}
    return decode(arrays, model.config, spoke(model.config, scan_layers=model.scan_layers), "the JAX model")


def run(model: GPT, tokens: Array, batch: Batch | None = None, *, gradients: bool = True, trace: bool = True) -> Run:
    """Run a model once; loss and gradients where a batch says what to predict, sites with `trace`."""
    return Program(model, tokens, batch, gradients=gradients, trace=trace)(model)


def logits_function(model: GPT) -> Callable[[Array], Array]:
    """Token ids `[batch, time]` to logits `[batch, time, vocab]`, compiled once for each shape."""
    graph, state = nnx.split(model)
    compiled = jax.jit(lambda state, ids: nnx.merge(graph, state)(ids))
    return lambda tokens: np.asarray(compiled(state, jnp.asarray(tokens, jnp.int32)))


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
