"""Sharding changes where numbers are, not what they are."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.parameters import parameter_table
from gpt_core.runs.config import MeshConfig, RunConfig
from jax_gpt.sharding import check_divides, create_mesh, partition

MODEL: dict[str, Any] = {
    "vocab_size": 61,
    "pad_vocab_size_multiple": 64,
    "context_length": 32,
    "n_layers": 2,
    "n_heads": 8,
    "embed_dim": 64,
}
MESHES: dict[str, Any] = {
    "one": None,
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "tensor": {"data": 1, "tensor": 8},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
    "stages": {"data": 1, "fsdp": 4, "tensor": 2, "fsdp_inner": 2},
}
EXPERTS: dict[str, Any] = {
    "expert": {"data": 1, "expert": 8},
    "expert x fsdp": {"data": 1, "fsdp": 2, "expert": 4},
    "data x expert x tensor": {"data": 2, "expert": 2, "tensor": 2},
    "fsdp x expert x tensor": {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
}
MIXTURE: dict[str, Any] = {
    "activation": "silu",
    "gated_mlp": True,
    "bias": False,
    "n_experts": 8,
    "experts_per_token": 2,
    "expert_dim": 32,
}
WINDOW = {"n_kv_heads": 2, "position": "rope", "sliding_window": 5}
# Every mesh with one variant, and each other variant with the mesh that treats its own weights in another way.
VARIANTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "window": (WINDOW, ["data", "fsdp", "tensor", "all", "stages"]),
    "mha": ({}, ["tensor"]),
    "gqa": ({"n_kv_heads": 4, "position": "rope"}, ["tensor"]),  # fewer kv heads than the tensor axis has devices
    "mqa": ({"n_kv_heads": 1, "tied_embeddings": False}, ["stages"]),
}


def case(
    model: dict[str, Any], meshes: list[str], adapter: dict[str, Any] | None = None, **train: Any
) -> dict[str, Any]:
    chosen = {name: (MESHES | EXPERTS)[name] for name in ("one", *meshes)}
    return {"model": MODEL | model, "meshes": chosen, "train": train, "adapter": adapter or {}}


def losses(**cases: dict[str, Any]) -> dict[str, Any]:
    """Of all cases in one process, which has eight devices."""
    script = Path(__file__).with_name("mesh_losses.py")
    done = subprocess.run([sys.executable, script, json.dumps(cases)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_same_losses(found: dict[str, Any], tolerance: float, learned: float = 0.3) -> None:
    expected = np.array(found["one"]["losses"])
    assert expected[-1] < expected[0] - learned, "nothing was learned, so nothing was compared"
    for mesh, result in found.items():
        np.testing.assert_allclose(result["losses"], expected, rtol=tolerance, atol=0, err_msg=mesh)


def test_accumulation_and_dropout_do_not_depend_on_the_mesh() -> None:
    """Of a mixture, whose routers' losses are of the whole step, and weigh enough to be seen."""
    train = {"dtype": "float64", "accumulation": 2, "balance_loss": 0.3, "router_z_loss": 0.02}
    found = losses(dropout=case(WINDOW | MIXTURE | {"dropout": 0.1}, ["all"], **train))
    assert_same_losses(found["dropout"], 1e-10)


@pytest.mark.slow
def test_a_mixture_learns_alike_wherever_its_experts_are() -> None:
    """Twenty steps, with all that could depend on who has which rows."""
    model = MIXTURE | WINDOW | {"n_heads": 4, "embed_dim": 16, "norm": "rms", "dropout": 0.1}
    found = losses(moe=case(model, list(EXPERTS), dtype="float64", accumulation=2, steps=20, balance_loss=0.1))
    assert_same_losses(found["moe"], 1e-10)
    assert found["moe"]["expert"]["share"] < 0.5  # experts are shared out, the rest of so small a model is not


@pytest.mark.slow
def test_an_adapter_is_trained_alike_on_every_mesh() -> None:
    """On those that share the base out; what one axis alone does is seen without an adapter."""
    adapter = {"rank": 4, "alpha": 64}
    found = losses(lora=case(WINDOW, ["fsdp", "all", "stages"], adapter, dtype="float64"))
    assert_same_losses(found["lora"], 1e-10, learned=0.02)
    assert found["lora"]["fsdp"]["share"] <= 1.1 / 8  # the base is shared out, and so is most of the adapter


@pytest.mark.slow
def test_every_mesh_gives_the_losses_of_one_device() -> None:
    fp64 = {name: case(model, meshes, dtype="float64") for name, (model, meshes) in VARIANTS.items()}
    found = losses(**fp64, fp32=case(WINDOW, ["all"], dtype="float32"))
    for name in VARIANTS:
        assert_same_losses(found[name], 1e-10)
    assert_same_losses(found["fp32"], 1e-5)
    assert found["window"]["fsdp"]["share"] <= 1.05 / 8
    assert found["window"]["one"]["share"] == 1


def sizes(data: int = 1, fsdp: int = 1, expert: int = 1, tensor: int = 1) -> AbstractMesh:
    """A mesh without devices."""
    return AbstractMesh((data, fsdp, expert, tensor), ("data", "fsdp", "expert", "tensor"))


@pytest.mark.parametrize(
    ("name", "mesh", "expected"),
    [
        ("token_embedding", sizes(fsdp=4, tensor=2), P("tensor", "fsdp")),
        ("blocks.attention.query.kernel", sizes(fsdp=4, tensor=2), P(None, "fsdp", "tensor", None)),
        ("blocks.attention.key.kernel", sizes(tensor=4), P(None, "fsdp", "tensor", None)),
        ("blocks.attention.key.kernel", sizes(tensor=8), P(None, "fsdp", None, None)),  # 4 kv heads: copied
        ("blocks.attention.output.kernel", sizes(fsdp=2, tensor=2), P(None, "tensor", None, "fsdp")),
        ("blocks.mlp.up.bias", sizes(fsdp=2, tensor=2), P(None, ("tensor", "fsdp"))),
        ("blocks.mlp_norm.scale", sizes(fsdp=8), P(None, "fsdp")),
        ("blocks.moe.gate.kernel", sizes(fsdp=2, expert=4, tensor=2), P(None, "expert", "fsdp", "tensor")),
        ("blocks.moe.down.kernel", sizes(fsdp=2, expert=4, tensor=2), P(None, "expert", "tensor", "fsdp")),
        ("blocks.moe.router.kernel", sizes(fsdp=2, expert=4, tensor=2), P(None, "fsdp", None)),
    ],
)
def test_rules_read_axis_names(name: str, mesh: AbstractMesh, expected: P) -> None:
    model = MODEL | (MIXTURE if ".moe." in name else {})
    table = parameter_table(ModelConfig(**model | {"n_kv_heads": 4}))
    assert partition(table[name], mesh) == expected


def config(**sections: Any) -> RunConfig:
    return RunConfig.from_dict({"model": MODEL, "train": {"batch_size": 8}} | sections)


@pytest.mark.parametrize(
    ("sections", "mesh", "named"),
    [
        ({"model": MODEL | {"n_heads": 4}}, sizes(tensor=8), "model.n_heads = 4"),
        ({"model": MODEL | {"mlp_dim": 36}}, sizes(tensor=8), "model.mlp_dim = 36"),
        ({"model": MODEL | {"pad_vocab_size_multiple": 1}}, sizes(tensor=2), "pad_vocab_size_multiple"),
        ({"model": MODEL | {"n_heads": 24, "n_kv_heads": 12, "head_dim": 8}}, sizes(tensor=8), "n_kv_heads = 12"),
        ({}, sizes(fsdp=3), "embed_dim = 64"),
        ({"model": MODEL | MIXTURE}, sizes(expert=3), "expert = 3 does not divide model.n_experts = 8"),
        (
            {"model": MODEL | MIXTURE | {"expert_dim": 36}},
            sizes(tensor=8),
            "tensor = 8 does not divide model.expert_dim = 36",
        ),
        ({}, sizes(expert=2), "expert = 2 is for mixtures, and model.n_experts = 0: leave it at 1"),
        (
            {"model": MODEL | MIXTURE},
            sizes(data=2, expert=8),
            "data x fsdp x expert = 16 devices do not divide the 8",
        ),
        ({"train": {"batch_size": 8, "accumulation": 2}}, sizes(data=8), "4 rows of a micro-batch"),
    ],
)
def test_what_does_not_divide_is_named(sections: dict[str, Any], mesh: AbstractMesh, named: str) -> None:
    with pytest.raises(InputError, match=named):
        check_divides(config(**sections), mesh)


def test_a_mesh_that_does_not_multiply_to_the_devices_is_refused() -> None:
    with pytest.raises(InputError, match=r"data 3 x fsdp 1 x expert 1 x tensor 1 does not multiply to the 1 device"):
        create_mesh(MeshConfig(data=3), jax.devices()[:1])


def test_minus_one_takes_the_devices_that_are_left() -> None:
    assert dict(create_mesh(MeshConfig(data=1, fsdp=-1), jax.devices()[:1]).shape) == {
        "data": 1,
        "fsdp": 1,
        "expert": 1,
        "tensor": 1,
    }
