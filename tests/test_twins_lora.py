"""Training an adapter is one thing in both frameworks, and leaves the base as it was."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from gpt_core.adapter import adapter_table
from gpt_core.parameters import parameter_table
from gpt_core.runs.config import RunConfig
from gpt_core.storage.weights import weights_source

BATCH, TIME, VOCAB, STEPS = 4, 11, 31, 20
MODEL = {
    "vocab_size": VOCAB,
    "context_length": TIME,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "embed_dim": 16,
    "position": "rope",
    "gated_mlp": True,
}
CASES = {
    "all layers, scanned, in micro-batches": {
        "adapter": {"rank": 3, "alpha": 5},
        "train": {"accumulation": 2},
        "jax": {"scan_layers": True},
    },
    "some, unrolled, rematerialised, untied": {
        "adapter": {"rank": 2, "alpha": 8, "rslora": True, "targets": ["attention.output", "mlp.gate"]},
        "model": {"tied_embeddings": False},
        "jax": {"scan_layers": False, "remat": "full"},
        "torch": {"remat": "full"},
    },
}


def run_config(name: str) -> RunConfig:
    case: dict[str, Any] = CASES[name]
    train = {"steps": STEPS, "batch_size": BATCH, "dtype": "float64"} | case.get("train", {})
    optimizer = {"learning_rate": 1e-2, "warmup_steps": 3, "clip_norm": 0.3}
    return RunConfig.from_dict(
        {"data": {"streams": 1}, "optimizer": optimizer}
        | case
        | {"model": MODEL | case.get("model", {}), "train": train}
    )


def drawn(table: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: row.mean + random.normal(0, 0.2, row.shape) for name, row in table.items()}


def batches() -> Iterator[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    for _ in range(STEPS):
        rows = random.integers(0, VOCAB, (BATCH, TIME + 1)).astype(np.int32)
        mask = random.random((BATCH, TIME)) < 0.7
        yield {"tokens": rows[:, :-1].copy(), "targets": rows[:, 1:].copy(), "mask": mask}


def in_jax(config: RunConfig, base: dict[str, Any], adapter: dict[str, Any]) -> tuple[list[float], list[Any], Any]:
    import jax
    from flax import nnx

    from jax_gpt.sharding import create_mesh, place_batch
    from jax_gpt.start import placed
    from jax_gpt.step import create_program

    mesh = create_mesh(config.jax.mesh, jax.devices()[:1])
    program = create_program(config, mesh)
    table = adapter_table(config.model, config.adapter)
    state = program.create()._replace(
        parameters=placed(program.state.parameters, config, weights_source(adapter), table),
        frozen=placed(program.state.frozen, config, weights_source(base)),
    )

    def arrays(of: Any) -> dict[str, np.ndarray]:
        flat = {".".join(map(str, key)): np.array(leaf[...]) for key, leaf in nnx.to_flat_state(of)}
        if config.jax.scan_layers:
            return flat
        names = dict.fromkeys(".".join(part for part in key.split(".") if not part.isdecimal()) for key in flat)
        blocks = {name: [flat.get(name.replace("blocks.", f"blocks.{n}.", 1)) for n in range(2)] for name in names}
        return {name: np.stack(of) if name.startswith("blocks.") else flat[name] for name, of in blocks.items()}

    losses, after = [], []
    for step, batch in enumerate(batches()):
        rate = np.asarray(config.rate(step), "float64")
        state, metrics = program.step(state, place_batch(batch, mesh, BATCH), rate)  # type: ignore[arg-type]
        losses.append(float(metrics["loss"]))
        after.append(arrays(state.parameters))
    return losses, after, arrays(state.frozen)


def in_torch(config: RunConfig, base: dict[str, Any], adapter: dict[str, Any]) -> tuple[list[float], list[Any], Any]:
    from gpt_core.formats.safetensors_torch import spoke_of
    from gpt_core.storage.weights import slots, source_of
    from torch_gpt.distributed import connect
    from torch_gpt.parallel import place_batch
    from torch_gpt.start import placed
    from torch_gpt.step import create_program

    program = create_program(config, connect())
    state = program.state
    tables = parameter_table(config.model), adapter_table(config.model, config.adapter)
    placed(state.parameters, config, weights_source(adapter), tables[1])
    placed(state.frozen, config, weights_source(base))

    def arrays(of: Any, table: Any) -> dict[str, np.ndarray]:
        read = source_of(slots(config.model, spoke_of(table), table), lambda key: of[key].detach().numpy().copy())
        return {name: read(row) for name, row in table.items()}

    losses, after = [], []
    for step, batch in enumerate(batches()):
        state, metrics = program.step(state, place_batch(batch, program.device), config.rate(step))  # type: ignore[arg-type]
        losses.append(float(metrics["loss"]))
        after.append(arrays(state.parameters, tables[1]))
    assert all(parameter.grad is None for parameter in state.frozen.values())
    return losses, after, arrays(state.frozen, tables[0])


@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_of_an_adapter_are_the_same_and_the_base_stays(name: str, x64: None) -> None:
    config = run_config(name)
    base = drawn(parameter_table(config.model), 1)
    adapter = drawn(adapter_table(config.model, config.adapter), 2)
    jax_losses, jax_after, jax_base = in_jax(config, base, adapter)
    torch_losses, torch_after, torch_base = in_torch(config, base, adapter)
    np.testing.assert_allclose(jax_losses, torch_losses, rtol=1e-10, atol=0)
    for key, first in adapter.items():
        ours, theirs = (after[4][key] - first for after in (jax_after, torch_after))  # what five steps did
        assert np.abs(ours - theirs).max() <= 1e-9 * np.abs(theirs).max() > 0, key
    for found in (jax_base, torch_base):
        assert found.keys() == base.keys()
        for key, array in base.items():
            np.testing.assert_array_equal(found[key], array, key)
