"""The spoke of `MistralForCausalLM`: Llama's block without biases, with a window on all layers or on none."""

from gpt_core.formats.hf_architecture import ANY
from gpt_core.formats.hf_decoder import WINDOW, decoder

ARCHITECTURE = decoder(
    "mistral",
    "MistralForCausalLM",
    "RMSNorm, a gated MLP, rotation and a window, as every server reads it",
    holds={"sliding_window": ANY},
    names=WINDOW,
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": None,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
)
