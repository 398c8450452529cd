"""Records of any model, and comparing them by a map of names."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from gpt_core.errors import InputError
from parity.api import OUTPUT, Names, Record, compare, load_record, record_nnx, record_torch
from parity.records.file import write_record

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "compare_convnets.py"
PAGE, RECORDS_PAGE = ROOT / "docs" / "parity.md", ROOT / "docs" / "records.md"


class FlaxMLP(nnx.Module):
    """Three layers, the second shared by two calls."""

    def __init__(self) -> None:
        options = {"rngs": nnx.Rngs(0), "bias_init": nnx.initializers.normal(1.0)}
        self.layers = nnx.List([nnx.Linear(5, 6, **options), nnx.Linear(6, 6, **options)])
        self.head = nnx.Linear(6, 3, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(self.layers[0](x))
        x = jnp.tanh(self.layers[1](x))
        x = jnp.tanh(self.layers[1](x))
        return self.head(x)


class TorchMLP(nn.Module):
    """The same, as a person who ports it would name things."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 6)
        self.middle = nn.Linear(6, 6)
        self.act = nn.Tanh()
        self.out = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.inner(x))
        x = self.act(self.middle(x))
        x = self.act(self.middle(x))
        return self.out(x)


NAMES: Names = {"layers.0": "inner", "layers.1": "middle", "layers.1#2": "middle#2", "head": "out"}
X = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)


def ported(flax: FlaxMLP) -> TorchMLP:
    model = TorchMLP()
    for ours, theirs in ((model.inner, flax.layers[0]), (model.middle, flax.layers[1]), (model.out, flax.head)):
        ours.weight.data = torch.tensor(np.array(theirs.kernel[...]).T)
        ours.bias.data = torch.tensor(np.array(theirs.bias[...]))
    return model


@pytest.fixture(autouse=True)
def full_precision() -> Any:
    with jax.default_matmul_precision("highest"):
        yield


# ------------------------------------------------------------------------------------------------------- recording


def test_sites_stand_in_the_order_of_the_calls_and_repeated_calls_are_numbered() -> None:
    flax = FlaxMLP()
    assert list(record_nnx(flax, X).sites) == ["layers.0", "layers.1", "layers.1#2", "head", OUTPUT]
    assert list(record_torch(ported(flax), X).sites) == [
        *("inner", "act", "middle", "act#2", "middle#2", "act#3", "out"),
        OUTPUT,
    ]


def test_what_is_recorded_is_what_the_submodules_return() -> None:
    flax = FlaxMLP()
    sites = record_nnx(flax, X, sites=["head", "layers.0"]).sites
    assert list(sites) == ["layers.0", "head", OUTPUT]
    np.testing.assert_array_equal(sites["layers.0"], flax.layers[0](X))
    np.testing.assert_array_equal(sites[OUTPUT], flax(X))


def test_recording_leaves_the_models_as_they_were() -> None:
    flax = FlaxMLP()
    model = ported(flax)
    before = {found: dict(vars(found)) for found in (nnx.Linear, FlaxMLP, nnx.List)}
    record_nnx(flax, X)
    with pytest.raises(TypeError):
        record_nnx(flax, X[:, :3])  # too narrow
    record_torch(model, X)
    with pytest.raises(RuntimeError):
        record_torch(model, X[:, :3])
    assert {found: dict(vars(found)) for found in before} == before
    assert not any(child._forward_hooks for child in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_inherited_calls_are_recorded_once() -> None:
    class Doubled(nnx.Linear):
        def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
            return 2 * super().__call__(x)

    class Plain(nnx.Linear):
        pass

    class Net(nnx.Module):
        def __init__(self) -> None:
            self.a, self.b, self.c = (kind(5, 5, rngs=nnx.Rngs(0)) for kind in (Doubled, Plain, nnx.Linear))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.c(self.b(self.a(x)))

    net = Net()
    record = record_nnx(net, X)
    assert list(record.sites) == ["a", "b", "c", OUTPUT]
    np.testing.assert_array_equal(record.sites["a"], net.a(X))
    assert "__call__" not in vars(Plain)


def test_an_in_place_operation_does_not_reach_what_was_recorded_before_it() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(inplace=True))
    record = record_torch(model, X)
    np.testing.assert_array_equal(record.sites["0"], model[0](torch.tensor(X)).detach())
    assert (record.sites["0"] < 0).any()


def test_several_outputs_are_several_sites_and_inputs_may_be_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(5, 2, batch_first=True)

        def forward(self, x: torch.Tensor, scale: float) -> dict[str, torch.Tensor]:
            return {"y": scale * self.rnn(x)[0]}

    record = record_torch(Net(), {"x": X[None], "scale": 2.0})
    assert list(record.sites) == ["rnn[0]", "rnn[1][0]", "rnn[1][1]", "(output)[y]"]
    with pytest.raises(InputError, match=re.escape("(output)[y]")):
        _ = record.output


def test_bf16_keeps_its_dtype_and_its_bits_through_a_file(tmp_path: Path) -> None:
    linear = nn.Linear(5, 3).to(torch.bfloat16)
    record = record_torch(nn.Sequential(linear), torch.tensor(X, dtype=torch.bfloat16))
    assert record.output.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
        record.output.astype(np.float32), linear(torch.tensor(X, dtype=torch.bfloat16)).float().detach()
    )
    record.save(tmp_path / "a.npz")
    loaded = load_record(tmp_path / "a.npz")
    assert list(loaded.sites) == list(record.sites)
    assert loaded.output.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(loaded.output.view(np.int16), record.output.view(np.int16))
    assert compare(loaded, record).passed


@pytest.mark.parametrize(
    ("sites", "words"),
    [
        (["heads"], "'heads' is no submodule of this jax model (did you mean 'head'?)"),
        (["encoder"], "'encoder' is no submodule of this jax model (there are: head, layers.0, "),
        ("head", "must be a list of paths"),
        (["layers"], "'layers' did not run"),
    ],
)
def test_sites_that_cannot_be_recorded_are_refused(sites: Any, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        record_nnx(FlaxMLP(), X, sites=sites)


def test_a_submodule_inside_jit_is_refused_and_not_left_out() -> None:
    class Net(nnx.Module):
        def __init__(self) -> None:
            self.inner = nnx.Linear(5, 5, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return jax.jit(lambda x: self.inner(x))(x)

    with pytest.raises(InputError, match="inside a transformation"):
        record_nnx(Net(), X)


def test_an_input_that_jax_would_round_is_refused_and_ids_are_not() -> None:
    with pytest.raises(InputError, match="an input is float64, which JAX would turn into float32"):
        record_nnx(FlaxMLP(), X.astype(np.float64))
    embedding = nnx.Embed(7, 3, rngs=nnx.Rngs(0))
    ids = np.arange(7, dtype=np.int64)
    np.testing.assert_array_equal(record_nnx(embedding, ids).output, embedding.embedding[...])
    with pytest.raises(InputError, match="an input is int64"):
        record_nnx(embedding, ids + 2**40)


# -------------------------------------------------------------------------------------------------------- comparing


def test_a_good_port_agrees_at_every_named_site() -> None:
    flax = FlaxMLP()
    found = compare(record_nnx(flax, X), record_torch(ported(flax), X), NAMES)
    assert found.passed
    assert list(found.differences) == [*NAMES, OUTPUT]
    assert "all 5 sites agree" in str(found)
    assert "layers.0 = inner" in str(found)


def test_the_first_site_that_differs_is_named() -> None:
    flax = FlaxMLP()
    model = ported(flax)
    model.middle.weight.data = model.middle.weight.data.T.clone()  # the usual mistake with a square matrix
    found = compare(record_nnx(flax, X), record_torch(model, X), NAMES)
    assert not found.passed
    assert found.divergence is not None
    assert (found.divergence.site, found.divergence.before) == ("layers.1", "layers.0")
    assert found.divergence.relative_error > 0.1
    assert found.divergence.error_before < 1e-6
    assert "first differs at layers.1" in str(found)


def test_nan_differs_even_from_nan() -> None:
    record = Record({"a": np.array([1.0, np.nan]), OUTPUT: np.ones(1)}, "torch")
    found = compare(record, record)
    assert found.divergence is not None
    assert (found.divergence.site, found.divergence.worst_index) == ("a", (1,))


def test_a_bound_may_be_given_and_otherwise_follows_the_coarsest_dtype() -> None:
    rough = Record({OUTPUT: np.array([1.0, 2.0], ml_dtypes.bfloat16)}, "jax")
    exact = Record({OUTPUT: np.array([1.01, 2.0])}, "torch")
    assert compare(rough, exact).passed
    assert not compare(rough, exact, tolerance=1e-3).passed
    half = Record({OUTPUT: np.ones(2, np.float16)}, "torch")
    with pytest.raises(InputError, match="no bound for float16; give a tolerance"):
        compare(half, half)


@pytest.mark.parametrize("layout", ["b c h w -> b h w c", lambda x: x.transpose(0, 2, 3, 1)])
def test_axes_in_another_order_are_compared_by_a_layout(layout: Any) -> None:
    image = np.random.default_rng(0).normal(size=(2, 4, 5, 3)).astype(np.float32)
    conv = nnx.Conv(3, 6, (3, 3), rngs=nnx.Rngs(0))
    twin = nn.Conv2d(3, 6, 3, padding=1)
    twin.weight.data = torch.tensor(np.array(conv.kernel[...]).transpose(3, 2, 0, 1).copy())
    twin.bias.data = torch.zeros(6)
    a, b = record_nnx(conv, image), record_torch(twin, image.transpose(0, 3, 1, 2))
    assert compare(a, b, {OUTPUT: (OUTPUT, layout)}).passed
    with pytest.raises(InputError, match=re.escape("give ('(output)', \"a b c d -> a c d b\")")):
        compare(a, b)


A = Record({"x": np.ones((2, 3)), "y": np.ones(4), OUTPUT: np.ones(1)}, "jax")
B = Record({"u": np.ones((2, 3)), "v": np.ones(5), OUTPUT: np.ones(1)}, "torch")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"z": "u"}, ["'z' is no site of a (there are: x, y, (output))"]),
        ({"x": "w"}, ["'w' is no site of b (there are: u, v, (output))"]),
        ({"x": "u", "y": "u"}, ["'u' of b is the partner of both 'x' and 'y'"]),
        ({"x": "u", "y": "v"}, ["'y' has shape [4] and 'v' has [5]"]),
        ({"x": ("u", "a b c -> c b a")}, ["the layout of 'u' fails on [2, 3]"]),
        ({"x": ("u", lambda x: x[7])}, ["the layout of 'u' fails on [2, 3]"]),
        ({"x": ("u", lambda x: x.T)}, ["'x' has shape [2, 3] and 'u' has [3, 2]"]),
        ({"z": "u", "x": "w"}, ["'z' is no site of a", "'w' is no site of b"]),
        (None, ["'u' is no site of a", "'x' is no site of b"]),
    ],
)
def test_names_that_do_not_match_are_refused_all_in_one_message(names: Any, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        compare(A, B, names)
    assert str(caught.value).startswith("the names do not fit: ")
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_comparison_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="nothing is compared"):
        compare(Record({"x": np.ones(1)}, "jax"), Record({"x": np.ones(1)}, "jax"), {}, tolerance=1.0)


def test_a_record_of_a_checkpoint_is_refused(tmp_path: Path) -> None:
    write_record(tmp_path / "a.npz", {"kind": "checkpoint"}, [])
    with pytest.raises(InputError, match="`parity compare`"):
        load_record(tmp_path / "a.npz")


# ------------------------------------------------------------------------------------------------------- the example


def test_the_example_finds_the_forgotten_flatten_order() -> None:
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, check=True)
    wrong, right = done.stdout.split("\n\n")
    assert "first differs at 4:" in wrong
    assert "all 4 sites agree" in right


def test_the_page_shows_the_example_as_it_is() -> None:
    code = EXAMPLE.read_text().split('"""\n\n', 1)[1].split("\n\nif __name__")[0].strip()
    assert code in PAGE.read_text()


def test_the_example_of_reading_a_record_runs_as_written(tmp_path: Path) -> None:
    block = next(b for b in re.findall(r"```python\n(.*?)```", RECORDS_PAGE.read_text(), re.DOTALL) if "np.load(" in b)
    arrays = {"tokens": np.ones((1, 2), np.int64), "logits": np.ones((1, 2, 3)), "site:embedding": np.ones((1, 2, 4))}
    write_record(tmp_path / "jax.npz", {"dtype": "float32", "config": {}}, arrays.items())
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout
    assert json.loads(str(np.load(tmp_path / "jax.npz")["metadata"]))["dtype"] == "float32"
