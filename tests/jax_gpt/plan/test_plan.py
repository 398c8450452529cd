"""`jax-gpt plan`: the same step as `train`, counts by hand, wrong input; and real compilations where libtpu is."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from jax.sharding import AbstractMesh

from gpt_core.errors import InputError
from gpt_core.runs.config import RunConfig
from jax_gpt.cli import main
from jax_gpt.plan import plan as planning
from jax_gpt.plan import theory
from jax_gpt.plan.compiled import Compiled, lowered_step
from jax_gpt.plan.hlo import Collective, Kernel
from jax_gpt.plan.hlo_text import Shape
from jax_gpt.plan.plan import Plan
from jax_gpt.plan.prediction import Traffic, step_seconds, traffic
from jax_gpt.plan.topology import CHIPS, GIB, Topology, parse_topology
from jax_gpt.sharding import create_mesh, place_batch
from jax_gpt.step import create_program

ROOT = Path(__file__).parents[3]
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install '.[tpu-plan]'"
)
MODEL: dict[str, Any] = {
    "vocab_size": 1000,
    "pad_vocab_size_multiple": 128,
    "context_length": 256,
    "n_layers": 3,
    "n_heads": 8,
    "n_kv_heads": 2,
    "embed_dim": 512,
    "position": "rope",
    "sliding_window": 100,
    "bias": False,
}

# What is compiled for a TPU here: every operation of a larger model, in half the time.
SMALL = MODEL | {
    "vocab_size": 250,
    "context_length": 128,
    "n_layers": 2,
    "n_heads": 4,
    "embed_dim": 256,
    "sliding_window": 50,
}


def config(**sections: Any) -> RunConfig:
    train = {"batch_size": 16, "dtype": "bfloat16"} | sections.pop("train", {})
    jax_section = {"mesh": {"data": 1, "fsdp": -1}, "remat": "full"} | sections.pop("jax", {})
    return RunConfig.from_dict({"model": MODEL, "train": train, "data": {"streams": 1}, "jax": jax_section} | sections)


def test_what_is_planned_is_what_is_trained() -> None:
    """The lowered text is equal to that of the trainer's program with real arrays, of a state and a batch."""
    run = config(model=SMALL, train={"batch_size": 2, "dtype": "float32", "accumulation": 2})
    mesh = create_mesh(run.jax.mesh, jax.devices()[:1])
    program = create_program(run, mesh)
    shape = (2, run.context_length)
    rows = {"tokens": np.zeros(shape, np.int32), "targets": np.zeros(shape, np.int32), "mask": np.ones(shape, bool)}
    batch = place_batch(rows, mesh, 2)  # type: ignore[arg-type]
    rate = np.asarray(run.rate(0), run.precision.wide_dtype)
    trained = program.step.lower(program.create(), batch, rate)  # type: ignore[attr-defined]
    assert lowered_step(run, mesh).as_text() == trained.as_text()


# ------------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ("time", "window", "block"), [(12, None, 1), (12, 5, 1), (12, None, 4), (12, 5, 4), (12, 1, 4), (16, 6, 4)]
)
def test_pairs_are_those_of_blocks_with_a_visible_pair(time: int, window: int | None, block: int) -> None:
    query, key = np.arange(time)[:, None], np.arange(time)[None, :]
    seen = (query - key >= 0) & (query - key < (window or time))
    blocks = seen.reshape(time // block, block, time // block, block).any(axis=(1, 3))
    assert theory.visible_pairs(time, window, block) == blocks.sum() * block * block


def sizes(data: int = 1, fsdp: int = 1, expert: int = 1, tensor: int = 1) -> Any:
    return AbstractMesh((data, fsdp, expert, tensor), ("data", "fsdp", "expert", "tensor"))


def test_products_by_hand() -> None:
    run = config(jax={"attention": "splash", "loss_chunk": 512})
    tokens = 16 * 256 / 4
    attention = 512 * 512 * 2 + 2 * 512 * 128
    block = attention + 2 * 512 * 2048
    again = block - 512 * 2048  # nothing needs the result of the last product again
    head = 3 * 1024 * 512  # logits, and the gradients of both factors; none again
    expected = 2 * tokens * (3 * (3 * block + again) + head)
    assert theory.matmul_flops(run, sizes(fsdp=4)) == expected


def test_auto_is_splash_on_a_tpu_and_other_attention_is_products() -> None:
    def attention(**section: Any) -> float:
        run = config(jax=section)
        return theory.matmul_flops(run, sizes(fsdp=4)) - theory.matmul_flops(
            config(jax=section | {"attention": "splash"}), sizes(fsdp=4)
        )

    a_pair = 3 * 16 / 4 * 2 * 8 * 64  # layers, rows of a device, one product's share of all heads
    assert attention() == attention(attention="auto") == 0
    assert attention(attention="reference", remat="none") == 256 * 256 * a_pair * 6
    assert attention(attention="reference") == 256 * 256 * a_pair * 8
    # Two blocks of 128 queries, each with 256 positions of keys: 99 before it, rounded up.
    assert attention(attention="banded") == 256 * 256 * a_pair * 9


def test_a_pattern_costs_what_its_layers_cost_one_by_one() -> None:
    pattern = {"n_layers": 5, "attention_pattern": "LLG"}  # L L G L L

    def attention(**model: Any) -> float:
        long, train = MODEL | {"context_length": 1024} | model, {"context_length": 1024}
        return theory.attention_flops(config(model=long, train=train, jax={"attention": "banded"}), 4)

    each = {"L": attention(n_layers=1), "G": attention(n_layers=1, sliding_window=None)}
    assert each["L"] < each["G"]
    assert attention(**pattern) == 4 * each["L"] + each["G"]


def test_kernels_of_a_pattern_are_told_apart_by_the_width_of_their_grids() -> None:
    long = MODEL | {"context_length": 2048, "n_layers": 2, "attention_pattern": "LG"}
    run = config(model=long, train={"context_length": 2048}, jax={"attention": "splash"})
    query = Shape("bf16", (2, 8, 2048, 64))
    for width, blocks in ((2, 1 + 2 + 2 + 2), (4, 1 + 2 + 3 + 4)):
        forward = Kernel("splash_mha_fwd_residuals", (Shape("s8", (1, 4, width)), query), 3)
        backward = Kernel("splash_mha_dkv_no_residuals", (Shape("s8", (1, width, 4)), query), 1)
        each = 2 * 16 * blocks * 512**2 * 64
        assert theory.kernel_flops([forward], run) == 3 * 2 * each
        assert theory.kernel_flops([backward], run) == 4 * each


def test_a_gate_is_a_product_and_a_norm_behind_the_last_one_has_it_recomputed() -> None:
    mesh = sizes(fsdp=4)
    plain, tokens = config(), 16 * 256 / 4

    def more(**model: Any) -> float:
        changed = theory.matmul_flops(config(model=MODEL | model), mesh) - theory.matmul_flops(plain, mesh)
        return changed / (3 * 2 * tokens * 512 * 2048)  # 3 layers

    assert more(gated_mlp=True) == 3 + 1  # forward, two backward, and again
    assert more(norm_placement="sandwich") == 1


def test_least_traffic_by_hand() -> None:
    run = config(train={"accumulation": 2})
    blocks = 3 * (512 * 512 * 2 + 2 * 512 * 128 + 2 * 512 * 2048)
    norms, last_norm, embedding = 3 * 4 * 512, 2 * 512, 1024 * 512
    whole = 2 * (3 * (2 * blocks + 4 * norms) + 2 * (2 * embedding + 4 * last_norm))  # two micro-batches
    nothing = {"data": 0, "dcn": 0, "fsdp": 0, "expert": 0, "tensor": 0}
    assert theory.minimum_wire_bytes(run, sizes(fsdp=4)) == nothing | {"fsdp": whole * 3 / 4}
    copied = 2 * 4 * (blocks + norms + last_norm + embedding)
    assert theory.minimum_wire_bytes(run, sizes(data=2)) == nothing | {"data": copied / 2}
    assert theory.minimum_wire_bytes(run, sizes(data=2), slices=2) == nothing | {"dcn": copied / 2}
    # Within a slice all of it, then every device a quarter of it to the other slice.
    assert theory.minimum_wire_bytes(run, sizes(data=8), slices=2) == nothing | {
        "data": copied * 3 / 4,
        "dcn": copied / 4 / 2,
    }


MIXTURE = MODEL | {
    "mlp_dim": None,
    "activation": "silu",
    "gated_mlp": True,
    "n_experts": 8,
    "experts_per_token": 2,
    "expert_dim": 768,
}


@pytest.mark.parametrize(("remat", "passes"), [("none", 3), ("dots", 4), ("full", 4)])
def test_products_of_experts_by_hand(remat: str, passes: int) -> None:
    tokens, of_expert = 16 * 256 / 8, 3 * 512 * 768
    mesh = sizes(fsdp=2, expert=4, tensor=2)
    run = config(model=MIXTURE, jax={"remat": remat})
    assert theory.grouped_flops(run, mesh) == passes * 3 * 2 * tokens * 2 * of_expert / 2
    # Micro-batches find the load of the step in a forward pass of its own, unless nothing is made of it.
    parts = {"accumulation": 2}
    each = theory.grouped_flops(run, mesh) / passes
    assert theory.grouped_flops(config(model=MIXTURE, jax={"remat": remat}, train=parts), mesh) == (passes + 1) * each
    spared = config(model=MIXTURE, jax={"remat": remat}, train=parts | {"balance_loss": 0.0})
    assert theory.grouped_flops(spared, mesh) == passes * each
    assert theory.grouped_share(run, mesh) == 2 / (4 * 2)  # of a row for each token and expert here
    assert theory.grouped_share(run, sizes(expert=8)) == 2 / 8


def test_beside_its_experts_a_mixture_multiplies_its_router() -> None:
    tokens, attention = 16 * 256 / 4, 512 * 512 * 2 + 2 * 512 * 128
    expected = 2 * tokens * (3 * 4 * (attention + 512 * 8) + 3 * 1024 * 512)
    assert theory.matmul_flops(config(model=MIXTURE), sizes(expert=4)) == expected
    assert theory.matmul_flops(config(model=MIXTURE), sizes(fsdp=2, expert=2)) == expected


def test_least_traffic_of_experts_by_hand() -> None:
    run = config(model=MIXTURE)
    experts, attention = 3 * 8 * 3 * 512 * 768, 3 * (512 * 512 * 2 + 2 * 512 * 128)
    router, others = 3 * 512 * 8, 1024 * 512 + 3 * 4 * 512 + 2 * 512
    rows = 3 * 16 * 256 / 8 * 2 * 512 * 2  # of all layers, in bfloat16
    found = theory.minimum_wire_bytes(run, sizes(fsdp=2, expert=4))
    # There and back: forward, again, and their gradients. Gradients of all but experts are summed as they are stored.
    assert found["expert"] == 6 * rows * 3 / 4 + 2 * 4 * (attention + router + others) / 2 * 3 / 4
    blocks, stored = 3 * 2 * (attention + experts / 4), 3 * 4 * (router + 3 * 4 * 512)
    assert found["fsdp"] == (blocks + stored + 2 * (2 * 1024 * 512 + 4 * 2 * 512)) / 2
    assert found["tensor"] == found["data"] == found["dcn"] == 0


def test_kernels_by_hand() -> None:
    run = config(jax={"attention": "splash"})
    query = Shape("bf16", (2, 8, 256, 64))
    pairs = 256 * 256  # one block
    kernels = [Kernel("splash_mha_fwd_residuals", (Shape("s8", (1, 1, 1)), query), 3)]
    assert theory.kernel_flops(kernels, run) == 3 * 2 * 2 * 16 * pairs * 64
    with pytest.raises(ValueError, match="'my_kernel' is unknown"):
        theory.kernel_flops([Kernel("my_kernel", (query,), 1)], run)


def test_traffic_is_told_apart_by_axis_and_by_what_is_waited_for() -> None:
    mesh = sizes(data=2, fsdp=2, tensor=2)
    along = {"data": ((0, 4), (1, 5), (2, 6), (3, 7)), "tensor": ((0, 1), (2, 3), (4, 5), (6, 7))}
    collectives = [
        Collective("all-reduce", 10**9, along["data"], 2, hidden=False, place=""),
        Collective("all-reduce", 10**9, ((0, 1),), 1, hidden=False, place="", between_slices=True),
        Collective("all-gather", 10**9, along["tensor"], 4, hidden=True, place=""),
        Collective("all-reduce", 100, ((0, 1, 2, 3, 4, 5, 6, 7),), 1, hidden=False, place=""),
    ]
    found = traffic(collectives, mesh, parse_topology("v5e:2x2", slices=2))
    assert found.by_axis == {"data": 2e9, "tensor": 2e9, "data+fsdp+tensor": 175.0, "dcn": 1e9}
    assert found.by_kind == {"all-reduce": 3e9 + 175, "all-gather": 2e9}
    chip = CHIPS["v5e"]
    assert found.exposed_seconds == pytest.approx(1e9 / chip.dcn_bandwidth + 2e9 / chip.ring_bandwidth)
    assert found.seconds - found.exposed_seconds == pytest.approx(2e9 / chip.ring_bandwidth)


def test_a_step_is_computation_kernels_and_what_is_waited_for() -> None:
    sent = Traffic({}, {}, seconds=2.0, exposed_seconds=0.5)
    kernels = 0.35 * 197e12
    fast, slow = step_seconds(int(3 * 1.5e9), kernels, sent, parse_topology("v5e:2x2"))
    assert (fast, slow) == (pytest.approx(3.5), pytest.approx(4.5))
    assert step_seconds(0, 0.0, sent, parse_topology("v5e:2x2"))[0] == 2.0


# ---------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize("text", ["v5e:3x3", "v5e:4x4x4", "v4:2x2x1", "v5e", "v5e:", "16x16", "v5p:4x4"])
def test_an_unknown_topology_is_refused_with_the_known(text: str) -> None:
    with pytest.raises(InputError, match=r"known are: v5e:\{2x2, .*16x16\}; v5p:\{2x2x1, .*; v6e:"):
        parse_topology(text)


@pytest.mark.parametrize("slices", [0, -1, 10**9])
def test_a_number_of_slices_that_nobody_has_is_refused(slices: int) -> None:
    with pytest.raises(InputError, match=f"--slices {slices} must be at least 1 and at most 1,024"):
        parse_topology("v5e:2x2", slices)


def test_the_first_change_that_fits_is_found_and_what_cannot_be_compiled_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = iter([None, False, True])
    tried: list[RunConfig] = []
    said: list[str] = []

    def made(candidate: RunConfig, topology: Topology, devices: Any) -> Plan:
        tried.append(candidate)
        fits = next(answers)
        if fits is None:
            raise InputError("no such program")
        return Plan(candidate, topology, {}, Compiled(fits, 0, 0, (), None, 0.0), {})

    monkeypatch.setattr(planning, "make_plan", made)
    run = config(jax={"mesh": {"data": 1, "fsdp": 1}, "remat": "none"})
    flags, found = planning.search(run, parse_topology("v5e:2x2"), jax.devices()[:1], said.append)
    assert found.config == tried[2]
    assert len({json.dumps(one.to_dict()) for one in (run, *tried)}) == 4
    assert said[1] == "left out: no such program"
    assert said[3] == "trying " + planning.written(flags)


PLANNED = """
import json, sys
from jax_gpt.cli import main
for arguments in json.loads(sys.argv[1]):
    print(main(arguments))
"""


def plan(tmp_path: Path, topology: str, *configs: dict[str, Any], slices: int = 1) -> subprocess.CompletedProcess[str]:
    """Plans and exit codes, in a process of their own: the TPU compiler leaves settings behind."""
    commands = []
    for number, sections in enumerate(configs):
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump({"model": SMALL, "data": {"streams": 1}} | sections))
        commands.append(["plan", "--config", str(path), "--topology", topology, "--slices", str(slices), "--json"])
    return _python(PLANNED, json.dumps(commands))


def _python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=_environment())


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"PYTHONPATH": path}


def test_without_libtpu_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == "libtpu" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    assert main(["plan", "--config", "gpt-7b", "--topology", "v5e:16x16"]) == 2
    said = capfd.readouterr().err
    assert "pip install 'twingpt[tpu-plan]'" in said
    assert "Traceback" not in said


@needs_libtpu
def test_meshes_that_do_not_fit_the_slice_are_refused(tmp_path: Path) -> None:
    named: dict[str, dict[str, Any]] = {
        "does not multiply to the 4 device": {"jax": {"mesh": {"data": 3}}},
        "n_heads = 2": {"jax": {"mesh": {"data": 1, "fsdp": 1, "tensor": 4}}, "model": MODEL | {"n_heads": 2}},
        "TPUs have no fp64": {"train": {"dtype": "float64"}},
        "train all weights": {"adapter": {"rank": 2}},
    }
    done = plan(tmp_path, "v5e:2x2", *named.values())
    assert done.stdout.split() == ["2", "2", "2", "2"], done.stderr[-2000:]
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 4
    assert all(words in line for words, line in zip(named, said, strict=True)), said
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------- real compilations


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "slices", "mesh"),
    [
        pytest.param("v5e:4x4", 1, {"data": 1, "fsdp": 16}, marks=pytest.mark.slow),
        pytest.param("v5p:2x2x2", 1, {"data": 1, "fsdp": 4, "tensor": 2}, marks=pytest.mark.slow),
        ("v6e:2x2", 2, {"data": 4, "fsdp": 2}),
    ],
)
def test_a_step_is_compiled_for_slices_and_its_costs_are_read(
    topology: str, slices: int, mesh: dict[str, int], tmp_path: Path
) -> None:
    train = {"batch_size": 16, "dtype": "bfloat16"}
    done = plan(tmp_path, topology, {"train": train, "jax": {"mesh": mesh, "remat": "full"}}, slices=slices)
    text, code = done.stdout.rsplit("\n", 2)[:2]
    assert code == "0", done.stderr[-2000:]
    found = json.loads(text)
    assert found["fits"]
    assert found["mesh"] == {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1} | mesh
    assert found["attention"] == "splash"
    assert 0 < found["peak_bytes"] < found["hbm_bytes"]
    assert found["flops"]["matmul"] == pytest.approx(found["flops"]["theory"], rel=0.01)
    assert found["flops"]["kernels"] > 0
    assert 0 < found["flops"]["model"] < found["flops"]["hardware"]
    wire = found["wire_bytes"]
    assert sum(wire["by_kind"].values()) == pytest.approx(sum(wire["by_axis"].values()))
    assert wire["total"] >= 0.99 * wire["minimum_by_axis"]["fsdp"]
    if slices > 1:
        assert wire["by_axis"]["dcn"] == pytest.approx(wire["minimum_by_axis"]["dcn"], rel=0.02)
        assert wire["by_axis"]["data"] == pytest.approx(wire["minimum_by_axis"]["data"], rel=0.05)
    else:
        assert "dcn" not in wire["by_axis"]
    low, high = found["predicted_step_seconds"]
    assert 0 < low <= high
    assert 0 < found["mfu"][0] <= found["mfu"][1] < 1


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("topology", "kind"), [("v5p:2x2x2", "ragged-all-to-all"), ("v5e:2x4", "all-to-all")])
def test_a_mixture_multiplies_and_sends_what_it_must(topology: str, kind: str, tmp_path: Path) -> None:
    model = SMALL | {name: MIXTURE[name] for name in ("activation", "gated_mlp", "n_experts", "experts_per_token")}
    sections = {
        "model": model | {"expert_dim": 384, "n_experts": 8},
        "train": {"batch_size": 16, "dtype": "bfloat16"},
        "jax": {"mesh": {"data": 1, "expert": 8}, "remat": "full"},
    }
    done = plan(tmp_path, topology, sections)
    text, code = done.stdout.rsplit("\n", 2)[:2]
    assert code == "0", done.stderr[-2000:]
    found = json.loads(text)
    experts = 2 * 8 * 3 * 256 * 384  # of both layers
    assert found["parameters"] - found["active_parameters"] == experts * 6 / 8
    flops, wire = found["flops"], found["wire_bytes"]
    assert flops["grouped"] == pytest.approx(flops["grouped_theory"], rel=0.01)
    assert flops["matmul"] == pytest.approx(flops["theory"], rel=0.01)
    assert flops["hardware"] == flops["matmul"] + flops["grouped"] + flops["kernels"]
    assert wire["by_kind"][kind] > 0
    assert 0.99 <= wire["by_axis"]["expert"] / wire["minimum_by_axis"]["expert"] <= 1.1


WITH_EFFORTS = """
import json, sys
from gpt_core.runs.config import RunConfig
from jax_gpt.plan import compiled, plan
from jax_gpt.plan.topology import parse_topology
from jax_gpt.sharding import create_mesh
topology = parse_topology("v5e:2x2", 1)
devices = topology.devices()
config = RunConfig.from_dict(json.loads(sys.argv[1]))
compile_step = compiled.compile_step
for effort in (compiled.LITTLE_EFFORT, {}):
    plan.compile_step = lambda config, mesh: compile_step(config, mesh, effort=effort)
    found = plan.make_plan(config, topology, devices).to_dict()
    print(json.dumps({name: value for name, value in found.items() if name != "compile_seconds"}))
compiled.compile_step = lambda config, mesh, effort: print(json.dumps(effort))
compile_step(config, create_mesh(config.jax.mesh, devices), effort={"xla_tpu_no_such_option": True})
"""
# Of so wide a step cycles change with options that leave those of smaller ones alone (`xla_jf_llo_level`).
WIDE = {"vocab_size": 32000, "context_length": 2048, "embed_dim": 8192, "n_layers": 1, "n_heads": 64, "head_dim": 128}
WIDE |= {"mlp_dim": 43008, "position": "rope", "bias": False}


@needs_libtpu
@pytest.mark.slow
def test_the_compilers_effort_on_machine_code_changes_no_plan() -> None:
    """And a compiler that does not know an option of it is asked again without."""
    planned = config(model=WIDE, train={"batch_size": 16, "dtype": "bfloat16"}, jax={"mesh": {"data": 1, "fsdp": 4}})
    done = _python(WITH_EFFORTS, json.dumps(planned.to_dict()))
    assert done.returncode == 0, done.stderr[-2000:]
    little, full, again = map(json.loads, done.stdout.splitlines()[-3:])
    assert little["predicted_step_seconds"][0] > 0
    assert full == little
    assert again == {}


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_is_named_and_a_change_that_compiles_is_found(tmp_path: Path) -> None:
    sections = {
        "train": {"batch_size": 16, "dtype": "bfloat16"},
        "jax": {"mesh": {"data": 1, "fsdp": 4}, "remat": "none", "loss_chunk": 256},
        # One loop, whose memory grows and whose program does not; heads that no other mesh divides.
        "model": SMALL | {"n_layers": 1600, "n_heads": 1, "n_kv_heads": 1, "head_dim": 256},
    }
    done = plan(tmp_path, "v5e:2x2", sections)
    text, code = done.stdout.rsplit("\n", 2)[:2]
    assert code == "1", done.stderr[-2000:]
    found = json.loads(text)
    assert not found["fits"]
    assert found["flops"] is None  # no machine code was made
    assert found["peak_bytes"] > 15 * GIB
    assert found["largest_buffers"][0]["bytes"] > GIB
    suggestion = found["suggestion"]
    assert suggestion["plan"]["fits"]
    flags = [word for name, value in suggestion["flags"].items() for word in (f"--{name}", str(value))]
    assert flags
    assert all(flag in suggestion["command"] for flag in flags)
