"""Decoding through the cache against the model in NumPy, which has none."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_gpt
import pytest
from flax import nnx
from numpy_gpt import CONFIGS, VARIANTS, WINDOW, random_tokens, random_weights

from gpt_core.config import ModelConfig
from gpt_core.precision import Precision
from gpt_core.text.generation import SamplingConfig, cache_slots
from jax_gpt import decode
from jax_gpt.generate import distribution, draw, generate, stream
from jax_gpt.model import GPT

FP64 = Precision("float64", "float64")
LENGTHS = np.array([3, 6])  # of prompts, shorter and longer than the window
# As one program each: operation by operation every shape would be compiled for itself.
prepare = nnx.jit(decode.prepare, static_argnums=1)
step = jax.jit(decode.step, static_argnums=(1, 2))


def model_of(config: ModelConfig, *, scan_layers: bool = True) -> GPT:
    weights = random_weights(config)

    def create(row: object) -> jax.Array:
        array = weights[row.name]
        return jnp.array(array if row.layer is None else array[row.layer])

    return GPT(config, create, precision=FP64, scan_layers=scan_layers)


PATTERNS = ("gemma-2", "gemma-3", "olmo", "smollm", "learned-pattern", "scaled-window")


@pytest.mark.parametrize(
    ("name", "new"),
    [*((name, 1) for name in (*VARIANTS, *PATTERNS)), ("rope-gqa-window", 3), ("learned-mqa-full", 3), ("gemma-3", 3)],
)
def test_cached_logits_are_the_models_at_every_position(name: str, new: int, x64: None) -> None:
    """Rows of different length, beyond two windows, one and several tokens a step."""
    config = CONFIGS[name]
    tokens = random_tokens(config)
    truth = numpy_gpt.forward(config, random_weights(config), tokens)["logits"]
    model = model_of(config)
    slots = cache_slots(config, tokens.shape[1], new)
    most = {"L": WINDOW, "G": tokens.shape[1], "N": tokens.shape[1]}
    assert slots == tuple(most[kind] + new - 1 for kind in config.layer_kinds)
    padded = np.where(np.arange(LENGTHS.max()) < LENGTHS[:, None], tokens[:, : LENGTHS.max()], 0)
    logits, cache = decode.prefill(model, jnp.asarray(padded, jnp.int32), jnp.asarray(LENGTHS), slots)
    rows = np.arange(2)
    assert numpy_gpt.relative_error(logits, truth[rows, LENGTHS - 1]) <= 1e-12
    weights = prepare(model, tokens.shape[1])
    for first in range(0, 5 - new + 1, new):
        positions = LENGTHS[:, None] + first + np.arange(new)
        part = jnp.asarray(tokens[rows[:, None], positions], jnp.int32)
        logits, cache = step(weights, config, FP64, part, jnp.asarray(positions[:, 0]), cache)
        assert numpy_gpt.relative_error(logits, truth[rows[:, None], positions]) <= 1e-12
    each = 2 * config.n_kv_heads * config.head_dim
    assert [key.size for key in cache.key] == [each * most[kind] + each * (new - 1) for kind in config.layer_kinds]


@pytest.mark.parametrize("name", ["rope-gqa-window", "learned-mha-full"])
def test_tokens_that_a_step_took_back_leave_nothing_behind(name: str, x64: None) -> None:
    """As speculation does: three tokens, of which two are rejected, and then three others in their place."""
    config = VARIANTS[name]
    tokens = random_tokens(config)
    truth = numpy_gpt.forward(config, random_weights(config), tokens)["logits"]
    model = model_of(config)
    start = jnp.array([5, 5])
    _, cache = decode.prefill(model, jnp.asarray(tokens[:, :5], jnp.int32), start, cache_slots(config, 11, 3))
    weights = prepare(model, 11)
    wrong = tokens[:, 5:8].copy()
    wrong[:, 1:] = (wrong[:, 1:] + 1) % config.vocab_size
    _, cache = step(weights, config, FP64, jnp.asarray(wrong, jnp.int32), start, cache)
    for first in (6, 8):
        part = jnp.asarray(tokens[:, first : first + 3], jnp.int32)
        logits, cache = step(weights, config, FP64, part, jnp.array([first, first]), cache)
        assert numpy_gpt.relative_error(logits, truth[:, first : first + 3]) <= 1e-12


def test_a_compiled_step_of_thousands_of_tokens_is_the_models() -> None:
    """XLA has got products of 4096 rows and more wrong, beside LayerNorm and only when compiled."""
    config = ModelConfig(vocab_size=6, context_length=8, n_layers=1, n_heads=2, embed_dim=8, position="rope")
    weights = random_weights(config)
    model = GPT(config, lambda p: jnp.asarray(weights[p.name] if p.layer is None else weights[p.name][0], jnp.float32))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 6, (2100, 4)), jnp.int32)
    _, cache = decode.prefill(model, tokens[:, :2], jnp.full(2100, 2), (5,))
    logits, _ = step(prepare(model, 4), config, model.precision, tokens[:, 2:], jnp.full(2100, 2), cache)
    assert numpy_gpt.relative_error(logits, np.asarray(model(tokens)[:, 2:])) <= 1e-5


def greedy_by_definition(config: ModelConfig, prompt: list[int], new: int, known: int | None = None) -> list[int]:
    tokens = list(prompt)
    for _ in range(new):
        logits = numpy_gpt.forward(config, random_weights(config), np.array([tokens]))["logits"]
        tokens.append(int(logits[0, -1, :known].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", ["rope-mqa-window", "learned-gqa-full"])
def test_greedy_text_of_a_ragged_batch_is_that_of_each_row_alone(name: str, x64: None) -> None:
    config = VARIANTS[name]
    prompts = [[1, 2, 3, 4, 5, 6, 7], [28], [9, 8]]
    found = generate(model_of(config, scan_layers=False), prompts, SamplingConfig(max_new_tokens=9))
    assert found == [greedy_by_definition(config, prompt, 9) for prompt in prompts]


def test_a_row_ends_with_its_stop_token_and_the_others_go_on(x64: None) -> None:
    config = VARIANTS["rope-gqa-window"]
    prompts = [[1, 2, 3], [28]]
    rows = [greedy_by_definition(config, prompt, 9) for prompt in prompts]
    stop = next(token for token in rows[0] if token not in rows[1])
    options = SamplingConfig(max_new_tokens=9, stop_tokens=(stop,))
    chunks = list(stream(model_of(config), prompts, options, chunk=4))
    found = [[token for chunk in chunks for token in chunk[row]] for row in range(2)]
    assert found == [rows[0][: rows[0].index(stop) + 1], rows[1]]


@pytest.mark.parametrize(("length", "new"), [(16, 1), (15, 2), (6, 11)])
def test_the_last_token_of_a_full_context_is_written(length: int, new: int, x64: None) -> None:
    config = VARIANTS["learned-gqa-full"]
    assert length + new == config.context_length + 1
    prompts = [list(range(length)), [28, 3]]
    found = generate(model_of(config), prompts, SamplingConfig(max_new_tokens=new))
    assert found == [greedy_by_definition(config, prompt, new) for prompt in prompts]


def test_tokens_beyond_the_known_ones_are_as_if_the_model_had_no_rows_for_them(x64: None) -> None:
    config = VARIANTS["rope-gqa-window"]
    prompts, model = [[1, 2, 3], [5]], model_of(config)
    unbound = [token for prompt in prompts for token in greedy_by_definition(config, prompt, 9)]
    known = sorted(unbound)[len(unbound) // 2]
    found = generate(model, prompts, SamplingConfig(max_new_tokens=9, known_tokens=known))
    assert found == [greedy_by_definition(config, prompt, 9, known) for prompt in prompts]
    for seed in range(3):
        options = SamplingConfig(max_new_tokens=9, temperature=9.0, top_p=0.99, seed=seed, known_tokens=known)
        drawn = generate(model, prompts, options)
        assert max(token for row in drawn for token in row) < known
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 29)))
    whole, bound = (
        SamplingConfig(temperature=0.7, top_k=5, top_p=0.9),
        SamplingConfig(temperature=0.7, top_k=5, top_p=0.9, known_tokens=known),
    )
    np.testing.assert_array_equal(distribution(logits, bound), distribution(logits[:, :known], whole))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"temperature": 1.0}, [0, 1, 2, 3]),
        ({"temperature": 1.0, "top_k": 2}, [0, 2]),
        ({"temperature": 1.0, "top_k": 99}, [0, 1, 2, 3]),
        ({"temperature": 1.0, "top_p": 0.5}, [0]),
        ({"temperature": 1.0, "top_p": 0.51}, [0, 2]),
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.6}, [0]),  # 0.5 / 0.8: top-p sees what top-k left
        ({"temperature": 0.0}, [0]),
    ],
)
def test_top_k_and_top_p_keep_the_likeliest(options: dict[str, float], kept: list[int]) -> None:
    probabilities = np.array([0.5, 0.1, 0.3, 0.1])
    found = distribution(jnp.log(jnp.asarray(probabilities, jnp.float32))[None], SamplingConfig(**options))[0]
    expected = np.where(np.isin(np.arange(4), kept), probabilities, 0)
    np.testing.assert_allclose(found, expected / expected.sum(), atol=1e-6)


def test_a_random_number_falls_into_a_tokens_share_and_never_on_an_impossible_one() -> None:
    noise = jnp.array([0.0, 0.24, 0.26, 0.999, 1 - 2**-24], jnp.float32)
    rows = jnp.tile(jnp.array([0.0, 0.25, 0.0, 0.75, 0.0], jnp.float32), (5, 1))
    assert draw(rows, noise).tolist() == [1, 1, 3, 3, 3]


def test_no_token_of_probability_zero_is_drawn_where_rounding_makes_the_running_sum_fall() -> None:
    """XLA adds up in parts: the sum of 50 tokens among 50,257 steps back behind some of them. At every edge."""
    logits = np.random.default_rng(3).normal(0, 2, (1, 50257)).astype(np.float32)
    probabilities = np.asarray(distribution(jnp.asarray(logits), SamplingConfig(temperature=1.0, top_k=50)))[0]
    possible = np.flatnonzero(probabilities)
    assert len(possible) == 50
    exact = np.cumsum(probabilities.astype(np.float64))
    edges = np.floor(exact[possible] / exact[-1] * 2**24)[:, None] + np.arange(-4, 5)
    noise = np.unique(edges.clip(0, 2**24 - 1)) * 2.0**-24
    drawn = draw(jnp.tile(probabilities, (len(noise), 1)), jnp.asarray(noise, jnp.float32))
    assert set(np.asarray(drawn).tolist()) == set(possible.tolist())


@pytest.mark.parametrize(("noise", "token"), [(0.2, 1), (0.3, 3), (0.62, 3), (0.7, 3), (0.8, 5), (0.99, 5)])
def test_a_running_sum_that_falls_chooses_the_first_possible_token_beyond_the_noise(
    noise: float, token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = jnp.array([[0.0, 0.26, 0.24, 0.75, 0.625, 0.74, 1.0]])
    monkeypatch.setattr(jnp, "cumsum", lambda x, axis: reached)
    probabilities = jnp.array([[0.0, 0.25, 0.0, 0.5, 0.0, 0.25, 0.0]])
    assert draw(probabilities, jnp.array([noise])).tolist() == [token]
