"""The collectives that a step writes out: same gradients, and no more is sent than must be."""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.custom_partitioning import custom_partitioning

from gpt_core.errors import InputError
from gpt_core.runs.config import RunConfig
from jax_gpt import attention
from jax_gpt.layout import Layout
from jax_gpt.sent.stages import ring
from jax_gpt.sharding import create_mesh
from jax_gpt.step import create_program

MODEL: dict[str, Any] = {
    "vocab_size": 61,
    "pad_vocab_size_multiple": 64,
    "context_length": 32,
    "n_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 2,
    "embed_dim": 64,
    "position": "rope",
    "sliding_window": 5,
}
MODERN = MODEL | {
    "n_layers": 4,
    "attention_pattern": "LG",  # a scan of two periods
    "norm": "rms",
    "norm_placement": "sandwich",
    "qk_norm": "whole",  # over heads that the tensor axis shares out
    "activation": "silu",
    "gated_mlp": True,
    "attention_softcap": 3.0,
}
MIXTURE = MODEL | {
    "n_heads": 4,
    "embed_dim": 16,
    "norm": "rms",
    "activation": "silu",
    "gated_mlp": True,
    "bias": False,
    "n_experts": 8,
    "experts_per_token": 3,  # more than a device has, where it has two
    "expert_dim": 24,
}
MESHES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "fsdp": ({"data": 1, "fsdp": 8}, {"remat": "none"}),
    "fsdp in two stages": ({"data": 1, "fsdp": 8, "fsdp_inner": 2}, {"remat": "full"}),
    "fsdp x tensor": ({"data": 1, "fsdp": 4, "tensor": 2, "fsdp_inner": 2}, {"remat": "dots"}),
    "kv heads copied": ({"data": 1, "fsdp": 2, "tensor": 4}, {"remat": "full"}),
    "data x fsdp": ({"data": 2, "fsdp": 4, "fsdp_inner": 2}, {"train": {"accumulation": 2}}),
    "data": ({"data": 8}, {}),
}
EXPERTS: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "expert x fsdp x tensor": (
        {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
        {"train": {"accumulation": 2}, "remat": "full"},
    ),
    "expert, only what is there": ({"data": 1, "expert": 4, "fsdp": 2}, {"ragged": True, "remat": "full"}),
    "expert x fsdp": ({"data": 1, "fsdp": 2, "expert": 4}, {"remat": "none"}),
    "data x expert x tensor": ({"data": 2, "expert": 2, "tensor": 2}, {"remat": "dots"}),
    "expert": ({"data": 1, "expert": 8}, {"train": {"accumulation": 2}}),
    "fsdp x tensor": MESHES["fsdp x tensor"],
}


@pytest.mark.parametrize(
    ("model", "meshes"),
    [
        (MODERN, {name: MESHES[name] for name in ("fsdp in two stages", "kv heads copied")}),
        (MIXTURE, {name: EXPERTS[name] for name in ("expert x fsdp x tensor", "expert, only what is there")}),
        pytest.param(MODEL, MESHES, marks=pytest.mark.slow),
        pytest.param(MIXTURE, EXPERTS, marks=pytest.mark.slow),
    ],
    ids=["modern", "mixture", "plain-all", "mixture-all"],
)
def test_gradients_of_every_layout_are_those_of_the_model_alone(model: dict[str, Any], meshes: dict[str, Any]) -> None:
    request = {"model": model, "meshes": meshes}
    script = Path(__file__).with_name("layout_gradients.py")
    done = subprocess.run([sys.executable, script, json.dumps(request)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    errors = {name: result["error"] for name, result in found.items()}
    assert set(errors) == set(meshes)
    assert max(errors.values()) <= 1e-11, errors
    for name in {"fsdp", "fsdp in two stages", "data x fsdp"}.intersection(meshes):
        assert {"all-gather", "reduce-scatter"} <= set(found[name]["kinds"]), name
    if "data" in meshes:
        assert found["data"]["kinds"] == ["all-reduce"]


class Device:
    """A place in a torus."""

    def __init__(self, *coords: int) -> None:
        self.coords = coords


class Grid:
    """Stands for a mesh of data 1, fsdp all, expert 1, tensor 1."""

    def __init__(self, devices: list[Any]) -> None:
        self.devices = np.array(devices, dtype=object).reshape(1, -1, 1, 1)


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ([Device(x, y, 0) for x in range(4) for y in range(8)], 8),
        ([Device(x, 0, 0) for x in range(6)], 6),
        ([Device(x, y, z) for x in range(2) for y in range(2) for z in range(4)], 4),
        ([object() for _ in range(6)], 6),  # no torus
    ],
)
def test_a_ring_ends_where_a_second_coordinate_changes(devices: list[Any], expected: int) -> None:
    unchecked = inspect.unwrap(ring)  # without the tests' own type check
    assert unchecked(Grid(devices)) == expected  # type: ignore[arg-type]


def test_stages_that_do_not_divide_are_refused() -> None:
    config = RunConfig.from_dict({"jax": {"mesh": {"fsdp_inner": 3}}})
    with pytest.raises(InputError, match="fsdp_inner = 3 does not divide fsdp = 1"):
        Layout(config, create_mesh(config.jax.mesh, jax.devices()[:1]))


@pytest.mark.parametrize("function", ["step", "evaluate"])
def test_kernels_that_want_one_mesh_get_it(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As cuDNN's: JAX refuses a program with such a kernel and two meshes when it is lowered."""

    @custom_partitioning
    def kernel(x: jax.Array) -> jax.Array:
        return x

    kernel.def_partition(partition=lambda *_: None, infer_sharding_from_operands=lambda *_: None, sharding_rule="a->a")
    differentiable = jax.custom_vjp(lambda x: kernel(x.ravel()).reshape(x.shape))
    differentiable.defvjp(lambda x: (differentiable(x), None), lambda _, gradient: (gradient,))
    reference = attention._IMPLEMENTATIONS["reference"]
    with_kernel = lambda query, *others: reference(differentiable(query), *others)  # noqa: E731
    monkeypatch.setitem(attention._IMPLEMENTATIONS, "reference", with_kernel)
    train = {"batch_size": 2, "context_length": 8}
    sections = {"model": MODEL, "train": train, "data": {"streams": 1}, "jax": {"attention": "reference"}}
    config = RunConfig.from_dict(sections)
    program = create_program(config, create_mesh(config.jax.mesh, jax.devices()[:1]))
    rows = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    batch = {"tokens": rows, "targets": rows, "mask": jax.ShapeDtypeStruct((2, 8), jnp.bool_)}
    lowered = {
        "step": lambda: program.step.lower(program.state, batch, jax.ShapeDtypeStruct((), jnp.float32)),
        "evaluate": lambda: program.evaluate.lower(program.state.parameters, batch),
    }[function]()
    assert "sdy.mesh" in lowered.as_text()
