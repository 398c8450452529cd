"""What the Gemmas share beyond `hf_decoder`."""

from gpt_core.config import ModelConfig
from gpt_core.formats.hf_architecture import Allowed, Holds, default_scale
from gpt_core.formats.hf_parts import Field, Only, Part, Translation

HOLDS: Holds = {"norm_unit_offset": (True,), "embedding_scale": lambda config: (config.embed_dim**0.5,)}
PARTS: tuple[Part, ...] = (
    Translation(lambda fields, known: {"embedding_scale": known["embed_dim"] ** 0.5}),
    Only("use_bidirectional_attention", (None, False), because="which lets tokens see those after them"),
)
QUERY_SCALE = {
    "query_pre_attn_scalar": Field("attention_scale", int, read=lambda n: n**-0.5, write=lambda scale: round(scale**-2))
}
LOGIT_SOFTCAP = {"final_logit_softcapping": Field("logit_softcap", float, null=True)}
DEFAULTS = {
    "vocab_size": 256000,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
}


def query_scale(config: ModelConfig) -> Allowed:
    """Of attention_scale: 1 / sqrt of a whole number."""
    whole = max(1, round(min(1 / config.attention_scale / config.attention_scale, 2.0**53)))
    return whole**-0.5, default_scale(config)
