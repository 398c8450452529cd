"""The named intermediates of a model, in the order in which data flows through them.

A site is a dotted path such as "blocks.3.attention.key". Both models report the same sites with the same
shapes, so that traces compare name by name and the first difference names the layer.
"""

from gpt_core.config import ModelConfig

BLOCK_SITES = (
    "input",  # [batch, time, embed] residual stream
    "attention_norm",  # [batch, time, embed]
    "attention.query",  # [batch, time, heads, head_dim]
    "attention.key",  # [batch, time, kv_heads, head_dim]
    "attention.value",  # [batch, time, kv_heads, head_dim]
    "attention.rotated_query",  # [batch, time, heads, head_dim], with RoPE only
    "attention.rotated_key",  # [batch, time, kv_heads, head_dim], with RoPE only
    "attention.mixed",  # [batch, time, heads, head_dim] probabilities times values
    "attention.output",  # [batch, time, embed]
    "mlp_norm",  # [batch, time, embed]
    "mlp.hidden",  # [batch, time, mlp] after the GELU
    "mlp.output",  # [batch, time, embed]
)


def block_sites(config: ModelConfig) -> tuple[str, ...]:
    """Sites of one block, relative to it."""
    if config.position == "rope":
        return BLOCK_SITES
    return tuple(site for site in BLOCK_SITES if "rotated" not in site)


def model_sites(config: ModelConfig) -> list[str]:
    """Every site of a model, in the order of the data's path; the last is "logits"."""
    blocks = [f"blocks.{layer}.{site}" for layer in range(config.n_layers) for site in block_sites(config)]
    return ["embedding", *blocks, "final_norm", "logits"]
