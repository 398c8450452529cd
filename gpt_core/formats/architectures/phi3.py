"""The spoke of `Phi3ForCausalLM`: Phi-3 and 4, Llama's block with joined projections and a part of each head rotated.

transformers takes every scaling of its rotation for longrope, which our models have not.
"""

from gpt_core.formats.hf_architecture import ANY
from gpt_core.formats.hf_decoder import LAYER, SPOKE, WINDOW, decoder
from gpt_core.formats.hf_parts import Dropout, Ignored, Only
from gpt_core.formats.hf_rope import Rotation

_QKV = (f"{LAYER}.self_attn.qkv_proj.weight", "(heads head_dim) embed", "heads")
_GATE_UP = (f"{LAYER}.mlp.gate_up_proj.weight", "mlp embed", "mlp")

ARCHITECTURE = decoder(
    "phi3",
    "Phi3ForCausalLM",
    "RMSNorm, a gated MLP, rotation of a part of each head, and a window",
    spoke={
        **SPOKE,
        **{f"blocks.attention.{part}.kernel": _QKV for part in ("query", "key", "value")},
        **{f"blocks.mlp.{part}.kernel": _GATE_UP for part in ("gate", "up")},
    },
    holds={"sliding_window": ANY, "rope_fraction": ANY, "rope_scaling": (None,), "dropout": ANY},
    names=WINDOW,
    parts=(
        Ignored("original_max_position_embeddings", int),  # of longrope
        Only("attention_bias", (False,), because="and this architecture has no biases"),
    ),
    rotation=Rotation(fraction="partial_rotary_factor", types=("default",)),
    dropout=Dropout(kept=("embd_pdrop", "resid_pdrop")),
    defaults={
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
)
