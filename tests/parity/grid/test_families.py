"""The cases of `--hugging-face` have what their families are known for, and every architecture is one."""

from typing import Any

import numpy as np
import pytest

from gpt_core.formats import FORMATS
from gpt_core.storage.weights import weights_source
from parity.grid.families import architectures, family_configs
from parity.grid.variants import TIME, WINDOW, sharp_weights, text_tokens
from parity.sides import torch_side
from parity.verify import hugging_face_cases

CONFIGS = family_configs()
LLAMA = {"position": "rope", "norm": "rms", "gated_mlp": True, "activation": "silu", "head_dim": 10, "n_kv_heads": 2}
WINDOWED = LLAMA | {"sliding_window": WINDOW}
GEMMA = {"norm": "rms", "norm_unit_offset": True, "gated_mlp": True, "embedding_scale": 48**0.5, "head_dim": 10}
EXPERTS = {"n_experts": 11, "experts_per_token": 3, "expert_dim": 24, "norm": "rms", "norm_placement": "pre"}
KNOWN: dict[str, dict[str, Any]] = {
    "hf-llama": LLAMA | {"bias": True, "qkv_bias": True, "mlp_bias": True, "attention_pattern": None},
    "hf-mistral": WINDOWED | {"bias": False, "attention_pattern": None},
    "hf-qwen2": WINDOWED | {"qkv_bias": True, "bias": False, "attention_pattern": "LG"},
    "hf-qwen3": WINDOWED | {"qk_norm": "head", "attention_pattern": "LG"},
    "hf-gemma": GEMMA | {"norm_placement": "pre"},
    "hf-gemma2": GEMMA | {"norm_placement": "sandwich", "attention_softcap": 3.0, "logit_softcap": 5.0},
    "hf-gemma3_text": GEMMA | {"qk_norm": "head", "rope_local_theta": 50.0, "attention_pattern": "LG"},
    "hf-olmo2": LLAMA | {"norm_placement": "post", "qk_norm": "whole", "sliding_window": None},
    "hf-olmo3": WINDOWED | {"norm_placement": "post", "qk_norm": "whole", "attention_pattern": "LG"},
    "hf-smollm3": WINDOWED | {"attention_pattern": "LGN"},
    "hf-phi3": WINDOWED | {"rope_fraction": 0.6, "rope_scaling": None},
    "hf-granite": LLAMA | {"embedding_scale": 2.5, "residual_scale": 0.7, "logit_scale": 0.25, "attention_scale": 0.25},
    "hf-gpt_neox": {"norm": "layer", "parallel_residual": True, "rope_fraction": 0.6, "bias": True},
    "hf-mixtral": WINDOWED | EXPERTS | {"router_normalise": True, "qk_norm": None},
    "hf-qwen3_moe": WINDOWED | EXPERTS | {"router_normalise": False, "qk_norm": "head", "bias": True},
    "hf-qwen3_moe, normalised": WINDOWED | EXPERTS | {"router_normalise": True, "qk_norm": "head"},
    "hf-olmoe": EXPERTS | {"router_normalise": False, "qk_norm": "whole", "head_dim": 8, "n_kv_heads": 2},
    "hf-gpt_neo": {"position": "learned", "attention_pattern": "LG", "attention_scale": 1.0, "qkv_bias": False},
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_family_s_case_has_what_the_family_is_known_for(name: str) -> None:
    found = CONFIGS[name].to_dict()
    assert {field: found[field] for field in KNOWN[name]} == KNOWN[name]


@pytest.mark.parametrize("architecture", architectures(), ids=lambda one: one.model_type)
def test_every_architecture_is_a_case_that_goes_out_as_it_is(architecture: Any) -> None:
    fit = architecture.fit(CONFIGS[architecture.format])
    assert not fit.misfits
    assert not fit.changes


def test_the_cases_are_all_architectures_and_each_kind_of_scaling_beyond_its_context() -> None:
    native = {name for name in FORMATS if name.startswith("hf-") and name != "hf-twingpt"}
    assert {name.split(",")[0] for name in CONFIGS} == native
    assert set(CONFIGS) <= {case.variant for case in hugging_face_cases()}
    scaled = [config.rope_scaling for config in CONFIGS.values() if config.rope_scaling]
    assert {scaling.kind for scaling in scaled} == {"llama3", "yarn", "linear"}
    assert all((scaling.original_context or 0) < TIME for scaling in scaled)


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.n_experts])
def test_no_router_of_a_case_is_near_a_tie(name: str) -> None:
    """The last expert of every token is ahead of the first that is left by far more than fp32 rounds scores by."""
    config = CONFIGS[name]
    weights = {row: array.astype(np.float32).astype(np.float64) for row, array in sharp_weights(config).items()}
    model = torch_side.build(config, weights_source(weights), "float64")
    run = torch_side.run(model, text_tokens(config.vocab_size))
    for layer in range(config.n_layers):
        scores = np.sort(run.sites[f"blocks.{layer}.moe.scores"], axis=-1)[..., ::-1]
        last, left = config.experts_per_token - 1, config.experts_per_token
        assert scores.shape[-1] == config.n_experts
        assert (scores[..., last] - scores[..., left]).min() >= 1e-3
