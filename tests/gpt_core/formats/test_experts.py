"""A mixture's config.json: either name of the number of experts, the sizes that authors state, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.formats import format_of
from gpt_core.formats.hf_architecture import Architecture
from gpt_core.formats.hugging_face import HuggingFaceFormat, read_config
from gpt_core.parameters import active_count, parameter_count
from gpt_core.storage.adaptation import same_function

PUBLISHED = json.loads(Path(__file__).with_name("published_configs.json").read_text("utf-8"))
MIXTRAL, QWEN, OLMOE = "mistralai/Mixtral-8x7B-v0.1", "Qwen/Qwen3-30B-A3B", "allenai/OLMoE-1B-7B-0924"
GONE: Any = ...


def architecture(name: str) -> Architecture:
    found = format_of(f"hf-{PUBLISHED[name]['config']['model_type']}")
    assert isinstance(found, HuggingFaceFormat)
    return found.architecture


def read(name: str, changes: dict[str, Any], folder: Path) -> ModelConfig:
    content = PUBLISHED[name]["config"] | changes
    (folder / "config.json").write_text(json.dumps({field: v for field, v in content.items() if v is not GONE}))
    return read_config(folder / "config.json", architecture(name))[0]


def written(name: str, config: ModelConfig) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for part in architecture(name).parts:
        content |= part.write(config)
    return content


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [(MIXTRAL, 46.70e9, 12.9e9), (QWEN, 30.53e9, 3.3e9), (OLMOE, 6.92e9, 1.28e9)],
)
def test_a_mixture_has_the_parameters_that_its_authors_state(
    name: str, total: float, active: float, tmp_path: Path
) -> None:
    """All of them, and those that a token meets: Qwen cuts 3.35 to 3.3."""
    config = read(name, {}, tmp_path)
    assert parameter_count(config) == pytest.approx(total, rel=1e-3)
    assert active_count(config) == pytest.approx(active, rel=2e-2)


@pytest.mark.parametrize(("preset", "name"), [("mixtral-8x7b", MIXTRAL), ("qwen3-30b-a3b", QWEN)])
def test_a_preset_is_the_published_model(preset: str, name: str, tmp_path: Path) -> None:
    assert same_function(ModelConfig.from_yaml(preset), read(name, {}, tmp_path))


@pytest.mark.parametrize("name", [MIXTRAL, QWEN, OLMOE])
@pytest.mark.parametrize("field", ["num_experts", "num_local_experts"])
def test_the_number_of_experts_goes_by_either_name(name: str, field: str, tmp_path: Path) -> None:
    apart = {"num_experts": GONE, "num_local_experts": GONE}
    assert read(name, apart | {field: 12}, tmp_path).n_experts == 12


@pytest.mark.parametrize(
    ("name", "experts", "chosen", "width", "normalised"),
    [(MIXTRAL, 8, 2, 14336, True), (QWEN, 128, 8, 768, False), (OLMOE, 64, 8, 2048, False)],
)
def test_what_a_mixture_leaves_out_is_what_transformers_gives_it(
    name: str, experts: int, chosen: int, width: int, normalised: bool, tmp_path: Path
) -> None:
    fields = ("num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob", "moe_intermediate_size")
    config = read(name, dict.fromkeys((*fields, "intermediate_size", "decoder_sparse_step"), GONE), tmp_path)
    assert (config.n_experts, config.experts_per_token) == (experts, chosen)
    assert (config.expert_dim, config.router_normalise) == (width, normalised)


def test_readers_of_either_version_find_the_number_of_qwen_s_experts(tmp_path: Path) -> None:
    """transformers 4 looks for num_experts, 5.23 for num_local_experts, which it writes alone."""
    content = written(QWEN, read(QWEN, {}, tmp_path))
    assert content["num_experts"] == content["num_local_experts"] == 128


@pytest.mark.parametrize("name", [MIXTRAL, OLMOE])
def test_where_a_file_has_one_width_it_is_that_of_the_experts(name: str, tmp_path: Path) -> None:
    """Whatever mlp_dim says, which nothing reads in a mixture."""
    config = read(name, {"intermediate_size": 96}, tmp_path)
    assert (config.mlp_dim, config.expert_dim) == (96, 96)
    other = ModelConfig(**config.to_dict() | {"mlp_dim": 40})
    assert not architecture(name).fit(other).misfits
    assert written(name, other)["intermediate_size"] == 96


def test_qwen_s_other_width_stays(tmp_path: Path) -> None:
    config = read(QWEN, {}, tmp_path)
    assert (config.mlp_dim, config.expert_dim) == (6144, 768)
    content = written(QWEN, config)
    assert (content["intermediate_size"], content["moe_intermediate_size"]) == (6144, 768)


@pytest.mark.parametrize("name", [MIXTRAL, QWEN, OLMOE])
def test_widths_that_transformers_cannot_group_are_said(name: str, tmp_path: Path) -> None:
    config = read(name, {}, tmp_path)
    assert not architecture(name).adapt(config).notices
    (notice,) = architecture(name).adapt(replace(config, expert_dim=100)).notices
    assert "expert_dim 100: no multiple of 8" in notice
    assert 'experts_implementation="eager"' in notice


MIXED = "and layers without experts among others are beyond our models; only"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (MIXTRAL, {"num_experts": 4}, "num_local_experts is 8 and num_experts is 4; they must agree"),
        (QWEN, {"num_local_experts": 64}, "num_local_experts is 64 and num_experts is 128; they must agree"),
        (OLMOE, {"num_experts": 0}, "num_experts is 0 and must be positive"),
        (MIXTRAL, {"num_local_experts": "8"}, "num_local_experts is '8' and must be a whole number"),
        (MIXTRAL, {"num_experts_per_tok": 9}, "experts_per_token = 9 is more than n_experts = 8"),
        (MIXTRAL, {"num_experts_per_tok": 0}, "experts_per_token = 0"),
        (MIXTRAL, {"router_jitter_noise": 0.01}, r"router_jitter_noise is 0\.01, which is noise .*; only 0\.0 can be"),
        (QWEN, {"decoder_sparse_step": 2}, f"decoder_sparse_step is 2, {MIXED} 1 can be read"),
        (QWEN, {"mlp_only_layers": [0, 5]}, rf"mlp_only_layers is \[0, 5\], {MIXED} \[\] or null can be read"),
        (QWEN, {"moe_intermediate_size": "wide"}, "moe_intermediate_size is 'wide' and must be a whole number"),
        (QWEN, {"norm_topk_prob": 1}, "norm_topk_prob is 1 and must be true or false"),
        (
            QWEN,
            {"use_sliding_window": True, "sliding_window": 4096},
            "max_window_layers is 48, the layers before which have a window in transformers 5 and none in 4",
        ),
        (QWEN, {"shared_expert_intermediate_size": 64}, "unknown field 'shared_expert_intermediate_size'"),
        (OLMOE, {"clip_qkv": 8.0}, r"clip_qkv is 8\.0, which clips queries, keys and values; only null can be read"),
        *(
            (MIXTRAL, {field: 1.25}, f"unknown field '{field}', which may change the model")
            for field in ("expert_capacity", "capacity_factor", "moe_capacity_factor")
        ),
    ],
)
def test_what_is_wrong_with_a_mixture_or_beyond_ours_is_named(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(name, changes, tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [MIXTRAL, QWEN, OLMOE])
def test_the_loss_of_balance_is_no_part_of_the_model(name: str, tmp_path: Path) -> None:
    changes = {"output_router_logits": True, "router_aux_loss_coef": 0.7}
    assert read(name, changes, tmp_path) == read(name, {}, tmp_path)


def test_a_window_of_all_layers_returns(tmp_path: Path) -> None:
    windowed = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 0}
    config = read(QWEN, windowed, tmp_path)
    assert config.sliding_window == 4096
    assert windowed.items() <= written(QWEN, config).items()
