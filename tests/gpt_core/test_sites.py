from dataclasses import replace

from gpt_core.config import ModelConfig
from gpt_core.sites import block_sites, model_sites

BLOCK = ["input", "attention_norm", "attention.query", "attention.key", "attention.value"]
ROTATED = ["attention.rotated_query", "attention.rotated_key"]
REST = ["attention.mixed", "attention.output", "mlp_norm", "mlp.hidden", "mlp.output"]


def test_sites_follow_the_path_of_the_data() -> None:
    config = ModelConfig(n_layers=2)
    learned = [f"blocks.{layer}.{site}" for layer in (0, 1) for site in BLOCK + REST]
    rope = [f"blocks.{layer}.{site}" for layer in (0, 1) for site in BLOCK + ROTATED + REST]
    assert model_sites(config) == ["embedding", *learned, "final_norm", "logits"]
    assert model_sites(replace(config, position="rope")) == ["embedding", *rope, "final_norm", "logits"]


def test_norms_stand_where_they_are_placed() -> None:
    inner = ["attention.query", "attention.key", "attention.value", "attention.mixed", "attention.output"]
    mlp = ["mlp.hidden", "mlp.output"]
    post = ["input", *inner, "attention_post_norm", *mlp, "mlp_post_norm"]
    sandwich = ["input", "attention_norm", *inner, "attention_post_norm", "mlp_norm", *mlp, "mlp_post_norm"]
    assert list(block_sites(ModelConfig(norm_placement="post"), "G")) == post
    assert list(block_sites(ModelConfig(norm_placement="sandwich"), "G")) == sandwich


def test_queries_and_keys_are_normed_before_they_are_rotated() -> None:
    normed = ["attention.normed_query", "attention.normed_key"]
    for qk_norm in ("head", "whole"):
        assert list(block_sites(ModelConfig(qk_norm=qk_norm), "G")) == BLOCK + normed + REST
        rope = ModelConfig(qk_norm=qk_norm, position="rope")
        assert list(block_sites(rope, "G")) == BLOCK + normed + ROTATED + REST


def test_only_layers_that_rotate_have_the_sites_of_it() -> None:
    config = ModelConfig(n_layers=5, position="rope", sliding_window=4, attention_pattern="LNG")
    rotate = [layer for layer in range(5) if f"blocks.{layer}.attention.rotated_key" in model_sites(config)]
    assert rotate == [0, 2, 3]  # of L N G L N
