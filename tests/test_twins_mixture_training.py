"""Steps of a mixture: the losses of its routers by their definition, and both trainers alike."""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from gpt_core.config import ModelConfig
from gpt_core.formats.safetensors_torch import SPOKE
from gpt_core.parameters import parameter_table
from gpt_core.runs.config import RunConfig
from gpt_core.storage.weights import decode, weights_source

BATCH, TIME, VOCAB, STEPS = 8, 9, 23, 20
MODEL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "context_length": TIME,
    "n_layers": 2,
    "n_heads": 2,
    "embed_dim": 16,
    "position": "rope",
    "activation": "silu",
    "gated_mlp": True,
    "bias": False,
    "n_experts": 4,
    "experts_per_token": 2,
    "expert_dim": 12,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "at once": {},
    "in parts": {"train": {"accumulation": 2}, "jax": {"remat": "full"}, "torch": {"remat": "full"}},
    "in parts, unrolled": {
        "train": {"accumulation": 4},
        "jax": {"scan_layers": False, "experts": "reference"},
        "torch": {"experts": "reference"},
    },
    "z alone": {"train": {"accumulation": 2, "balance_loss": 0.0}},
}
WEIGHTS = {"balance_loss": 0.3, "router_z_loss": 0.02}  # large enough to be seen in every gradient


def run_config(train: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    defaults = {"steps": STEPS, "batch_size": BATCH, "dtype": "float64"} | WEIGHTS
    return RunConfig.from_dict(
        {
            "model": MODEL,
            "train": defaults | (train or {}),
            "data": {"streams": 1},
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 3, "clip_norm": 1e9},
        }
        | sections
    )


@functools.cache
def weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    table = parameter_table(ModelConfig(**MODEL))
    return {name: row.mean + random.normal(0, 0.3, row.shape) for name, row in table.items()}


def batches() -> Iterator[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    for _ in range(STEPS):
        rows = random.integers(0, VOCAB, (BATCH, TIME + 1)).astype(np.int32)
        mask = random.random((BATCH, TIME)) < np.linspace(0.2, 1, BATCH)[:, None]  # micro-batches of unequal weight
        yield {"tokens": rows[:, :-1].copy(), "targets": rows[:, 1:].copy(), "mask": mask}


class Steps:
    """A trainer that starts with `weights`: the numbers of each step, and what the first one had as gradients."""

    def __init__(self, config: RunConfig, steps: int = 1) -> None:
        self.metrics: list[dict[str, Any]] = []
        self.gradients: dict[str, np.ndarray] = {}
        for step, batch in zip(range(steps), batches(), strict=False):
            found = self.step(batch, config.rate(step))
            self.metrics.append({name: np.asarray(value) for name, value in found.items()})
            if step == 0:  # AdamW's first mean is (1 - beta1) times them
                mean = self.first_moment()
                self.gradients = {name: array / (1 - config.optimizer.beta1) for name, array in mean.items()}

    def step(self, batch: dict[str, np.ndarray], rate: float) -> dict[str, Any]:
        raise NotImplementedError

    def first_moment(self) -> dict[str, np.ndarray]:
        raise NotImplementedError


class JaxSteps(Steps):
    def __init__(self, config: RunConfig, steps: int = 1) -> None:
        import jax

        from jax_gpt.sharding import create_mesh
        from jax_gpt.start import placed
        from jax_gpt.step import create_program

        self.mesh = create_mesh(config.jax.mesh, jax.devices()[:1])
        self.program = create_program(config, self.mesh)
        parameters = placed(self.program.state.parameters, config, weights_source(weights()))
        self.state = self.program.create()._replace(parameters=parameters)
        super().__init__(config, steps)

    def step(self, batch: dict[str, np.ndarray], rate: float) -> dict[str, Any]:
        from jax_gpt.sharding import place_batch

        placed = place_batch(batch, self.mesh, BATCH)  # type: ignore[arg-type]
        self.state, metrics = self.program.step(self.state, placed, np.float64(rate))
        return metrics

    def first_moment(self) -> dict[str, np.ndarray]:
        from flax import nnx

        from parity.sides.jax_side import weights_of

        mean: Any = self.state.moments[0].mu  # type: ignore[index]
        return weights_of(nnx.merge(self.program.graph, mean))


class TorchSteps(Steps):
    def __init__(self, config: RunConfig, steps: int = 1) -> None:
        from torch_gpt.distributed import connect
        from torch_gpt.start import placed
        from torch_gpt.step import create_program

        self.model = config.model
        self.program = create_program(config, connect())
        self.state = self.program.state
        placed(self.state.parameters, config, weights_source(weights()))
        super().__init__(config, steps)

    def step(self, batch: dict[str, np.ndarray], rate: float) -> dict[str, Any]:
        from torch_gpt.parallel import place_batch

        self.state, metrics = self.program.step(self.state, place_batch(batch, self.program.device), rate)  # type: ignore[arg-type]
        return metrics

    def first_moment(self) -> dict[str, np.ndarray]:
        optimizer = self.state.optimizer
        means = {name: optimizer.state[p]["exp_avg"].numpy().copy() for name, p in self.state.parameters.items()}
        return decode(means, self.model, SPOKE, "the first moment")


TRAINERS: dict[str, type[Steps]] = {"jax": JaxSteps, "torch": TorchSteps}


@functools.cache
def trained(framework: str, setting: str) -> Steps:
    """Twenty steps of one setting, for the comparison of both trainers; one of the others."""
    return TRAINERS[framework](run_config(**SETTINGS[setting]), STEPS if setting == "in parts" else 1)


@functools.cache
def scores() -> np.ndarray:
    """Of the first batch, `[layers, counted positions, experts]`, out of a trace of PyTorch's model."""
    from parity.sides import side_of

    batch = next(batches())
    side = side_of("torch")
    model = side.build(ModelConfig(**MODEL), weights_source(weights()), "float64")
    sites = side.run(model, batch["tokens"]).sites
    return np.stack([sites[f"blocks.{layer}.moe.scores"][batch["mask"]] for layer in range(MODEL["n_layers"])])


def by_hand() -> dict[str, Any]:
    """What is said of the routing of the first batch, position by position."""
    layers, count, experts = scores().shape
    load, mean, z, entropy = (
        np.zeros((layers, experts)),
        np.zeros((layers, experts)),
        np.zeros(layers),
        np.zeros(layers),
    )
    for layer in range(layers):
        for position in range(count):
            own = scores()[layer, position]
            p = np.exp(own) / np.exp(own).sum()
            mean[layer] += p / count
            z[layer] += np.log(np.exp(own).sum()) ** 2 / count
            entropy[layer] -= (p * np.log(p)).sum() / count
            for expert in np.argsort(-own)[: MODEL["experts_per_token"]]:
                load[layer, expert] += 1 / (count * MODEL["experts_per_token"])
    balance = experts * (load * mean).sum(1)
    return {
        "balance_loss": balance.mean(),
        "router_z_loss": z.mean(),
        "router/balance_loss": balance,
        "router/z_loss": z,
        "router/entropy": entropy,
        "router/starved": (load == 0).mean(1),
        "router/load": load,
    }


@functools.cache
def alone(balance_loss: float) -> tuple[float, dict[str, np.ndarray]]:
    """Cross entropy of the first batch, and gradients of the total: one model, one loss, no step."""
    import torch

    from torch_gpt.model import GPT

    batch = {name: torch.from_numpy(array) for name, array in next(batches()).items()}
    mask = batch["mask"]
    config = run_config().model
    model = GPT(
        config,
        lambda row: torch.tensor(weights()[row.name] if row.layer is None else weights()[row.name][row.layer]),
        precision=run_config().precision,
    )
    taps: dict[str, torch.Tensor] = {}
    logits = model(batch["tokens"], taps=taps)
    loss = torch.nn.functional.cross_entropy(logits[mask], batch["targets"][mask].long())
    total = loss
    for layer, load in enumerate(by_hand()["router/load"]):
        own = taps[f"blocks.{layer}.moe.scores"][mask]
        balance = config.n_experts * torch.tensor(load) @ own.softmax(-1).mean(0)
        z = own.logsumexp(-1).square().mean()
        total = total + (balance_loss * balance + WEIGHTS["router_z_loss"] * z) / config.n_layers
    total.backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]
    return loss.item(), decode(gradients, config, SPOKE, "the gradients")


@pytest.mark.parametrize(
    ("framework", "setting"),
    [
        *(("torch", setting) for setting in SETTINGS),
        *(("jax", setting) for setting in ("at once", "in parts")),
        *(pytest.param("jax", setting, marks=pytest.mark.slow) for setting in ("in parts, unrolled", "z alone")),
    ],
)
def test_losses_gradients_and_statistics_are_those_of_the_whole_step(framework: str, setting: str, x64: None) -> None:
    found = trained(framework, setting)
    metrics = found.metrics[0]
    loss, gradients = alone(run_config(**SETTINGS[setting]).train.balance_loss)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-12)
    for name, expected in by_hand().items():
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-11, err_msg=name)
    assert found.gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        error = np.abs(found.gradients[name] - gradient).max() / np.abs(gradient).max()
        assert error <= 1e-11, name


def test_twenty_steps_of_both_trainers_are_the_same(x64: None) -> None:
    jax, torch = (trained(framework, "in parts").metrics for framework in TRAINERS)
    assert len(jax) == len(torch) == STEPS
    assert torch[-1]["loss"] < torch[0]["loss"] - 0.1, "nothing was learned, so nothing was compared"
    for ours, theirs in zip(jax, torch, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=1e-10, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("chosen", [1, 2, 3])
def test_of_one_layer_the_balance_loss_is_that_of_transformers_over_the_experts_of_a_token(chosen: int) -> None:
    """It adds up the shares of the k choices, where ours are of all assignments; with one layer nothing cancels."""
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    from gpt_core.routing import expert_load, summed_router_loss
    from torch_gpt.moe import route
    from torch_gpt.routing import routing_of, routing_taps

    config = ModelConfig(**MODEL | {"n_layers": 1, "experts_per_token": chosen})
    scores = torch.tensor(np.random.default_rng(0).normal(size=(BATCH, TIME, config.n_experts)))
    mask = torch.tensor(next(batches())["mask"])
    taps = routing_taps(config)
    assert taps is not None
    taps |= {"blocks.0.moe.scores": scores, "blocks.0.moe.chosen": route(scores, config)[0]}
    routing = routing_of(taps, mask, config)
    assert routing is not None
    load = expert_load(routing.assigned, mask.sum(), chosen)
    ours = summed_router_loss(routing, load, run_config({"balance_loss": 1.0, "router_z_loss": 0.0}).train) / mask.sum()
    theirs = load_balancing_loss_func((scores.flatten(0, 1),), config.n_experts, chosen, mask.long())
    # Its sums are fp32.
    assert theirs.item() == pytest.approx(chosen * ours.item(), rel=1e-6)
