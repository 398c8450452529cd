from dataclasses import replace

from gpt_core.config import ModelConfig
from gpt_core.sites import model_sites

BLOCK = ["input", "attention_norm", "attention.query", "attention.key", "attention.value"]
ROTATED = ["attention.rotated_query", "attention.rotated_key"]
REST = ["attention.mixed", "attention.output", "mlp_norm", "mlp.hidden", "mlp.output"]


def test_sites_follow_the_path_of_the_data() -> None:
    config = ModelConfig(n_layers=2)
    learned = [f"blocks.{layer}.{site}" for layer in (0, 1) for site in BLOCK + REST]
    rope = [f"blocks.{layer}.{site}" for layer in (0, 1) for site in BLOCK + ROTATED + REST]
    assert model_sites(config) == ["embedding", *learned, "final_norm", "logits"]
    assert model_sites(replace(config, position="rope")) == ["embedding", *rope, "final_norm", "logits"]
