"""Both twins draw the same texts for the same seed, and accept the same proposals."""

from dataclasses import replace

import pytest
from numpy_gpt import CONFIGS, random_weights

from gpt_core.config import ModelConfig
from gpt_core.parameters import Parameter
from gpt_core.precision import Precision
from gpt_core.text.generation import SamplingConfig

FP64 = Precision("float64", "float64")
PROMPTS = [[1, 2, 3, 4, 5], [28], [9, 8]]


def weight(config: ModelConfig, seed: int, row: Parameter):
    array = random_weights(config, seed)[row.name]
    return array if row.layer is None else array[row.layer]


@pytest.mark.parametrize("name", ["learned-mha-full", "gemma-2"])
def test_twins_accept_and_draw_the_same_tokens(name: str, x64: None) -> None:
    import jax.numpy as jnp
    import torch

    import jax_gpt.model
    import jax_gpt.speculate
    import torch_gpt.model
    import torch_gpt.speculate

    config = CONFIGS[name]
    pairs = (config, 0), (replace(config, n_layers=1), 1)
    jax_pair = [
        jax_gpt.model.GPT(c, lambda row, c=c, s=s: jnp.array(weight(c, s, row)), precision=FP64) for c, s in pairs
    ]
    torch_pair = [
        torch_gpt.model.GPT(c, lambda row, c=c, s=s: torch.tensor(weight(c, s, row)), precision=FP64).eval()
        for c, s in pairs
    ]
    found = []
    for seed in (3, 4):
        options = SamplingConfig(max_new_tokens=11, temperature=1.2, top_k=20, top_p=0.9, stop_tokens=(7,), seed=seed)
        found.append(jax_gpt.speculate.speculate(*jax_pair, PROMPTS, options, draft_tokens=3))
        assert found[-1] == torch_gpt.speculate.speculate(*torch_pair, PROMPTS, options, draft_tokens=3)
        assert 0 < sum(found[-1].accepted) < sum(found[-1].proposed)
    assert found[0].rows != found[1].rows
