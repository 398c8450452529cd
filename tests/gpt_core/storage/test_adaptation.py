"""Another config of the same function: what may change, what may not, and that the numbers stay."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy_gpt
import pytest

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.parameters import parameter_table
from gpt_core.storage.adaptation import adapt, same_function
from gpt_core.storage.weights import weights_source

MODERN = replace(
    numpy_gpt.CONFIGS["olmo"], attention_pattern=None, sliding_window=None, rope_scaling=None, n_layers=2
)  # qk-norm over all heads, two kv heads


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (MODERN, {"n_kv_heads": MODERN.n_heads}),
        (replace(MODERN, qk_norm="head"), {"n_kv_heads": MODERN.n_heads}),
        (MODERN, {"bias": True, "qkv_bias": True, "mlp_bias": True}),
        (replace(MODERN, qk_norm=None, attention_softcap=1.5), {"attention_scale": 0.11}),
    ],
)
def test_the_function_stays(config: ModelConfig, changes: dict[str, Any]) -> None:
    weights, tokens = numpy_gpt.random_weights(config), numpy_gpt.random_tokens(config)
    adaptation = adapt(config, **changes)
    read = adaptation.source(weights_source(weights), {name: array.dtype for name, array in weights.items()})
    adapted = {name: np.asarray(read(row)) for name, row in parameter_table(adaptation.after).items()}
    before, after = (
        numpy_gpt.forward(one, arrays, tokens)["logits"]
        for one, arrays in ((config, weights), (adaptation.after, adapted))
    )
    assert numpy_gpt.relative_error(after, before) <= 1e-13


def test_a_scale_does_not_move_into_queries_that_are_normed() -> None:
    with pytest.raises(InputError, match=r"cannot move into queries that are normed \(qk_norm = 'whole'\)"):
        adapt(MODERN, attention_scale=0.11)


BASE = ModelConfig(
    n_layers=4, position="rope", sliding_window=8, attention_pattern="LG", n_heads=4, embed_dim=32, rope_local_theta=7.0
)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"dropout": 0.2, "init_std": 0.3}, True),
        ({"norm_eps": 1e-5 * (1 + 1e-14)}, True),
        ({"rope_local_theta": None}, False),
        ({"logit_softcap": 3.0}, False),
        ({"rope_scaling": {"kind": "linear", "factor": 2.0}}, False),
        ({"attention_pattern": "LGG"}, False),
        ({"norm": "rms"}, False),
    ],
)
def test_configs_of_the_same_function_are_told_from_others(changes: dict[str, Any], same: bool) -> None:
    other = replace(BASE, **changes)
    assert same_function(BASE, other) is same_function(other, BASE) is same
