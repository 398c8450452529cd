"""The named intermediates of a model, in the order in which data flows through them.

A site is a dotted path such as "blocks.3.attention.key". Both models report the same sites with the same
shapes, so that traces compare name by name and the first difference names the layer.
"""

from gpt_core.config import ModelConfig

BLOCK_SITES = (
    "input",  # [batch, time, embed] residual stream
    "attention_norm",  # [batch, time, embed], unless norm_placement is "post"
    "attention.query",  # [batch, time, heads, head_dim]
    "attention.key",  # [batch, time, kv_heads, head_dim]
    "attention.value",  # [batch, time, kv_heads, head_dim]
    "attention.normed_query",  # [batch, time, heads, head_dim], with qk_norm only
    "attention.normed_key",  # [batch, time, kv_heads, head_dim], with qk_norm only
    "attention.rotated_query",  # [batch, time, heads, head_dim], in layers that rotate only
    "attention.rotated_key",  # [batch, time, kv_heads, head_dim], in layers that rotate only
    "attention.mixed",  # [batch, time, heads, head_dim] probabilities times values
    "attention.output",  # [batch, time, embed]
    "attention_post_norm",  # [batch, time, embed], unless norm_placement is "pre"
    "mlp_norm",  # [batch, time, embed], unless norm_placement is "post"
    "mlp.hidden",  # [batch, time, mlp] after activation and gate
    "mlp.output",  # [batch, time, embed]
    "moe.scores",  # [batch, time, experts] of the router, in place of an MLP's sites
    "moe.chosen",  # [batch, time, experts_per_token] the experts of a token, the highest score first
    "moe.weights",  # [batch, time, experts_per_token] their weights
    "moe.output",  # [batch, time, embed]
    "mlp_post_norm",  # [batch, time, embed], unless norm_placement is "pre"
)

ROUTING_SITES = ("moe.scores", "moe.chosen", "moe.weights")
"""What the router of a mixture decides."""


def block_sites(config: ModelConfig, kind: str) -> tuple[str, ...]:
    """Sites of one block of a kind, relative to it."""
    absent = {"pre": ("_post_norm",), "post": ("attention_norm", "mlp_norm"), "sandwich": ()}[config.norm_placement]
    if config.qk_norm is None:
        absent += ("normed_query", "normed_key")
    if config.view(kind).rotation is None:
        absent += ("rotated_query", "rotated_key")
    absent += ("mlp.hidden", "mlp.output") if config.n_experts else (*ROUTING_SITES, "moe.output")
    return tuple(site for site in BLOCK_SITES if not site.endswith(absent))


def model_sites(config: ModelConfig) -> list[str]:
    """Every site of a model, in the order of the data's path; the last is "logits"."""
    kinds = enumerate(config.layer_kinds)
    blocks = [f"blocks.{layer}.{site}" for layer, kind in kinds for site in block_sites(config, kind)]
    return ["embedding", *blocks, "final_norm", "logits"]
