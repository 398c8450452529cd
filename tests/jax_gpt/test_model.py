import math
import re
from dataclasses import dataclass, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpy_gpt
import pytest
from flax import nnx
from numpy_gpt import CONFIGS, TIME, VARIANTS, random_tokens, random_weights, relative_error

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.parameters import Parameter, block_table, parameter_table
from gpt_core.precision import Precision
from gpt_core.sites import model_sites
from jax_gpt.layers import Norm, dropout
from jax_gpt.model import GPT, initialiser
from jax_gpt.rotary import rotate
from jax_gpt.scan import stretches
from jax_gpt.taps import Taps

FP64 = Precision.of("float64")
FORMS = pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])


def build(
    config: ModelConfig, weights: dict[str, np.ndarray], precision: Precision = FP64, scan_layers: bool = True
) -> GPT:
    def create(parameter: Parameter) -> jax.Array:
        whole = weights[parameter.name]
        array = whole if parameter.layer is None else whole[parameter.layer]
        return jnp.array(array.astype(precision.param_dtype))

    return GPT(config, create, precision=precision, scan_layers=scan_layers)


def tokens_of(config: ModelConfig) -> jax.Array:
    return jnp.array(random_tokens(config), "int32")


def state_of(model: GPT) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(variable[...]) for path, variable in flat}


@dataclass(frozen=True)
class Run:
    """What one model gives: computed once, looked at from several sides."""

    config: ModelConfig
    truth: dict[str, np.ndarray]
    logits: np.ndarray
    taps: dict[str, np.ndarray]
    unrolled: np.ndarray  # logits of the unrolled form, without taps
    sensitivity: (
        np.ndarray | None
    )  # of the twelve variants, [time, time]: how much the logits at t move with the embedding at s


@pytest.fixture(scope="module", params=CONFIGS)
def run(request: pytest.FixtureRequest) -> Run:
    """Two programs for each config: compiling is what costs time."""
    config = CONFIGS[request.param]
    weights, tokens = random_weights(config), random_tokens(config)

    @nnx.jit
    def scanned(model: GPT, tokens: jax.Array) -> tuple[Taps, jax.Array | None]:
        taps: Taps = {}
        model(tokens, taps=taps)
        return taps, sensitivity(model, tokens) if request.param in VARIANTS else None

    with jax.enable_x64(True):
        taps, moved = scanned(build(config, weights), jnp.array(tokens))
        unrolled = call(build(config, weights, scan_layers=False), jnp.array(tokens))
        return Run(
            config,
            numpy_gpt.forward(config, weights, tokens),
            np.asarray(taps["logits"]),
            {site: np.asarray(value) for site, value in taps.items()},
            np.asarray(unrolled),
            None if moved is None else np.asarray(moved),
        )


@nnx.jit
def call(model: GPT, tokens: jax.Array) -> jax.Array:
    return model(tokens)


def sensitivity(model: GPT, tokens: jax.Array) -> jax.Array:
    random = np.random.default_rng(0).normal(size=model.config.vocab_size)
    logits, pull_back = jax.vjp(
        lambda x: model.unembed(model.final_norm(model.run_blocks(x, None, None))), model.embed(tokens)
    )
    cotangents = np.einsum("tu,v->tuv", np.eye(TIME), random)[:, None]  # one position at a time
    (gradients,) = jax.vmap(pull_back)(jnp.array(np.broadcast_to(cotangents, (TIME, *logits.shape))))
    return jnp.abs(gradients).max(axis=(1, 3))  # from [t, batch, s, embed]


def test_logits_are_those_of_an_independent_model(run: Run) -> None:
    assert run.logits.shape == (numpy_gpt.BATCH, TIME, run.config.vocab_size)
    assert relative_error(run.logits, run.truth["logits"]) <= 1e-12


def test_unrolled_blocks_without_taps_give_the_numbers_of_scanned_ones_with_taps(run: Run) -> None:
    assert relative_error(run.unrolled, run.logits) <= 1e-13


def test_taps_have_the_values_of_an_independent_model(run: Run) -> None:
    assert set(run.taps) == set(run.truth)
    for site, value in run.taps.items():
        assert relative_error(value, run.truth[site]) <= 1e-12, site


def test_taps_of_unrolled_blocks_have_the_values_of_an_independent_model(x64: None) -> None:
    config = VARIANTS["rope-gqa-window"]
    weights, tokens = random_weights(config), random_tokens(config)

    @nnx.jit
    def trace(model: GPT, tokens: jax.Array) -> Taps:
        taps: Taps = {}
        model(tokens, taps=taps)
        return taps

    taps = trace(build(config, weights, scan_layers=False), jnp.array(tokens))
    for site, expected in numpy_gpt.forward(config, weights, tokens).items():
        assert relative_error(taps[site], expected) <= 1e-12, site


@FORMS
@pytest.mark.parametrize("name", ["rope-gqa-window", "learned-gqa-full"])
def test_taps_are_the_sites_in_the_order_of_the_data(name: str, scan_layers: bool) -> None:
    config = CONFIGS[name]
    model = build(config, random_weights(config), Precision(), scan_layers)
    order: list[str] = []

    def forward(tokens: jax.Array) -> None:
        taps: Taps = {}
        model(tokens, taps=taps)
        order.extend(taps)  # a traced function would give a dictionary back in another order

    jax.eval_shape(forward, tokens_of(config))
    assert order == model_sites(config)


@pytest.mark.parametrize("run", VARIANTS, indirect=True)
def test_causality(run: Run) -> None:
    """Logits at t (1) do not move with embeddings after t, (2) do with the one at t and with every one before it
    that the windows of all layers reach, (3) do not with any beyond that."""
    expected = numpy_gpt.reach(run.config)
    assert (run.sensitivity[~expected] == 0).all()
    assert (run.sensitivity[expected] > 1e-9).all()


@pytest.mark.parametrize("name", ["learned-mha-window", "rope-gqa-window"])
def test_window_excludes_the_key_one_past_its_edge(name: str, x64: None) -> None:
    """In one layer the key at distance W - 1 is seen and the one at distance W is not."""
    config = replace(VARIANTS[name], n_layers=1)
    model = build(config, random_weights(config))
    found = np.asarray(nnx.jit(sensitivity)(model, jnp.array(random_tokens(config))))
    window = numpy_gpt.WINDOW
    assert (np.diagonal(found, -(window - 1)) > 1e-9).all()
    assert (np.diagonal(found, -window) == 0).all()


@pytest.mark.parametrize(
    ("kinds", "period", "expected"),
    [
        ("GGGG", 1, [("G", 0, 4)]),
        ("LLGLLGL", 3, [("LLG", 0, 2), ("L", 6, 1)]),
        ("LGL", 2, [("LG", 0, 1), ("L", 2, 1)]),
        ("GGLLL", 5, [("G", 0, 2), ("L", 2, 3)]),
        ("GGGNGGGN", 4, [("GGGN", 0, 2)]),
        ("LLLLLLLG", 8, [("L", 0, 7), ("G", 7, 1)]),
    ],
)
def test_layers_are_cut_into_scans_that_compile_the_fewest_blocks(
    kinds: str, period: int, expected: list[tuple[str, int, int]]
) -> None:
    found = stretches(kinds, period)
    assert [tuple(segment) for segment in found] == expected
    assert "".join(segment.kinds * segment.turns for segment in found) == kinds


@pytest.mark.parametrize("pattern", [None, "LLG", "GGLLLLLLLLLL"])
def test_the_program_does_not_grow_with_depth(pattern: str | None) -> None:
    def size(n_layers: int) -> int:
        cut = pattern and (pattern if len(pattern) < 12 else pattern + "L" * (n_layers - 12))
        config = replace(
            CONFIGS["llama"], n_layers=n_layers, sliding_window=4, attention_pattern=cut, rope_scaling=None
        )
        model = nnx.eval_shape(lambda: GPT(config, initialiser(0)))
        return str(jax.make_jaxpr(lambda model, tokens: model(tokens))(model, tokens_of(config))).count("dot_general")

    assert size(12) == size(48)


def test_taps_that_are_off_leave_nothing_in_the_program() -> None:
    """The scan over blocks carries the residual stream and stacks nothing."""
    config = VARIANTS["rope-gqa-window"]
    model = build(config, random_weights(config), Precision())
    jaxpr = jax.make_jaxpr(lambda tokens: model(tokens))(tokens_of(config))
    (scan,) = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    assert [variable.aval.shape for variable in scan.outvars] == [(numpy_gpt.BATCH, TIME, config.embed_dim)]
    assert len(jaxpr.out_avals) == 1


@pytest.mark.parametrize("name", ["rope-gqa-window", "gemma-3"])
def test_gradients_of_scanned_and_unrolled_blocks_are_the_same(name: str, x64: None) -> None:
    config = CONFIGS[name]
    weights, tokens = random_weights(config), tokens_of(config)
    cotangent = jnp.array(np.random.default_rng(0).normal(size=(*tokens.shape, config.vocab_size)))
    gradients = []
    for scan_layers in (True, False):
        graph, state = nnx.split(build(config, weights, scan_layers=scan_layers))
        loss = jax.jit(lambda state, graph=graph: (nnx.merge(graph, state)(tokens) * cotangent).sum())
        gradient = jax.grad(loss)(state)
        gradients.append(state_of(nnx.merge(graph, gradient)))
    scanned, unrolled = gradients
    for name, row in parameter_table(config).items():
        layers = [name.replace("blocks.", f"blocks.{layer}.") for layer in range(config.n_layers)]
        expected = np.stack([unrolled[layer] for layer in layers]) if row.stacked else unrolled[name]
        assert relative_error(scanned[name], expected) <= 1e-12, name


@FORMS
@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_table(name: str, scan_layers: bool) -> None:
    config = CONFIGS[name]
    table = parameter_table(config)
    expected = {key: row.shape for key, row in table.items() if scan_layers or not row.stacked}
    if not scan_layers:
        for layer in range(config.n_layers):
            block = block_table(table, layer)
            expected |= {key.replace("blocks.", f"blocks.{layer}."): row.shape for key, row in block.items()}

    model = build(config, random_weights(config), Precision(), scan_layers)
    found = {key: value.shape for key, value in state_of(model).items()}
    assert found == expected


def test_the_model_keeps_nothing_but_parameters() -> None:
    model = build(CONFIGS["untied"], random_weights(CONFIGS["untied"]), Precision())
    assert all(isinstance(variable, nnx.Param) for _, variable in nnx.to_flat_state(nnx.state(model)))


@cache
def fresh(config: ModelConfig, seed: int, scan_layers: bool = True) -> GPT:
    """As one program: operation by operation every shape would be compiled for itself."""
    return nnx.jit(lambda: GPT(config, initialiser(seed), scan_layers=scan_layers))()


INIT = ModelConfig(vocab_size=300, context_length=200, n_layers=3, n_heads=4, n_kv_heads=2, embed_dim=64)


@pytest.mark.parametrize("config", [INIT, replace(INIT, tied_embeddings=False, init_std=0.3)])
def test_fresh_weights_have_the_distribution_of_the_table(config: ModelConfig) -> None:
    """Mean, deviation and the share beyond two deviations (4.55% of a normal), each within five standard errors."""
    state = state_of(fresh(config, 5))
    for name, row in parameter_table(config).items():
        for values in state[name] if row.stacked else [state[name]]:
            if row.std == 0:
                assert (values == row.mean).all(), name
                continue
            n = values.size
            assert abs(values.mean(dtype="float64") - row.mean) < 5 * row.std / math.sqrt(n), name
            assert abs(values.std(dtype="float64") / row.std - 1) < 5 / math.sqrt(2 * n), name
            assert abs((np.abs(values) > 2 * row.std).mean() - 0.0455) < 5 * math.sqrt(0.0455 * 0.9545 / n), name


def test_fresh_weights_follow_the_seed_and_differ_between_parameters_and_blocks() -> None:
    table = parameter_table(INIT)
    drawn = []
    for state in (state_of(fresh(INIT, 5)), state_of(fresh(INIT, 6))):
        random = [name for name, row in table.items() if row.std]
        blocks = [block for name in random for block in (state[name] if table[name].stacked else [state[name]])]
        drawn += [values.flatten()[:2048] for values in blocks]
    correlations = np.corrcoef(np.stack(drawn)) - np.eye(len(drawn))
    assert np.abs(correlations).max() < 6 / math.sqrt(2048)


def test_scanned_and_unrolled_models_start_with_the_same_weights() -> None:
    scanned, unrolled = state_of(fresh(INIT, 5)), state_of(fresh(INIT, 5, scan_layers=False))
    for name, row in parameter_table(INIT).items():
        layers = [name.replace("blocks.", f"blocks.{layer}.") for layer in range(INIT.n_layers)]
        expected = np.stack([unrolled[layer] for layer in layers]) if row.stacked else unrolled[name]
        assert np.array_equal(scanned[name], expected), name


@pytest.mark.parametrize("name", ["learned-gqa-full", "untied"])
def test_padded_rows_get_no_gradient_and_never_reach_the_logits(name: str, x64: None) -> None:
    config = CONFIGS[name]
    vocab = config.vocab_size
    assert config.padded_vocab_size > vocab
    weights, tokens = random_weights(config), tokens_of(config)
    cotangent = jnp.array(np.random.default_rng(0).normal(size=(*tokens.shape, vocab)))
    graph, state = nnx.split(build(config, weights))
    logits, pull_back = jax.vjp(jax.jit(lambda state: nnx.merge(graph, state)(tokens)), state)
    gradient = state_of(nnx.merge(graph, pull_back(cotangent)[0]))
    rows = gradient["token_embedding"] if config.tied_embeddings else gradient["head.kernel"].T
    assert (rows[vocab:] == 0).all()
    assert (np.abs(rows[:vocab]).max(axis=-1) > 0).all()
    if config.tied_embeddings:
        weights["token_embedding"][vocab:] = np.nan
    else:
        weights["head.kernel"][:, vocab:] = np.nan
    assert relative_error(call(build(config, weights), tokens), np.asarray(logits)) <= 1e-13


def test_a_sequence_beyond_learned_positions_is_refused() -> None:
    config = VARIANTS["learned-mha-full"]
    model = build(config, random_weights(config), Precision())
    longest = jax.ShapeDtypeStruct((1, config.context_length), "int32")
    assert jax.eval_shape(lambda tokens: model(tokens), longest).shape[1] == config.context_length
    with pytest.raises(InputError, match="17 tokens are longer than context_length = 16"):
        model(jnp.zeros((1, config.context_length + 1), "int32"))


def test_a_sequence_beyond_the_context_is_fine_with_rope(x64: None) -> None:
    config = VARIANTS["rope-mha-full"]
    weights = random_weights(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, config.context_length + 5))
    found = call(build(config, weights), jnp.array(tokens))
    assert relative_error(found, numpy_gpt.forward(config, weights, tokens)["logits"]) <= 1e-12


# ------------------------------------------------------------------------------------------------------------ dropout

RATE = 0.25
DROPPING = replace(VARIANTS["rope-gqa-window"], n_layers=3, dropout=RATE)


def test_dropout_is_off_without_a_key() -> None:
    """The programs are the same as without dropout, operation by operation."""
    weights, tokens = random_weights(DROPPING), tokens_of(DROPPING)

    def program(rate: float, keys: jax.Array | None) -> str:
        model = build(replace(DROPPING, dropout=rate), weights, Precision(), scan_layers=False)
        return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(lambda tokens: model(tokens, dropout_keys=keys))(tokens)))

    keys = jax.random.split(jax.random.key(0), len(tokens))
    assert program(RATE, None) == program(0.0, None)
    assert program(RATE, keys) != program(0.0, None)
    assert "random_bits" not in program(0.0, keys)


def test_dropout_zeroes_at_its_rate_and_keeps_the_mean() -> None:
    n = 40_000
    dropped = np.asarray(dropout(jnp.full((1, n), 3.0), RATE, jax.random.key(0)[None]))
    assert np.allclose(dropped[dropped != 0], 4.0)
    assert abs((dropped == 0).mean() - RATE) < 5 * math.sqrt(RATE * (1 - RATE) / n)
    assert abs(dropped.mean(dtype="float64") - 3) < 5 * 4 * math.sqrt(RATE * (1 - RATE) / n)


@FORMS
def test_dropout_acts_on_the_embedding_and_on_both_residual_branches(scan_layers: bool, x64: None) -> None:
    graph, state = nnx.split(build(DROPPING, random_weights(DROPPING), scan_layers=scan_layers))
    tokens = tokens_of(DROPPING)

    @jax.jit
    def drop(key: jax.Array) -> Taps:
        taps: Taps = {}
        nnx.merge(graph, state)(tokens, taps=taps, dropout_keys=jax.random.split(key, len(tokens)))
        return taps

    taps, again, other = (drop(jax.random.key(seed)) for seed in (1, 1, 2))
    assert np.array_equal(taps["logits"], again["logits"])
    assert not np.allclose(taps["logits"], other["logits"])
    kept = 1 - RATE
    entering = np.asarray(taps["blocks.0.input"])
    assert np.allclose(entering, taps["embedding"] / kept * (entering != 0))
    assert 0.1 < (entering == 0).mean() < 0.4
    masks = []
    for layer in (0, 1):
        attended, hidden = (taps[f"blocks.{layer}.{part}.output"] / kept for part in ("attention", "mlp"))
        added = taps[f"blocks.{layer + 1}.input"] - taps[f"blocks.{layer}.input"]
        sums = np.stack([0 * added, attended, hidden, attended + hidden])  # neither kept, one, the other, both
        distance = np.abs(sums - added)
        assert distance.min(axis=0).max() < 1e-12
        combination = distance.argmin(axis=0)
        share = np.bincount(combination.flatten(), minlength=4) / combination.size
        assert np.allclose(share, [RATE * RATE, kept * RATE, RATE * kept, kept * kept], atol=0.1)
        masks.append(combination)
    assert not np.array_equal(masks[0], masks[1])


# ---------------------------------------------------------------------------------------------------------- precision


def traced(model: GPT) -> tuple[set[str], str, str]:
    """Dtypes of all sites but the logits, of the logits, and the program, without compiling it."""

    def forward(state: nnx.State, tokens: jax.Array) -> Taps:
        taps: Taps = {}
        nnx.merge(graph, state)(tokens, taps=taps)
        return taps

    graph, state = nnx.split(model)
    jaxpr, shapes = jax.make_jaxpr(forward, return_shape=True)(state, tokens_of(model.config))
    logits = shapes.pop("logits")
    return {str(value.dtype) for value in shapes.values()}, str(logits.dtype), str(jaxpr)


@FORMS
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", ["rope-gqa-window", "learned-gqa-full", "untied"])
def test_every_site_is_in_the_dtype_of_the_policy(name: str, dtype: str, scan_layers: bool, x64: None) -> None:
    """Under x64, where a stray constant of NumPy would widen what follows."""
    precision = Precision.of(dtype)
    model = build(CONFIGS[name], random_weights(CONFIGS[name]), precision, scan_layers)
    stored = "float64" if dtype == "float64" else "float32"
    assert {str(values.dtype) for values in state_of(model).values()} == {stored}
    sites, logits, program = traced(model)
    assert (sites, logits) == ({dtype}, stored)
    assert bool(re.search(r"f64\[\d", program)) == (dtype == "float64")  # a scalar literal widens nothing


def test_parameters_can_be_stored_in_bf16_too() -> None:
    precision = Precision(param_dtype="bfloat16", compute_dtype="float32")
    config = VARIANTS["rope-gqa-window"]
    fresh = nnx.eval_shape(lambda: GPT(config, initialiser(0, precision), precision=precision))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(fresh))} == {"bfloat16"}
    assert traced(build(config, random_weights(config), precision))[:2] == ({"float32"}, "float32")


def test_norm_statistics_of_bf16_are_in_fp32() -> None:
    """Around 100 neighbours in bf16 are 0.5 apart: a mean or a variance in bf16 would be noise."""
    config = ModelConfig(n_heads=4, embed_dim=64)
    table = parameter_table(config)

    def create(row: Parameter) -> jax.Array:
        return jnp.full(row.shape, 0.7)

    norm = Norm("final_norm", table, create, config, Precision.of("bfloat16"))
    x = jnp.array(100 + 3 * np.random.default_rng(0).normal(size=(2, 5, 64)), "bfloat16")
    expected = numpy_gpt.layer_norm(np.asarray(x, np.float64), np.float64(0.7), np.float64(0.7), 1e-5)
    assert norm(x).dtype == "bfloat16"
    # Half a unit in the last of 8 bits, and the rounding of fp32; parameters in bf16 would be off by 8e-4.
    assert (np.abs(np.asarray(norm(x), np.float64) - expected) <= 2**-8 * np.abs(expected) + 5e-5).all()


def test_rotation_of_bf16_is_exact_at_far_positions() -> None:
    """Angles in bf16 would be off by whole turns beyond position 256."""
    config = replace(VARIANTS["rope-mha-full"], head_dim=8)
    x = jnp.array(np.random.default_rng(0).normal(size=(1, 3000, 2, 8)), "bfloat16")
    rotated = rotate(x, config.view("G").rotation, Precision.of("bfloat16"))
    assert rotated.dtype == "bfloat16"
    expected = numpy_gpt.rotate(np.asarray(x, np.float64), config.rope_theta)
    # Half a unit in the last of 8 bits, and the rounding of fp32.
    assert (np.abs(np.asarray(rotated, np.float64) - expected) <= 2**-8 * np.abs(expected) + 1e-6).all()
