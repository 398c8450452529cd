"""The spoke of `Qwen3ForCausalLM`: Qwen 3, with a norm on each head of queries and keys."""

from gpt_core.formats.hf_architecture import ANY, kinds, one_switch
from gpt_core.formats.hf_decoder import ATTENTION_BIAS, HEAD_NORMS, SPOKE, decoder
from gpt_core.formats.hf_parts import OptionalWindow

ARCHITECTURE = decoder(
    "qwen3",
    "Qwen3ForCausalLM",
    "RMSNorm, a gated MLP, rotation, and a norm on each head of queries and keys",
    spoke={**SPOKE, **HEAD_NORMS},
    holds={
        **one_switch("bias", "qkv_bias"),
        "qk_norm": ("head",),
        "sliding_window": ANY,
        "attention_pattern": kinds("LG"),
    },
    names=ATTENTION_BIAS,
    parts=(OptionalWindow(),),
    defaults={
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
)
