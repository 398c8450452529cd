"""Running a model in JAX, on NumPy arrays in and out."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from gpt_core.routing import expert_load, routing_metrics, summed_router_loss
from gpt_core.runs.config import RunConfig
from gpt_core.storage.tensor_info import Array
from gpt_core.storage.weights import Source, Weights, decode
from gpt_core.text.generation import DRAW_TOKEN, SamplingConfig, cache_slots, uniforms
from jax_gpt import decode as decoding
from jax_gpt import moe
from jax_gpt.attention import Implementation, attention
from jax_gpt.generate import choose, generate
from jax_gpt.loss import token_loss
from jax_gpt.model import GPT, initialiser
from jax_gpt.optimizer import create_optimizer, update
from jax_gpt.routing import routing_of, routing_taps
from jax_gpt.taps import Kept, Taps
from parity.sides.runs import Balance, Batch, Batches, CachedRun, RaggedText, Run, Trace, Training


def build(
    config: ModelConfig,
    source: Source,
    dtype: DType,
    *,
    implementation: Implementation = "reference",
    experts: moe.Implementation = "reference",
    scan_layers: bool = True,
) -> GPT:
    """A model with its weights from `source`, computing in `dtype`."""
    precision = Precision.of(dtype)
    _require_x64(precision)

    def create(parameter: Any) -> jax.Array:
        # A copy, always: jnp.asarray may share memory with NumPy, and an in-place PyTorch update would reach it.
        return jnp.array(np.asarray(source(parameter)), dtype=precision.param_dtype, copy=True)

    options: Any = {"implementation": implementation, "experts": experts, "scan_layers": scan_layers}
    return GPT(config, create, precision=precision, **options)


def fresh(
    config: ModelConfig,
    seed: int,
    dtype: DType,
    *,
    implementation: Implementation = "reference",
    experts: moe.Implementation = "reference",
    scan_layers: bool = True,
) -> GPT:
    """A model with this framework's own initialisation."""
    precision = Precision.of(dtype)
    _require_x64(precision)
    create = initialiser(seed, precision)
    options: Any = {"implementation": implementation, "experts": experts, "scan_layers": scan_layers}
    return GPT(config, create, precision=precision, **options)


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
        batch: Targets, mask and segments; None compiles the forward pass without a loss.
        gradients: Whether to differentiate the loss.
        trace: Which named intermediates to keep.

    Raises:
        AssertionError: fp64 stands in the program of an fp32 or bf16 model.
    """

    def __init__(
        self, model: GPT, tokens: Array, batch: Batch | None = None, *, gradients: bool = True, trace: Trace = True
    ) -> None:
        graph, state = nnx.split(model)
        self._inputs = _inputs(tokens, batch)

        def forward(state: nnx.State, ids: jax.Array, segments: jax.Array | None = None) -> tuple[jax.Array, Taps]:
            taps: Taps | None = Kept(*trace) if isinstance(trace, tuple) else {} if trace else None
            return nnx.merge(graph, state)(ids, taps=taps, segments=segments), dict(taps or {})

        def loss(
            state: nnx.State, ids: jax.Array, targets: jax.Array, mask: jax.Array, segments: jax.Array | None
        ) -> Any:
            logits, taps = forward(state, ids, segments)
            return token_loss(logits, targets, mask), (logits, taps)

        function: Any = forward
        if batch is not None:
            function = jax.value_and_grad(loss, has_aux=True) if gradients else loss
        self._compiled = _compiled(function, model.precision, state, *self._inputs)
        self._has_loss, self._has_gradients = batch is not None, batch is not None and gradients

    def __call__(self, model: GPT, tokens: Array | None = None, batch: Batch | None = None) -> Run:
        """Everything the program computes, as NumPy arrays: on what it was compiled for, or on others of its shapes."""
        inputs = self._inputs if tokens is None else _inputs(tokens, batch)
        outputs = self._compiled(nnx.state(model), *inputs)
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


def balance(model: GPT, tokens: Array, batch: Batch, config: RunConfig) -> Balance:
    """The losses of a mixture's routers over all rows of a step at once, and the gradient of the step's loss.

    Args:
        model: A mixture.
        tokens: `[batch, time]`.
        batch: What it predicts.
        config: Whose weights of these losses are taken.
    """
    graph, state = nnx.split(model)

    def total(state: nnx.State, ids: jax.Array, targets: jax.Array, mask: jax.Array, _: None) -> Any:
        taps = routing_taps(model.config)
        logits = nnx.merge(graph, state)(ids, taps=taps)
        routing, count = routing_of(taps, mask, model.config), mask.sum()
        assert routing is not None
        load = expert_load(routing.assigned.astype(logits.dtype), count, model.config.experts_per_token)
        of_routers = summed_router_loss(routing, load, config.train) / count
        return token_loss(logits, targets, mask) + of_routers, routing_metrics(routing, load, count)

    inputs = state, *_inputs(tokens, batch)
    differentiate = _compiled(jax.value_and_grad(total, has_aux=True), model.precision, *inputs)
    (_, metrics), gradients = differentiate(*inputs)
    of_leaves = canonical(gradients, model, np.asarray)
    return Balance(float(metrics["balance_loss"]), float(metrics["router_z_loss"]), of_leaves)


def _compiled(function: Any, precision: Precision, *inputs: Any) -> Any:
    """One program for inputs of these shapes.

    Raises:
        AssertionError: fp64 stands in the program of an fp32 or bf16 model.
    """
    traced = jax.jit(function).trace(*inputs)
    if precision.wide_dtype != "float64":
        assert "f64[" not in str(traced.jaxpr), "float64 leaked into a float32 program"
    return traced.lower().compile()


def _inputs(tokens: Array, batch: Batch | None) -> list[jax.Array | None]:
    ids = jnp.asarray(tokens, jnp.int32)
    if batch is None:
        return [ids]
    segments = None if batch.segments is None else jnp.asarray(batch.segments, jnp.int32)
    return [ids, jnp.asarray(batch.targets, jnp.int32), jnp.asarray(batch.mask), segments]


def _arrays(taps: Taps) -> dict[str, Array]:
    return {site: np.asarray(value) for site, value in taps.items()}


def canonical(state: nnx.State, model: GPT, convert: Callable[[jax.Array], Array]) -> Weights:
    """Canonical arrays of anything that has the shape of a model's parameters."""
    arrays = {".".join(map(str, path)): convert(variable[...]) for path, variable in nnx.to_flat_state(state)}
    return decode(arrays, model.config, spoke(model.config, scan_layers=model.scan_layers), "the JAX model")


def run(model: GPT, tokens: Array, batch: Batch | None = None, *, gradients: bool = True, trace: Trace = True) -> Run:
    """Run a model once; loss and gradients where a batch says what to predict, sites with `trace`."""
    return Program(model, tokens, batch, gradients=gradients, trace=trace)(model)


def logits_function(model: GPT) -> Callable[[Array], Array]:
    """Token ids `[batch, time]` to logits `[batch, time, vocab]`, compiled once for each shape."""
    graph, state = nnx.split(model)
    compiled = jax.jit(lambda state, ids: nnx.merge(graph, state)(ids))
    return lambda tokens: np.asarray(compiled(state, jnp.asarray(tokens, jnp.int32)))


def run_cached(model: GPT, text: RaggedText, samplings: Mapping[str, SamplingConfig]) -> CachedRun:
    """Prefill of prompts, then steps: on the text's own tokens, and again for each way to go on from the prompts.

    One program of what `jax_gpt.generate` consists of, which would itself compile two for each way.

    Args:
        model: The model.
        text: What to run on.
        samplings: Ways to go on, by name, for at most as many tokens as the text has steps.
    """
    config, precision, ways = model.config, model.precision, list(samplings.values())
    graph, state = nnx.split(model)
    limit = text.limit(samplings)
    slots, weights = cache_slots(config, limit, 1), decoding.prepare(model, limit)

    def program(
        state: nnx.State, weights: decoding.Weights, prompts: jax.Array, lengths: jax.Array, way: jax.Array, steps: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Logits `[1 + steps, batch, vocab]`, and the tokens `[steps, batch]` that were fed."""

        def step(carry: tuple[jax.Array, decoding.Cache], inputs: tuple[jax.Array, ...]) -> Any:
            (logits, cache), (token, position, noise) = carry, inputs
            written = [lambda options=options: choose(logits, noise, options) for options in ways]
            token = jax.lax.switch(way, [lambda: token, *written])
            after, cache = decoding.step(weights, config, precision, token[:, None], position, cache)
            return (after[:, 0], cache), (after[:, 0], token)

        first, cache = decoding.prefill(nnx.merge(graph, state), prompts, lengths, slots)
        _, (rest, tokens) = jax.lax.scan(step, (first, cache), steps)
        return jnp.concatenate([first[None], rest]), tokens

    prompts, lengths = (jnp.asarray(array, jnp.int32) for array in (text.padded, text.lengths))
    tokens, positions = (jnp.asarray(array[:, 1:].T, jnp.int32) for array in (text.fed, text.positions))
    noise = jnp.zeros(tokens.shape, jnp.float32)
    inputs = [state, weights, prompts, lengths, jnp.asarray(0), (tokens, positions, noise)]
    compiled = _compiled(program, precision, *inputs)
    logits = np.asarray(compiled(*inputs)[0]).swapaxes(0, 1)
    further = lengths + jnp.arange(len(tokens), dtype=jnp.int32)[:, None]
    written = {}
    for index, (name, options) in enumerate(samplings.items(), start=1):
        noise = jnp.asarray(uniforms(options.seed, len(lengths), 0, len(tokens))[..., DRAW_TOKEN])
        new = compiled(*inputs[:4], jnp.asarray(index), (tokens, further, noise))[1]
        written[name] = np.asarray(new).T[:, : options.max_new_tokens].tolist()
    return CachedRun(logits, written)


def write(model: GPT, prompt: Array, new: int) -> Array:
    """Tokens `[batch, new]` that greedy decoding through the cache appends to `prompt` `[batch, time]`."""
    return np.asarray(generate(model, prompt.tolist(), SamplingConfig(max_new_tokens=new)))


def require_attention(implementation: Implementation, config: ModelConfig, dtype: DType) -> None:
    """See that an implementation of attention can run a model here.

    Raises:
        InputError: it cannot; the message says why.
    """

    def heads(count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, 2, count, config.head_dim), jnp.dtype(Precision.of(dtype).compute_dtype))

    for kind in set(config.layer_kinds):
        mix = partial(
            attention,
            window=config.view(kind).window,
            scale=config.attention_scale,
            softcap=config.attention_softcap,
            implementation=implementation,
        )
        jax.eval_shape(mix, heads(config.n_heads), heads(config.n_kv_heads), heads(config.n_kv_heads))


def multiply(a: Array, b: Array) -> Array:
    """The product of fp32 matrices `[rows, terms]` and `[terms, columns]`, as exact as XLA makes one."""
    return np.asarray(jax.jit(partial(jnp.matmul, precision="highest"))(a, b))


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
