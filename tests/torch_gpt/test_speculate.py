"""Speculation against plain decoding and, where tokens are drawn, against the probabilities of all texts."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy_gpt import CONFIGS, VARIANTS, random_weights
from text_statistics import distance, text_probabilities

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.precision import DType, Precision
from gpt_core.text.generation import DRAW_ACCEPT, DRAW_TOKEN, SamplingConfig
from torch_gpt import speculate
from torch_gpt.generate import distribution, draw, generate
from torch_gpt.model import GPT

PROMPTS = [[1, 2, 3, 4, 5, 6], [28], [9, 8, 7]]  # longer and shorter than the window
TINY = ModelConfig(vocab_size=6, context_length=8, n_layers=1, n_heads=2, embed_dim=8, position="rope")
DRAWING = {"temperature": 1.5, "top_k": 5, "top_p": 0.97}
Judge = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def model_of(config: ModelConfig, seed: int, dtype: DType = "float32") -> GPT:
    weights = random_weights(config, seed)

    def create(row: object) -> torch.Tensor:
        array = weights[row.name]
        return torch.tensor(array if row.layer is None else array[row.layer], dtype=torch.float32)

    return GPT(config, create, precision=Precision("float32", dtype)).eval()


@pytest.mark.parametrize(
    ("name", "draft_tokens"),
    [
        ("rope-gqa-window", 3),
        ("rope-mqa-window", 1),
        ("learned-mha-window", 5),
        ("learned-gqa-full", 2),
        ("gemma-2", 3),
    ],
)
def test_the_likeliest_text_is_that_of_plain_decoding_whatever_the_draft(name: str, draft_tokens: int) -> None:
    """Rows of different length, beyond two windows; rejections in a ring that has gone round."""
    config = CONFIGS[name]
    target = model_of(config, 0)
    options = SamplingConfig(max_new_tokens=10)
    plain = generate(target, PROMPTS, options)
    other = replace(VARIANTS["learned-mha-window"], n_layers=1, sliding_window=2)
    poor = speculate.speculate(target, model_of(other, 1), PROMPTS, options, draft_tokens=draft_tokens)
    assert poor.rows == plain
    assert sum(poor.accepted) < sum(poor.proposed) / 2
    same = speculate.speculate(target, target, PROMPTS, options, draft_tokens=draft_tokens)
    assert same.rows == plain
    assert same.accepted == same.proposed


@pytest.mark.parametrize(("length", "new"), [(16, 1), (15, 2), (6, 11)])
def test_a_full_context_ends_as_in_plain_decoding(length: int, new: int) -> None:
    """Rounds reach beyond the table of positions; what lies there is no part of the text."""
    config = VARIANTS["learned-mha-full"]
    target, prompts = model_of(config, 0), [list(range(1, length + 1)), [28, 3]]
    options = SamplingConfig(max_new_tokens=new)
    for draft in (target, model_of(replace(config, n_layers=1), 1)):
        found = speculate.speculate(target, draft, prompts, options, draft_tokens=4)
        assert found.rows == generate(target, prompts, options)


@pytest.mark.parametrize("temperature", [0.0, 9.0])
def test_tokens_beyond_the_known_ones_are_neither_proposed_nor_written(temperature: float) -> None:
    target, draft = model_of(VARIANTS["rope-gqa-window"], 0), model_of(VARIANTS["rope-gqa-window"], 1)
    options = SamplingConfig(max_new_tokens=10, temperature=temperature, known_tokens=9)
    found = speculate.speculate(target, draft, PROMPTS, options)
    assert max(token for row in found.rows for token in row) < 9
    if not temperature:
        assert found.rows == generate(target, PROMPTS, options)


def test_the_likeliest_texts_of_many_prompts_are_those_of_plain_decoding() -> None:
    """A draft close to the target, so that rounds end at every place."""
    config = replace(VARIANTS["rope-gqa-window"], n_layers=3)
    weights = random_weights(config)
    near = {name: array[:2] if name.startswith("blocks") else array for name, array in weights.items()}
    target = model_of(config, 0)
    draft = GPT(
        replace(config, n_layers=2),
        lambda row: torch.tensor(
            near[row.name] if row.layer is None else near[row.name][row.layer], dtype=torch.float32
        ),
    )
    random = np.random.default_rng(0)
    prompts = [random.integers(0, config.vocab_size, random.integers(1, 9)).tolist() for _ in range(64)]
    options = SamplingConfig(max_new_tokens=24)
    found = speculate.speculate(target, draft, prompts, options, draft_tokens=3)
    assert found.rows == generate(target, prompts, options)
    assert 0.1 < sum(found.accepted) / sum(found.proposed) < 0.9


def test_a_row_ends_with_its_stop_token_and_the_others_go_on() -> None:
    config = VARIANTS["rope-gqa-window"]
    target = model_of(config, 0)
    plain = generate(target, PROMPTS, SamplingConfig(max_new_tokens=12))
    stop = next(token for token in plain[0] if token not in plain[1])
    options = SamplingConfig(max_new_tokens=12, stop_tokens=(stop,))
    for draft in (target, model_of(config, 1)):
        parts = list(speculate.stream(target, draft, PROMPTS, options, rounds=1))
        found = [[token for part in parts for token in part.rows[row]] for row in range(3)]
        assert found == generate(target, PROMPTS, options)
    assert len(found[0]) < len(found[1]) == 12


def test_bf16_takes_a_draft_too() -> None:
    target = model_of(VARIANTS["rope-gqa-window"], 0, "bfloat16")
    found = speculate.speculate(target, target, PROMPTS, SamplingConfig(max_new_tokens=6))
    assert found.rows == generate(target, PROMPTS, SamplingConfig(max_new_tokens=6))


def always(judge: Judge) -> Judge:
    """A fault: every proposal stands."""
    zero = torch.tensor(DRAW_ACCEPT)
    return lambda proposals, draft, logits, noise, options: judge(
        proposals, draft, logits, noise.index_fill(2, zero, 0.0), options
    )


def from_the_whole(judge: Judge) -> Judge:
    """A fault: behind a rejected proposal a token is drawn from p instead of the positive part of p - q."""

    def faulty(proposals, draft, logits, noise, options):
        tokens, accepted = judge(proposals, draft, logits, noise, options)
        own = draw(distribution(logits, options), noise[:, :, DRAW_TOKEN])
        return torch.where(torch.arange(tokens.shape[1]) == accepted[:, None], own, tokens), accepted

    return faulty


@pytest.mark.parametrize("fault", [None, always, from_the_whole])
def test_texts_are_drawn_with_the_targets_probabilities(
    fault: Callable[[Judge], Judge] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5,000 texts of three tokens against all 216 of them; the same test sees a wrong rule of acceptance."""
    if fault is not None:
        monkeypatch.setattr(speculate, "judge", fault(speculate.judge))
    options = SamplingConfig(max_new_tokens=3, seed=1, **DRAWING)
    found = speculate.speculate(model_of(TINY, 0), model_of(TINY, 1), [[2, 4]] * 5000, options, draft_tokens=2)
    assert sum(found.accepted) / sum(found.proposed) > 0.1
    expected = text_probabilities(TINY, random_weights(TINY, 0), [2, 4], 3, **DRAWING)
    assert (distance(found.rows, expected) < 1) == (fault is None)


@pytest.mark.parametrize(
    ("change", "draft_tokens", "message"),
    [
        ({"vocab_size": 30}, 2, "the draft has a vocabulary of 30 tokens and the target one of 29"),
        ({"context_length": 9}, 2, "the draft cannot follow: prompt 0 has 6 tokens, and 10 more would exceed"),
        ({}, 0, "draft_tokens = 0 must be a whole number of at least 1"),
    ],
)
def test_a_draft_that_does_not_fit_is_refused(change: dict[str, int], draft_tokens: int, message: str) -> None:
    config = VARIANTS["learned-mha-full"]
    draft = model_of(replace(config, **change), 1)
    with pytest.raises(InputError, match=message):
        speculate.speculate(
            model_of(config, 0), draft, PROMPTS, SamplingConfig(max_new_tokens=10), draft_tokens=draft_tokens
        )
