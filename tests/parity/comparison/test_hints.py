"""Hints are formulas: none fails in any model of the family, none explains what it does not predict."""

from dataclasses import replace

import numpy as np
import pytest
from numpy_gpt import CONFIGS, WINDOW, forward, random_tokens, random_weights

from gpt_core.sites import model_sites
from parity.comparison.hints import explain


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_known_explains_noise_at_any_site_of_any_model(name):
    config = CONFIGS[name]
    weights, tokens = random_weights(config), random_tokens(config)
    sites = forward(config, weights, tokens)
    random = np.random.default_rng(0)
    for site in model_sites(config):
        wrong = sites[site] + random.normal(size=sites[site].shape)
        assert explain(site, wrong, sites, weights, config, tokens) == ""


# A model, what another has for it, where they part, and what is said.
MISTAKES = [
    ("gemma-3", {"rope_local_theta": None}, "blocks.0.attention.rotated_query", "rope_theta of the other kind"),
    ("gemma-3", {"rope_scaling": None}, "blocks.2.attention.rotated_key", "leaving rope_scaling out"),
    ("gemma-3", {"norm_unit_offset": False}, "blocks.0.attention_norm", "without the one that is added"),
    ("gemma-3", {"embedding_scale": 1.0}, "embedding", "leaving embedding_scale out"),
    ("gemma-2", {"attention_softcap": None}, "blocks.0.attention.mixed", "leaving the softcap of scores out"),
    ("gemma-2", {"logit_softcap": None}, "logits", "leaving the softcap of logits out"),
    ("gemma-2", {"sliding_window": WINDOW + 1}, "blocks.0.attention.mixed", f"a window of {WINDOW + 1} keys"),
    ("llama", {"activation": "gelu"}, "blocks.0.mlp.hidden", "the erf form of GELU"),
    ("llama", {"rope_scaling": None}, "blocks.0.attention.rotated_query", "leaving rope_scaling out"),
    ("granite", {"logit_scale": 1.0}, "logits", "leaving logit_scale out"),
    ("granite", {"residual_scale": 1.0}, "blocks.0.mlp_norm", "leaving residual_scale out"),
    ("gpt-neox", {"parallel_residual": False}, "blocks.0.mlp_norm", "reads what attention has left"),
    ("gpt-neox", {"rope_fraction": 1.0}, "blocks.0.attention.rotated_query", "turning whole heads"),
    ("mixtral", {"experts_per_token": 1}, "blocks.0.moe.chosen", "experts_per_token = 1"),
    ("mixtral", {"router_normalise": False}, "blocks.0.moe.weights", "leaving router_normalise out"),
    ("mixtral", {"activation": "gelu"}, "blocks.0.moe.output", "the erf form of GELU"),
    ("olmoe", {"router_normalise": True}, "blocks.0.moe.weights", "router_normalise where there is none"),
    ("smollm", {"attention_scale": 1.0}, "blocks.0.attention.mixed", "leaving the attention scale out"),
]


@pytest.mark.parametrize(("name", "fields", "site", "said"), MISTAKES)
def test_a_known_mistake_is_named(name, fields, site, said):
    config = CONFIGS[name]
    weights, tokens = random_weights(config), random_tokens(config)
    sites = forward(config, weights, tokens)
    changed = replace(config, **fields)
    wrong = forward(changed, weights, tokens)[site]
    assert said in explain(site, wrong, sites, weights, config, tokens)
