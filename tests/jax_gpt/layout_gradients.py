"""Not a test: run by `test_layout.py` in a process of its own, where eight devices can be made of one CPU.

Prints, for each mesh, the largest error of a gradient leaf of one step against the gradients of the model alone, and
the kinds of collectives in the compiled step.
"""

import json
import os
import sys
from unittest.mock import patch

request = json.loads(sys.argv[1])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax  # noqa: E402  # the flags come first
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from gpt_core.runs.config import RunConfig  # noqa: E402
from jax_gpt.loss import token_loss  # noqa: E402
from jax_gpt.model import GPT, initialiser  # noqa: E402
from jax_gpt.sent import tokens  # noqa: E402
from jax_gpt.sharding import create_mesh, place_batch  # noqa: E402
from jax_gpt.step import create_program  # noqa: E402
from jax_gpt.taps import Taps  # noqa: E402

jax.config.update("jax_enable_x64", True)
BATCH, TIME = 16, 21
random = np.random.default_rng(0)
ROWS = random.integers(0, request["model"]["vocab_size"], (BATCH, TIME + 1)).astype(np.int32)
MASK = random.random((BATCH, TIME)) < np.linspace(0.2, 1, BATCH)[:, None]
DATA = {"tokens": ROWS[:, :-1].copy(), "targets": ROWS[:, 1:].copy(), "mask": MASK}


def configured(mesh: dict[str, int], more: dict[str, object]) -> RunConfig:
    return RunConfig.from_dict(
        {
            "model": request["model"],
            "train": {"dtype": "float64", "batch_size": BATCH, "context_length": TIME, **more.get("train", {})},  # type: ignore[dict-item]
            "data": {"streams": 1},
            "optimizer": {"clip_norm": 1e9},
            "jax": {"mesh": mesh, "loss_chunk": 32, "remat": more.get("remat", "none")},
        }
    )


def router_loss(config: RunConfig, taps: Taps) -> jax.Array:
    """As docs/experts.md defines it, of all positions that count."""

    def of_layer(layer: int) -> jax.Array:
        scores, chosen = (taps[f"blocks.{layer}.moe.{site}"][MASK] for site in ("scores", "chosen"))
        shares = jnp.bincount(chosen.ravel(), length=config.model.n_experts) / chosen.size
        balance = config.model.n_experts * (shares * jax.nn.softmax(scores).mean(0)).sum()
        squares = jax.nn.logsumexp(scores, axis=-1) ** 2
        return config.train.balance_loss * balance + config.train.router_z_loss * squares.mean()

    return jnp.stack([of_layer(layer) for layer in range(config.model.n_layers)]).mean()


def alone(config: RunConfig) -> list[np.ndarray]:
    """Gradients of the mean loss, of one model on one device: no step, no layout."""
    graph, parameters = nnx.split(GPT(config.model, initialiser(0, config.precision), precision=config.precision))

    def loss(parameters: nnx.State) -> jax.Array:
        taps: Taps = {}
        logits = nnx.merge(graph, parameters)(jnp.array(DATA["tokens"]), taps=taps)
        of_tokens = token_loss(logits, jnp.array(DATA["targets"]), jnp.array(DATA["mask"]))
        return of_tokens + router_loss(config, taps) if config.model.n_experts else of_tokens

    return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(parameters))]


def of_step(config: RunConfig) -> tuple[list[np.ndarray], list[str]]:
    """Gradients of one step, out of AdamW's first mean: that is (1 - beta1) times them."""
    mesh = create_mesh(config.jax.mesh)
    program = create_program(config, mesh)
    batch = place_batch(DATA, mesh, BATCH)  # type: ignore[arg-type]
    step = program.step.lower(program.state, batch, 0.0).compile()  # type: ignore[attr-defined]
    kinds = [kind for kind in ("all-gather", "reduce-scatter", "all-reduce") if f" {kind}(" in step.as_text()]
    state, _ = step(program.create(), batch, 0.0)
    mean = state.moments[0].mu  # type: ignore[index]
    return [np.asarray(leaf) / (1 - config.optimizer.beta1) for leaf in jax.tree.leaves(mean)], kinds


def ragged_all_to_all(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis_name: str,
) -> jax.Array:
    """What JAX documents `jax.lax.ragged_all_to_all` to do, which CPUs have not; NaN where it would be undefined."""
    me = jax.lax.axis_index(axis_name)
    everyone = jax.lax.all_gather(operand, axis_name)  # [senders, rows, ...]
    begins, sizes, lands = (
        jax.lax.all_gather(one, axis_name)[:, me] for one in (input_offsets, send_sizes, output_offsets)
    )
    for sender in range(len(sizes)):
        within = jnp.arange(len(output)) - lands[sender]
        sent = everyone[sender, (begins[sender] + within).clip(0, len(operand) - 1)]
        output = jnp.where(((within >= 0) & (within < sizes[sender]))[:, None], sent, output)
    return jnp.where((sizes == recv_sizes).all(), output, jnp.nan)


expected = alone(configured({}, {}))
floor = 1e-6 * max(np.abs(leaf).max() for leaf in expected)
found = {}
jax.lax.ragged_all_to_all = ragged_all_to_all
for name, (mesh, more) in request["meshes"].items():
    with patch.object(tokens, "is_ragged", return_value=more.get("ragged", False)):
        gradients, kinds = of_step(configured(mesh, more))
    errors = [np.abs(a - b).max() / max(np.abs(b).max(), floor) for a, b in zip(gradients, expected, strict=True)]
    found[name] = {"error": float(max(errors)), "kinds": kinds}
print(json.dumps(found))
