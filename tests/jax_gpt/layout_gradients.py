"""Not a test: run by `test_layout.py` in a process of its own, where eight devices can be made of one CPU.

Prints, for each mesh, the largest error of a gradient leaf of one step against the gradients of the model alone, and
the kinds of collectives in the compiled step.
"""

import json
import os
import sys

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
from jax_gpt.sharding import create_mesh, place_batch  # noqa: E402
from jax_gpt.step import create_program  # noqa: E402

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


def alone(config: RunConfig) -> list[np.ndarray]:
    """Gradients of the mean loss, of one model on one device: no step, no layout."""
    graph, parameters = nnx.split(GPT(config.model, initialiser(0, config.precision), precision=config.precision))

    def loss(parameters: nnx.State) -> jax.Array:
        logits = nnx.merge(graph, parameters)(jnp.array(DATA["tokens"]))
        return token_loss(logits, jnp.array(DATA["targets"]), jnp.array(DATA["mask"]))

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


expected = alone(configured({}, {}))
floor = 1e-6 * max(np.abs(leaf).max() for leaf in expected)
found = {}
for name, (mesh, more) in request["meshes"].items():
    gradients, kinds = of_step(configured(mesh, more))
    errors = [np.abs(a - b).max() / max(np.abs(b).max(), floor) for a, b in zip(gradients, expected, strict=True)]
    found[name] = {"error": float(max(errors)), "kinds": kinds}
print(json.dumps(found))
