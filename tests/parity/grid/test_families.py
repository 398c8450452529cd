"""The cases of `--hugging-face` have what their families are known for, and every architecture is one."""

from typing import Any

import pytest

from gpt_core.formats import FORMATS
from parity.grid.families import architectures, family_configs
from parity.grid.variants import TIME, WINDOW
from parity.verify import hugging_face_cases

CONFIGS = family_configs()
LLAMA = {"position": "rope", "norm": "rms", "gated_mlp": True, "activation": "silu", "head_dim": 10, "n_kv_heads": 2}
WINDOWED = LLAMA | {"sliding_window": WINDOW}
GEMMA = {"norm": "rms", "norm_unit_offset": True, "gated_mlp": True, "embedding_scale": 48**0.5, "head_dim": 10}
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
