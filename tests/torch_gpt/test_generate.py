"""Decoding through the cache against the model in NumPy, which has none."""

import numpy as np
import numpy_gpt
import pytest
import torch
from numpy_gpt import CONFIGS, VARIANTS, WINDOW, random_tokens, random_weights

from gpt_core.config import ModelConfig
from gpt_core.precision import Precision
from gpt_core.text.generation import SamplingConfig, cache_slots
from torch_gpt import decode
from torch_gpt.generate import distribution, draw, generate, stream
from torch_gpt.model import GPT

FP64 = Precision("float64", "float64")
LENGTHS = np.array([3, 6])  # of prompts, shorter and longer than the window


def model_of(config: ModelConfig) -> GPT:
    weights = random_weights(config)

    def create(row: object) -> torch.Tensor:
        array = weights[row.name]
        return torch.tensor(array if row.layer is None else array[row.layer])

    return GPT(config, create, precision=FP64).eval()


@pytest.mark.parametrize(
    ("name", "new"), [*((name, 1) for name in CONFIGS), ("rope-gqa-window", 3), ("learned-mqa-full", 3), ("gemma-3", 3)]
)
def test_cached_logits_are_the_models_at_every_position(name: str, new: int) -> None:
    """Rows of different length, beyond two windows, one and several tokens a step."""
    config = CONFIGS[name]
    tokens = random_tokens(config)
    truth = numpy_gpt.forward(config, random_weights(config), tokens)["logits"]
    model = model_of(config)
    slots = cache_slots(config, tokens.shape[1], new)
    most = {"L": WINDOW, "G": tokens.shape[1], "N": tokens.shape[1]}
    assert slots == tuple(most[kind] + new - 1 for kind in config.layer_kinds)
    padded = np.where(np.arange(LENGTHS.max()) < LENGTHS[:, None], tokens[:, : LENGTHS.max()], 0)
    logits, cache = decode.prefill(model, torch.as_tensor(padded), torch.as_tensor(LENGTHS), slots)
    rows = np.arange(2)
    assert numpy_gpt.relative_error(logits, truth[rows, LENGTHS - 1]) <= 1e-12
    weights = decode.prepare(model, tokens.shape[1])
    for first in range(0, 5 - new + 1, new):
        positions = LENGTHS[:, None] + first + np.arange(new)
        part = torch.as_tensor(tokens[rows[:, None], positions])
        logits, cache = decode.step(weights, config, FP64, part, torch.as_tensor(positions[:, 0]), cache)
        assert numpy_gpt.relative_error(logits, truth[rows[:, None], positions]) <= 1e-12
    each = 2 * config.n_kv_heads * config.head_dim
    assert [key.numel() for key in cache.key] == [each * most[kind] + each * (new - 1) for kind in config.layer_kinds]


@pytest.mark.parametrize("name", ["rope-gqa-window", "learned-mha-full"])
def test_tokens_that_a_step_took_back_leave_nothing_behind(name: str) -> None:
    """As speculation does: three tokens, of which two are rejected, and then three others in their place."""
    config = VARIANTS[name]
    tokens = random_tokens(config)
    truth = numpy_gpt.forward(config, random_weights(config), tokens)["logits"]
    model = model_of(config)
    start = torch.tensor([5, 5])
    _, cache = decode.prefill(model, torch.as_tensor(tokens[:, :5]), start, cache_slots(config, 11, 3))
    weights = decode.prepare(model, 11)
    wrong = tokens[:, 5:8].copy()
    wrong[:, 1:] = (wrong[:, 1:] + 1) % config.vocab_size
    _, cache = decode.step(weights, config, FP64, torch.as_tensor(wrong), start, cache)
    for first in (6, 8):
        part = torch.as_tensor(tokens[:, first : first + 3])
        logits, _ = decode.step(weights, config, FP64, part, torch.tensor([first, first]), cache)
        assert numpy_gpt.relative_error(logits, truth[:, first : first + 3]) <= 1e-12


def greedy_by_definition(config: ModelConfig, prompt: list[int], new: int, known: int | None = None) -> list[int]:
    tokens = list(prompt)
    for _ in range(new):
        logits = numpy_gpt.forward(config, random_weights(config), np.array([tokens]))["logits"]
        tokens.append(int(logits[0, -1, :known].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", ["rope-mqa-window", "learned-gqa-full"])
def test_greedy_text_of_a_ragged_batch_is_that_of_each_row_alone(name: str) -> None:
    config = VARIANTS[name]
    prompts = [[1, 2, 3, 4, 5, 6, 7], [28], [9, 8]]
    found = generate(model_of(config), prompts, SamplingConfig(max_new_tokens=9))
    assert found == [greedy_by_definition(config, prompt, 9) for prompt in prompts]


def test_a_row_ends_with_its_stop_token_and_the_others_go_on() -> None:
    config = VARIANTS["rope-gqa-window"]
    prompts = [[1, 2, 3], [28]]
    rows = [greedy_by_definition(config, prompt, 9) for prompt in prompts]
    stop = next(token for token in rows[0] if token not in rows[1])
    options = SamplingConfig(max_new_tokens=9, stop_tokens=(stop,))
    chunks = list(stream(model_of(config), prompts, options, chunk=4))
    found = [[token for chunk in chunks for token in chunk[row]] for row in range(2)]
    assert found == [rows[0][: rows[0].index(stop) + 1], rows[1]]


@pytest.mark.parametrize(("length", "new"), [(16, 1), (15, 2), (6, 11)])
def test_the_last_token_of_a_full_context_is_written(length: int, new: int) -> None:
    config = VARIANTS["learned-gqa-full"]
    assert length + new == config.context_length + 1
    prompts = [list(range(length)), [28, 3]]
    found = generate(model_of(config), prompts, SamplingConfig(max_new_tokens=new))
    assert found == [greedy_by_definition(config, prompt, new) for prompt in prompts]


def test_tokens_beyond_the_known_ones_are_as_if_the_model_had_no_rows_for_them() -> None:
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
    logits = torch.as_tensor(np.random.default_rng(0).normal(size=(3, 29)))
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
    found = distribution(
        torch.log(torch.as_tensor(probabilities, dtype=torch.float32))[None], SamplingConfig(**options)
    )[0]
    expected = np.where(np.isin(np.arange(4), kept), probabilities, 0)
    np.testing.assert_allclose(found, expected / expected.sum(), atol=1e-6)


def test_a_random_number_falls_into_a_tokens_share_and_never_on_an_impossible_one() -> None:
    noise = torch.tensor([0.0, 0.24, 0.26, 0.999, 1 - 2**-24], dtype=torch.float32)
    rows = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0], dtype=torch.float32).repeat(5, 1)
    assert draw(rows, noise).tolist() == [1, 1, 3, 3, 3]


@pytest.mark.parametrize(("noise", "token"), [(0.2, 1), (0.3, 3), (0.62, 3), (0.7, 3), (0.8, 5), (0.99, 5)])
def test_a_running_sum_that_falls_chooses_the_first_possible_token_beyond_the_noise(
    noise: float, token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = torch.tensor([[0.0, 0.26, 0.24, 0.75, 0.625, 0.74, 1.0]])
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda x, dim: reached)
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.0, 0.25, 0.0]])
    assert draw(probabilities, torch.tensor([noise])).tolist() == [token]
