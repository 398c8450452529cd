import math

import numpy as np
import pytest

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.text.generation import (
    SamplingConfig,
    cache_slots,
    pack_draft_prompts,
    pack_prompts,
    uniforms,
)

CONFIG = ModelConfig(vocab_size=10, context_length=8, n_layers=1, n_heads=2, embed_dim=4)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -0.1, "temperature = -0.1 must be a number of at least 0"),
        ("temperature", math.nan, "temperature = nan"),
        ("top_p", 0.0, r"top_p = 0.0 must be a number in \(0, 1\]"),
        ("top_p", 1.5, "top_p = 1.5"),
        ("top_k", 0, "top_k = 0 must be a whole number of at least 1"),
        ("temperature", 10**400, "temperature = 1000"),
        ("top_k", 10**12, "top_k = 1000000000000 must be"),
        ("seed", 2**64, "seed = 18446744073709551616 must be"),
        ("max_new_tokens", 10**12, "max_new_tokens = 1000000000000 must be a whole number of at least 1 and at most"),
        ("max_new_tokens", 0, "max_new_tokens = 0"),
        ("stop_tokens", (-1,), "stop_tokens"),
        ("seed", -1, "seed = -1"),
        ("known_tokens", 0, "known_tokens = 0 must be a whole number of at least 1"),
    ],
)
def test_a_bad_option_is_refused_with_its_range(field: str, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SamplingConfig(**{field: value})


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([], 1, "there is no prompt"),
        ([[1], []], 1, "prompt 1 is empty"),
        ([[1] * 9], 1, "prompt 0 has 9 tokens, more than context_length = 8"),
        ([[1] * 6], 4, "and 4 more would exceed context_length = 8"),
        ([[1] * 8], 2, "and 2 more would exceed context_length = 8"),
        ([[1, 10]], 1, r"token id 10 is outside the vocabulary 0\.\.9"),
    ],
)
def test_a_bad_prompt_is_refused(prompts: list[list[int]], new: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pack_prompts(prompts, CONFIG, new)


@pytest.mark.parametrize(("length", "new"), [(8, 1), (7, 2), (1, 8)])
def test_the_last_token_of_a_text_needs_no_position(length: int, new: int) -> None:
    packed = pack_prompts([[1] * length], CONFIG, new)
    assert packed.lengths.tolist() == [length]
    pack_draft_prompts([[1] * length], CONFIG, CONFIG, new, 4)


@pytest.mark.parametrize("draft_tokens", [0, True, 10**12])
def test_a_draft_proposes_a_bounded_number_of_tokens(draft_tokens: int) -> None:
    with pytest.raises(InputError, match=f"draft_tokens = {draft_tokens} must be"):
        pack_draft_prompts([[1]], CONFIG, CONFIG, 1, draft_tokens)


def test_another_vocabulary_is_no_draft() -> None:
    with pytest.raises(InputError, match="vocabulary of 10 tokens and the target one of 50257"):
        pack_draft_prompts([[1]], CONFIG, ModelConfig(), 1, 4)


def test_a_random_number_depends_on_seed_row_and_token_alone() -> None:
    whole = uniforms(3, rows=4, first=0, count=20)
    assert (uniforms(3, rows=2, first=7, count=5) == whole[7:12, :2]).all()
    assert len(np.unique(whole)) == whole.size
    assert not (uniforms(4, rows=4, first=0, count=20) == whole).any()


def test_random_numbers_are_uniform_and_below_one() -> None:
    drawn = uniforms(0, rows=8, first=0, count=4000)
    assert drawn.dtype == np.float32
    assert 0 <= drawn.min() < drawn.max() < 1
    counts = np.histogram(drawn, bins=20, range=(0, 1))[0]
    expected = drawn.size / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001


def test_a_windows_cache_does_not_grow_with_the_text() -> None:
    window = ModelConfig(n_layers=1, sliding_window=5)
    assert [set(cache_slots(window, limit, 1)) for limit in (3, 5, 1000)] == [{3}, {5}, {5}]
    assert set(cache_slots(window, 1000, 4)) == {8}
    assert cache_slots(CONFIG, 1000, 1) == (1000,) * CONFIG.n_layers
