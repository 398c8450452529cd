"""Rows of several documents in both twins: models and steps make of them what they make of each document alone."""

import functools
import itertools

import numpy as np
import numpy_gpt
import pytest

from gpt_core.config import ModelConfig
from gpt_core.formats.safetensors_torch import SPOKE
from gpt_core.parameters import parameter_table
from gpt_core.runs.config import RunConfig
from gpt_core.sites import model_sites
from gpt_core.storage.weights import decode, weights_source
from parity.comparison.null_leaves import compared, null_leaves
from parity.sides import side_of
from parity.sides.runs import Batch

# Shorter and longer than the window of 4; the longest than a block of `banded`, where that is made small.
ROWS = [(3, 12, 5), (12, 5, 3)]
TIME, WINDOW, VOCAB = 20, 4, 31
SIZES = {"vocab_size": VOCAB, "context_length": TIME, "n_heads": 4, "n_kv_heads": 2, "embed_dim": 16}
MODELS = {
    "learned, full": {"n_layers": 2, "position": "learned"},
    "learned, window": {"n_layers": 2, "position": "learned", "sliding_window": WINDOW},
    "rope, full": {"n_layers": 2, "position": "rope"},
    "rope, window": {"n_layers": 2, "position": "rope", "sliding_window": WINDOW},
    "rope, pattern": {"n_layers": 3, "position": "rope", "sliding_window": WINDOW, "attention_pattern": "LG"},
}


@pytest.fixture
def small_blocks(monkeypatch):
    for package in ("jax_gpt", "torch_gpt"):
        for name, size in {"QUERY_BLOCK": 4, "KEY_BLOCK": 8, "KEY_MULTIPLE": 4, "FULL_BLOCK": 8}.items():
            monkeypatch.setattr(f"{package}.banded.{name}", size)


def weights_of(config):
    random = np.random.default_rng(0)
    return {name: random.normal(size=row.shape) / 4 + row.mean for name, row in parameter_table(config).items()}


def tokens():
    return np.random.default_rng(1).integers(0, VOCAB, (len(ROWS), TIME))


def documents():
    """Row, first position and the one behind the last of each."""
    return [(row, sum(lengths[:i]), sum(lengths[: i + 1])) for row, lengths in enumerate(ROWS) for i in range(3)]


def what_comes_next(ids):
    """Of one document: all but its last position have a token to predict."""
    return Batch(np.roll(ids, -1, axis=1), np.arange(ids.shape[1])[None] < ids.shape[1] - 1)


def packed():
    """The documents in their rows, written without the code under test."""
    targets, mask = np.roll(tokens(), -1, axis=1), np.ones((len(ROWS), TIME), bool)
    for row, _, end in documents():
        mask[row, end - 1] = False
    return tokens(), Batch(targets, mask, numpy_gpt.segments_of(ROWS))


@functools.cache
def alone(name):
    """Logits of every document by itself, out of NumPy, and the gradients of their mean loss, out of PyTorch."""
    config, side = ModelConfig(**SIZES | MODELS[name]), side_of("torch")
    weights = weights_of(config)
    model = side.build(config, weights_source(weights), "float64")
    logits, sums = np.zeros((len(ROWS), TIME, VOCAB)), {}
    for row, start, end in documents():
        ids = tokens()[row : row + 1, start:end]
        logits[row, start:end] = numpy_gpt.forward(config, weights, ids)["logits"][0]
        gradients = side.run(model, ids, what_comes_next(ids), trace=False).gradients
        share = (end - start - 1) / packed()[1].mask.sum()
        sums = {leaf: sums.get(leaf, 0) + share * gradient for leaf, gradient in gradients.items()}
    return logits, sums


@pytest.mark.parametrize(
    ("framework", "name", "options"),
    [
        *(("torch", name, {"implementation": which}) for name in MODELS for which in ("reference", "banded", "sdpa")),
        ("jax", "learned, window", {"implementation": "banded"}),
        ("jax", "rope, pattern", {"implementation": "reference", "scan_layers": False}),
        *(  # JAX compiles for longer: each model and each implementation once more, and not all of their pairs
            pytest.param("jax", name, {"implementation": which}, marks=pytest.mark.slow)
            for name, which in zip(MODELS, itertools.cycle(["reference", "banded"]), strict=False)
        ),
    ],
)
def test_a_model_makes_of_each_document_what_it_makes_of_it_alone(framework, name, options, x64, small_blocks):
    config, side = ModelConfig(**SIZES | MODELS[name]), side_of(framework)
    model = side.build(config, weights_source(weights_of(config)), "float64", **options)
    together = side.run(model, *packed())
    assert together.sites.keys() == set(model_sites(config))
    logits, gradients = alone(name)
    assert numpy_gpt.relative_error(together.logits, logits) <= 1e-12
    null = null_leaves(config)
    found, expected = compared(together.gradients, null), compared(gradients, null)
    assert found.keys() == expected.keys()
    for leaf in expected:
        assert numpy_gpt.relative_error(found[leaf], expected[leaf]) <= 1e-11, leaf


# That drops nothing, so that its path can be compared: in JAX each row then has a key of its own.
DROPOUT = 1e-14


def config_of(framework, name, dropout, section):
    return RunConfig.from_dict(
        {
            "model": SIZES | MODELS[name] | {"dropout": dropout},
            "train": {"batch_size": len(ROWS), "accumulation": 2, "context_length": TIME, "dtype": "float64"},
            "data": {"streams": 1},
            framework: {"loss_chunk": 32} | section,
        }
    )


def rows():
    ids, batch = packed()
    arrays = {"tokens": ids, "targets": batch.targets, "segments": batch.segments}
    return {name: array.astype(np.int32) for name, array in arrays.items()} | {"mask": batch.mask}


def jax_step(config):
    import jax

    """Initial weights, and the losses of evaluation and of a step."""
    from flax import nnx

    from jax_gpt.sharding import create_mesh, place_batch
    from jax_gpt.step import create_program
    from parity.sides.jax_side import weights_of

    mesh = create_mesh(config.jax.mesh)
    program, batch = create_program(config, mesh), place_batch(rows(), mesh, len(ROWS))
    state = program.create()
    weights = weights_of(nnx.merge(program.graph, state.parameters))
    evaluated = program.evaluate(state.parameters, batch)
    state, trained = program.step(state, batch, np.float64(1e-2))
    before = jax.tree.map(np.array, (state.parameters, state.moments))
    empty = place_batch(without_targets(), mesh, len(ROWS))
    state, nothing = program.step(state, empty, np.float64(1e-2))
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), before, (state.parameters, state.moments))
    assert all(jax.tree.leaves(same))
    return weights, evaluated, trained, nothing


def without_targets():
    batch = rows()
    return batch | {"mask": np.zeros_like(batch["mask"])}


def torch_step(config):
    from torch_gpt.distributed import connect
    from torch_gpt.parallel import place_batch
    from torch_gpt.step import create_program

    program = create_program(config, connect())
    batch = place_batch(rows(), program.device)
    names = {name: parameter.detach().numpy().copy() for name, parameter in program.state.parameters.items()}
    weights = decode(names, config.model, SPOKE, "the model")
    evaluated, (state, trained) = program.evaluate(batch), program.step(program.state, batch, 1e-2)
    before = {name: parameter.detach().clone() for name, parameter in state.parameters.items()}
    moments = {name: state.optimizer.state[p]["exp_avg"].clone() for name, p in state.parameters.items()}
    _, nothing = program.step(state, place_batch(without_targets(), program.device), 1e-2)
    assert all(before[name].equal(parameter) for name, parameter in state.parameters.items())
    assert all(moments[name].equal(state.optimizer.state[p]["exp_avg"]) for name, p in state.parameters.items())
    return weights, evaluated, trained, nothing


@pytest.mark.parametrize(
    ("framework", "name", "dropout", "section"),
    [
        ("torch", "rope, pattern", DROPOUT, {"attention": "banded"}),
        ("torch", "learned, full", 0.0, {"attention": "auto", "remat": "full"}),
        ("jax", "learned, full", DROPOUT, {"attention": "reference", "remat": "full"}),
        pytest.param("jax", "rope, pattern", 0.0, {"attention": "banded"}, marks=pytest.mark.slow),
    ],
)
def test_a_step_has_the_loss_of_the_documents_alone(framework, name, dropout, section, x64, small_blocks):
    """In two micro-batches, and in evaluation; NumPy reads one document after the other. Without a target nothing
    changes."""
    config = config_of(framework, name, dropout, section)
    weights, (evaluated, counted), trained, nothing = {"jax": jax_step, "torch": torch_step}[framework](config)
    expected, count = 0.0, 0
    for row, start, end in documents():
        ids = tokens()[row : row + 1, start:end]
        logits = numpy_gpt.forward(config.model, weights, ids)["logits"][0, :-1]
        chosen = logits[np.arange(len(logits)), ids[0, 1:]]
        expected += (np.log(np.exp(logits).sum(-1)) - chosen).sum()
        count += len(logits)
    assert float(counted) == count
    assert float(evaluated) == pytest.approx(expected, rel=1e-12)
    assert float(trained["loss"]) == pytest.approx(expected / count, rel=1e-12)
    assert (float(trained["targets"]), float(nothing["targets"])) == (count, 0)
